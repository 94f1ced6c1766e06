"""What a study is called, and which overrides are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.cli import search
from pipelines.config import conf_dir
from pipelines.errors import PipelineError
from pipelines.search import studies


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every study that begins, which is all that it does; no service is there."""
    found: list[tuple[Any, ...]] = []

    def begin(*given: Any, **options: Any) -> None:
        found.append(given)
        raise PipelineError("begun")

    monkeypatch.setattr(search, "connect", lambda config, services: config)
    monkeypatch.setattr(studies, "training_study", begin)
    monkeypatch.setattr(studies, "guidance_study", begin)
    return found


def start(study: Callable[[], None]) -> None:
    with pytest.raises(PipelineError, match="begun"):
        study()


def test_a_training_study_is_called_after_the_file_of_its_space_wherever_that_lies(begun, tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text((conf_dir() / "search" / "schedule.yaml").read_text())
    for space in ("schedule", str(own)):
        start(lambda space=space: search.training(space=space, overrides=["+experiment=digits"]))  # type: ignore[misc]
    start(lambda: search.training(study="other", overrides=["+experiment=digits"]))
    assert [name for _, name, *_ in begun] == ["schedule-digits", "mine-digits", "other"]


def test_overrides_of_the_run_reach_a_guidance_study_and_those_of_the_study_do_not(begun):
    given = ["+experiment=digits", "search.trials=3", "sampler.precision=bf16"]
    start(lambda: search.guidance(model="/a/folder", overrides=given))
    ((config, overrides, reference, name, chosen),) = begun
    assert overrides == ["+experiment=digits", "sampler.precision=bf16"]
    assert (reference, name) == ("/a/folder", "guidance-digits")
    assert (config.sampler.precision, chosen.trials) == ("bf16", 3)
