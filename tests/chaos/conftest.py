"""The stack on which trainings are disturbed: modules that ask for it belong to the group `arena`, which shares it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.arena import Arena


@pytest.fixture(scope="package")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("home") / ".ddpm", tmp_path_factory.mktemp("work"))
    try:
        arena.ddpm("ingest", "digits", "--to", "s3://ddpm/datasets/digits")
        yield arena
    finally:
        arena.close()
