"""What a study is called, and which overrides are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.cli import search
from pipelines.config import conf_dir
from pipelines.presentation.errors import PipelineError
from pipelines.search.studies import Search


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every study that begins, which is all that it does; no service is there."""
    found: list[Any] = []

    def begin(study: Any, **options: Any) -> None:
        found.append(study)
        raise PipelineError("begun")

    monkeypatch.setattr(search, "connect", lambda config, services: config)
    monkeypatch.setattr(Search, "__post_init__", lambda study: None)
    monkeypatch.setattr(Search, "run", begin)
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
    assert [study.name for study in begun] == ["schedule-digits", "mine-digits", "other"]


def test_overrides_of_the_run_reach_a_guidance_study_and_those_of_the_study_do_not(begun):
    given = ["+experiment=digits", "search.trials=3", "sampler.precision=bf16"]
    start(lambda: search.guidance(model="/a/folder", overrides=given))
    (study,) = begun
    assert study.overrides == ["+experiment=digits", "sampler.precision=bf16"]
    assert (study.reference, study.name) == ("/a/folder", "guidance-digits")
    assert (study.config.sampler.precision, study.study.trials) == ("bf16", 3)
