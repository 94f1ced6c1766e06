"""A version draws the same pictures where nothing is installed but what it asks for itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest

from ddpm.generate import Sampling
from ddpm.models.classifier import NoisyClassifier
from tests.pipelines.registry.version import UNET, a_model, a_version, scores

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PREDICT = """
import importlib.util, sys
import mlflow, numpy, pandas
assert importlib.util.find_spec("ray") is None and importlib.util.find_spec("pipelines") is None
for folder in sys.argv[1:]:
    model = mlflow.pyfunc.load_model(folder)
    numpy.save(folder + ".npy", model.predict(pandas.DataFrame({"label": ["a", "b", "b"], "seed": [1, 2, 3]})))
"""
CLASSIFIER = NoisyClassifier(UNET, 2).eval()
KINDS = {
    "classifier_free": ({}, {}),
    "classifier": ({"classifier": CLASSIFIER}, {"guidance": "classifier", "classifier": "runs:/a"}),
    "auto": ({"weak": a_model(1)}, {"guidance": "auto", "weak": "runs:/b"}),
}
"""Kind of guidance -> networks of the model, and the fields of its settings."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("versions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", str(root / "home"))
        return {
            kind: a_version(root / kind, a_model(**parts), scores(Sampling.of(steps=3, scale=2.0, **fields))).folder
            for kind, (parts, fields) in KINDS.items()
        }


@pytest.fixture(scope="module")
def python(versions, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the requirements of the versions, which are the same for all."""
    (listed,) = {(folder / "requirements.txt").read_text() for folder in versions.values()}
    environment = tmp_path_factory.mktemp("environment")
    requirements = environment / "requirements.txt"
    requirements.write_text(listed)
    subprocess.run([sys.executable, "-m", "venv", environment / "venv"], check=True)
    made = environment / "venv" / "bin" / "python"
    subprocess.run([made, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
    return made


def test_a_version_predicts_the_same_in_a_clean_environment(versions, python, tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW", "DDPM"))}
    arguments = [str(folder) for folder in versions.values()]
    subprocess.run([python, "-c", PREDICT, *arguments], check=True, cwd=tmp_path, env=clean)
    rows = pandas.DataFrame({"label": ["a", "b", "b"], "seed": [1, 2, 3]})
    drawn = {}
    for kind, folder in versions.items():
        there = np.load(f"{folder}.npy")
        assert (there == mlflow.pyfunc.load_model(str(folder)).predict(rows)).all(), kind
        drawn[kind] = there.tobytes()
    assert len(set(drawn.values())) == len(KINDS), "guidance must show in the pictures"
