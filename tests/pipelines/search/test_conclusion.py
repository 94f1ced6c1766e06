"""What becomes of a winner: written as what it is, and as a version of its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpm.generate import Sampling
from ddpm.quality import Interval
from pipelines import registry, tracking
from pipelines.config import compose
from pipelines.presentation.progress import no_stage_notice
from pipelines.registry import RegistryError
from pipelines.search.confirmation import Confirmed
from pipelines.search.guidance_search import GuidanceSearch
from pipelines.search.training_search import TrainingSearch
from pipelines.tracking import ModelVersion
from tests.pipelines.search.test_study import STUDY, record

BASE = compose(["+experiment=digits", "storage=file", "storage.root=file:///nowhere"])
SETTINGS = Sampling.of(kind="heun", steps=7, scale=1.6, interval=(0.0, 0.5))


def confirmed(params=None):
    gain = Interval(1.0, 0.5, 1.5, (64,))
    return Confirmed("t", params or {}, SETTINGS, "frechet_distance", gain, {}, gain, 4.0, 1e-5, better=True)


class Texts:
    """An MLflow run that keeps texts."""

    uri = "http://mlflow"

    def __init__(self):
        self.texts = {}

    def text(self, text, name):
        self.texts[name] = text


def test_a_configuration_is_called_confirmed_only_where_it_is(tmp_path):
    config = compose(["+experiment=digits", "storage=file", f"storage.root=file://{tmp_path}"])
    search, tracker = TrainingSearch(config, "s", STUDY, no_stage_notice, {}), Texts()
    folder = tmp_path / "studies" / "s" / "best"
    top = record(3, 5.0, **{"sampler.kind": "heun"})
    assert search.write_best(None, None, tracker) is None
    assert search.write_best(top, None, tracker) == f"file://{tmp_path}/studies/s/best/config-unconfirmed.json"
    assert [path.name for path in folder.iterdir()] == ["config-unconfirmed.json"]
    where = search.write_best(top, confirmed({"optim.lr": 0.5}), tracker)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    written = json.loads(Path(where.removeprefix("file://")).read_text())
    assert (written["optim"]["lr"], written["name"]) == (0.5, "s-best")
    assert [*tracker.texts] == ["best/config-unconfirmed.json", "best/config.json"]


@pytest.fixture
def made(monkeypatch):
    """Versions that were registered, and tags that were set."""
    calls = SimpleNamespace(registered=[], tags=[])

    def register_scored(resolved, settings, config, *_):
        calls.registered.append((settings, config.registry.model))
        return ModelVersion("digits", "2", "run", {}, ())

    monkeypatch.setattr(registry, "register_scored", register_scored)
    monkeypatch.setattr(tracking, "set_version_tags", lambda *a: calls.tags.append(a))
    return calls


def test_a_winner_becomes_a_new_version_and_the_old_one_stays_as_it_was(made):
    old = ModelVersion("digits", "1", "run", {}, ("champion",))
    resolved = SimpleNamespace(version=old, tracker=Texts(), reference="models:/digits/1")
    said = []
    other = BASE.model_copy(update={"registry": BASE.registry.model_copy(update={"model": "other"})})
    search = GuidanceSearch(other, "s", STUDY, lambda name, text: said.append(text), resolved.reference, [])
    search.resolved = resolved
    found = search.register(confirmed())
    assert found.version == "2"
    assert made.registered == [(SETTINGS, "digits")]  # below the name of the model that was searched
    ((_, name, number, tags),) = made.tags
    assert (name, number, tags["study"]) == ("digits", "2", "s")
    assert tags["study.gain"].startswith("1 in frechet_distance")
    assert "ddpm promote models:/digits/2 --alias champion" in said[-1]


def test_without_a_registered_version_nothing_is_registered(made, monkeypatch):
    resolved, said = SimpleNamespace(version=None, tracker=Texts(), reference="runs:/abc"), []

    def notice(name, text):
        said.append(text)

    search = GuidanceSearch(BASE, "s", STUDY, notice, resolved.reference, [])
    search.resolved = resolved
    assert search.register(confirmed()) is None
    assert "ddpm register runs:/abc sampler=heun guidance.kind=classifier_free guidance.scale=1.6" in said[-1]
    assert made.registered == []

    def refuse(*_):
        raise RegistryError("something is missing")

    monkeypatch.setattr(registry, "register_scored", refuse)
    resolved.version = ModelVersion("digits", "1", "run", {}, ())
    assert search.register(confirmed()) is None
    assert said[-1].startswith("the winner is not registered: something is missing; register it with `ddpm register")
