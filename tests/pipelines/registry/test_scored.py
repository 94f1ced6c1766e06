"""A model becomes a version by being scored, once, with the networks that guide it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec
from pipelines import tracking
from pipelines.checkpoints import references
from pipelines.checkpoints.references import Resolved
from pipelines.config import compose
from pipelines.evaluation.scores import Estimate
from pipelines.presentation.progress import Silent
from pipelines.registry import RegistryError, package, register_scored
from pipelines.signing import Signer
from pipelines.tracking import ModelVersion
from tests.pipelines.checkpoints.tiny import SMALL
from tests.pipelines.evaluation import made_up

CONFIG = compose(["+experiment=digits"])
SETTINGS = Sampling.of(steps=7)
SCORES = made_up.scores(
    estimates={"frechet_distance": Estimate(3.0, 2.0, 4.0)},
    n=64,
    seeds=(0,),
    real={},
    sampling=SETTINGS.to_json(),
)


@pytest.fixture
def world(monkeypatch):
    """A registry that keeps what is registered."""
    found = SimpleNamespace(versions=[], scored=[], aliases={}, notes=[], on_register=lambda resolved: None)

    def score(resolved, settings, config, display, connect, dataset_uri):
        found.scored.append((settings, dataset_uri))
        return replace(SCORES, sampling=settings.to_json()), True

    def register(resolved, name, scores, dataset_uri, signer, training_data):
        found.on_register(resolved)
        tags = {"scores": json.dumps(scores.to_plain(), sort_keys=True), "model_digest": "m"}
        found.versions.append(ModelVersion(name, str(len(found.versions) + 1), dataset_uri, tags, ()))
        return found.versions[-1]

    def guided(model, settings, uri, storage):
        return replace(model, weak=f"the network of {getattr(settings.guidance, 'weak', None)}")

    monkeypatch.setattr(references, "guided", guided)
    monkeypatch.setattr(package, "check_signing", lambda config: None)
    monkeypatch.setattr(package, "score_and_record", score)
    monkeypatch.setattr(package, "register", register)

    def version(uri, name, *, alias):
        return next(
            (v for v in found.versions if (v.name, v.version) == (name, found.aliases.get((name, alias)))), None
        )

    monkeypatch.setattr(tracking, "set_alias", lambda uri, name, alias, v: found.aliases.update({(name, alias): v}))
    monkeypatch.setattr(tracking, "version", version)
    monkeypatch.setattr(tracking, "describe", lambda tracker, parts: found.notes.append(parts["Registered"]))
    monkeypatch.setattr(package, "digest_of", lambda resolved: "m")
    monkeypatch.setattr(Signer, "of", lambda config: None)
    monkeypatch.setattr(tracking, "versions", lambda uri, name: [v for v in found.versions if v.name == name])
    return found


TRACKER = SimpleNamespace(uri="http://mlflow")


def model(tracker=TRACKER):
    spec = ModelSpec(
        SMALL, {"kind": "cosine", "num_steps": 20}, "v", 8, (), lineage={"dataset_uri": "s3://b/trained-on"}
    )
    return Resolved("models:/digits/1", Model(spec, torch.nn.Identity()), tracker)


def ask(settings=SETTINGS, config=CONFIG, resolved=None, **options):
    return register_scored(resolved or model(), settings, config, Silent(), lambda: None, **options)


def test_the_same_model_with_the_same_scores_is_registered_once_a_name(world):
    first = ask()
    assert (first.uri, first.run_id) == ("models:/digits/1", "s3://b/trained-on")
    assert ask() == first
    other = CONFIG.model_copy(update={"registry": CONFIG.registry.model_copy(update={"model": "other"})})
    assert ask(config=other).name == "other"
    assert len(world.versions) == 2
    assert ask(dataset_uri="s3://b/other").uri == first.uri  # scored on what was asked for
    assert world.scored[-1] == (SETTINGS, "s3://b/other")


def test_a_model_without_a_run_is_refused_before_it_is_scored(world):
    with pytest.raises(RegistryError, match="models:/digits/1 has no MLflow run"):
        ask(resolved=model(tracker=None))
    assert world.scored == world.versions == []


def test_the_newest_version_is_the_candidate(world):
    ask()
    assert world.aliases == {("digits", "candidate"): "1"}


def test_the_networks_that_guide_are_loaded_so_that_the_version_can_carry_them(world):
    made = []
    settings = Sampling.of(guidance="auto", weak="runs:/abc")
    world.on_register = made.append
    ask(settings)
    assert made[0].model.weak == "the network of runs:/abc"


def test_a_model_with_other_scores_is_another_version(world, monkeypatch):
    first = ask()
    changed = replace(SCORES, samples="elsewhere")
    monkeypatch.setattr(package, "score_and_record", lambda *_: (changed, True))
    assert ask().version != first.version


@pytest.mark.parametrize("step", ["describe", "set_alias"])
def test_what_a_process_that_was_killed_had_left_undone_is_done_by_the_next(world, monkeypatch, step):
    with monkeypatch.context() as killed:
        killed.setattr(tracking, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert (len(world.versions), world.aliases) == (1, {})
    assert ask().version == "1"
    assert world.aliases == {("digits", "candidate"): "1"}
    assert "digits version 1" in world.notes[-1]


def test_the_alias_of_a_newer_version_does_not_go_back_to_an_older_one(world):
    ask()
    ask(Sampling.of(steps=8))
    assert ask().version == "1"
    assert world.aliases == {("digits", "candidate"): "2"}
