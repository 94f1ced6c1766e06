"""What the tests of the registry share."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.pipelines.registry.version import Version, a_model, a_version, scores


@pytest.fixture(scope="session")
def _made(tmp_path_factory) -> tuple[Path, Version]:
    folder = tmp_path_factory.mktemp("version")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", str(folder / "home"))
        return folder, a_version(folder / "v", a_model(), scores())


@pytest.fixture
def version(_made, home) -> Version:
    """A version of a test's own, signed by the key of the test's home."""
    folder, made = _made
    shutil.copytree(folder / "home", home)
    shutil.copytree(made.folder, home.parent / "pyfunc")
    return replace(made, folder=home.parent / "pyfunc")
