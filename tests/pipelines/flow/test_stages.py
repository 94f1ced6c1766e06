"""When a run counts as trained, a version as registered and an alias as moved: by what storage and MLflow hold."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import registry, tracking
from pipelines.checkpoints import (
    Listed,
    Published,
    checkpoint_name,
    enter_checkpoint,
    record_published,
    references,
    run_folder,
    save_checkpoint,
)
from pipelines.config import compose
from pipelines.config.sections import SourceConfig
from pipelines.flow import Results, Site
from pipelines.flow import train as flow_train
from pipelines.flow.judge import Promote, Register
from pipelines.flow.train import Train, for_data
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Silent
from pipelines.registry import Signer, Verdict, VerdictLog
from pipelines.shards.index import make_dataset
from pipelines.shards.quarantine import Problem, make_quarantine
from pipelines.signing import Trust
from pipelines.storage import Storage, layout
from pipelines.tracking import ModelVersion, Tracker, client
from pipelines.training import driver
from pipelines.training.driver import TrainingResult
from pipelines.training.loop.context import Job
from pipelines.training.prepare import PreparedRun
from tests.pipelines.checkpoints.tiny import DATASET, a_checkpoint
from tests.pipelines.registry.version import scores

STORAGE = Storage()
SITE = Site(STORAGE, {}, Silent())


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client.client(uri).create_experiment("ddpm", artifact_location=f"file://{folder}/artifacts")
    return uri


@pytest.fixture
def config(tmp_path, mlflow):
    places = ["storage=file", f"storage.root=file://{tmp_path}", f"data.uri=file://{tmp_path}/ds"]
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "dataset.json").write_text(DATASET.to_json())
    return compose(["+experiment=digits", f"name={tmp_path.name}", "images=1000", f"tracking.uri={mlflow}", *places])


def store(config, images: int, length: int | None = None, **lineage) -> None:
    """Store a checkpoint of a run of these settings."""
    checkpoint = a_checkpoint(images)
    spec = replace(checkpoint.spec, lineage={**checkpoint.spec.lineage, **lineage})
    name = checkpoint_name(images, 1)
    path = Path(run_folder(config).removeprefix("file://")) / name
    path.mkdir(parents=True)
    save_checkpoint(path, replace(checkpoint, spec=spec, identity=config.identity(), length=length))
    enter_checkpoint(STORAGE, run_folder(config), Listed(1, images, name), 5)


def looked(config, dataset=DATASET):
    return Train(config).look(SITE, Results(dataset=dataset))


def test_a_run_is_trained_when_it_has_seen_all_its_images_and_mlflow_has_all_of_it(config):
    name = config.name
    assert looked(config).reason == f"run '{name}' has no checkpoint"
    store(config, 500)
    assert looked(config).reason == f"run '{name}' has seen 500 of 1,000 images"
    store(config, 1000)
    seen = f"run '{name}' has seen its 1,000 images already"
    assert looked(config).reason == f"{seen}, and MLflow does not have all of it"
    tracker, _ = tracking.open_run(config.tracking.uri, config.tracking.experiment, name, {})
    assert looked(config).reason == f"{seen}, and MLflow does not have all of it"
    tracker.status("FINISHED")
    assert looked(config).reason == f"{seen}, and MLflow names no published checkpoint"
    record_published(tracker, Published(f"{run_folder(config)}/published/x", 1000, "d"))
    assert looked(config).reason == f"{seen}, and a published checkpoint is not scored"
    tracking.enter_checkpoint_model(tracker, 1000, {})
    found = looked(config)
    assert found.reason == seen
    assert found.result is not None
    assert (found.result.tracker, found.result.published.digest) == (tracker, "d")
    STORAGE.write(f"{run_folder(config)}/{layout.UNSENT}", b"something")
    assert looked(config).reason == f"{seen}, and MLflow does not have all of it"


def test_a_run_that_has_seconds_is_trained_when_it_has_seen_what_fitted_them(config):
    timed = config.model_copy(update={"training_s": 60.0})
    store(timed, 600, length=800)
    assert looked(timed).reason == f"run '{config.name}' has seen 600 of 800 images"
    store(timed, 800, length=800)
    assert looked(timed).reason.startswith(f"run '{config.name}' has seen its 800 images already")
    assert looked(config).reason == f"run '{config.name}' has seen 800 of 1,000 images"


@pytest.mark.parametrize(
    ("left_s", "resumes_at", "expected"),
    [(90.0, 0, 90.0), (3.0, 0, 15.0), (-50.0, 0, 15.0), (90.0, 500, 60.0), (None, 0, 60.0)],
    ids=["earlier than planned", "late", "too late", "resumed", "no time said"],
)
def test_a_new_training_gets_the_seconds_that_are_left(config, monkeypatch, left_s, resumes_at, expected):
    timed, trained = config.model_copy(update={"training_s": 60.0}), []

    def prepare_run(config, lineage, notice):
        tracker = Tracker(config.tracking.uri, "none", patience_s=0)
        return PreparedRun(Job(config, DATASET, tracker, {}), resumes_at, 1000)

    def train(run, report, notice):
        trained.append(run.job.config)
        return TrainingResult(run.job.tracker, "finished", 1000, Published("uri", 1000, "d"), None)

    monkeypatch.setattr(flow_train, "prepare_run", prepare_run)
    monkeypatch.setattr(driver, "train", train)
    ends = None if left_s is None else time.monotonic() + left_s
    stage, site = Train(timed), replace(SITE, training_ends=ends)
    assert stage.fills_time(site) is (ends is not None)
    assert not Train(config).fills_time(site)
    stage.run(site, Results(dataset=DATASET))
    assert trained[0].training_s == pytest.approx(expected, abs=1.0)
    assert trained[0].model_copy(update={"training_s": 60.0}) == timed


def test_looking_for_a_run_makes_neither_run_nor_experiment(config):
    store(config, 1000)
    uri = config.tracking.uri
    other = config.model_copy(update={"tracking": config.tracking.model_copy(update={"experiment": "never-used"})})
    assert looked(other).result is None
    assert tracking.find_run(uri, "never-used", config.name) is None
    assert tracking.find_run(uri, config.tracking.experiment, "nobody") is None
    assert tracking.list_runs(uri, config.name) == []


def test_a_run_of_other_settings_or_data_is_an_error_and_not_a_reason_to_train(config):
    store(config, 1000)
    faster = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.5})})
    with pytest.raises(PipelineError, match=r"optim\.lr: 0\.002 before, 0\.5 now"):
        looked(faster)
    with pytest.raises(PipelineError, match="dataset digest"):
        looked(config, replace(DATASET, digest="f" * 64))


def test_changed_data_have_a_run_of_their_own_and_the_same_data_the_same(config, tmp_path):
    assert for_data(config) == config
    store(config, 500)
    assert for_data(config) == config
    other = make_dataset(
        DATASET.uri,
        splits={**DATASET.splits, "test": (replace(DATASET.splits["test"][0], name="u.tar"),)},
        classes=DATASET.classes,
        channels=1,
        image_size=8,
        mean=(0.0,),
        std=(1.0,),
    )
    (tmp_path / "ds" / "dataset.json").write_text(other.to_json())
    renewed = for_data(config)
    assert renewed.name == f"{config.name}-{other.digest[:8]}"
    assert renewed.registry == config.registry
    assert for_data(config) == renewed
    allowed = config.model_copy(update={"data": config.data.model_copy(update={"allow_changed": True})})
    assert for_data(allowed) == allowed


def test_a_change_of_any_source_of_a_mixture_is_a_change_of_the_data(config, tmp_path):
    places = {name: tmp_path / name for name in ("ds", "more")}
    places["more"].mkdir()
    (places["more"] / "dataset.json").write_text(DATASET.to_json())
    sources = [SourceConfig(name=name, uri=f"file://{place}") for name, place in places.items()]
    mixed = config.model_copy(update={"data": config.data.model_copy(update={"sources": tuple(sources)})})

    def digest():
        return Train(mixed).inputs(SITE, Results(dataset=DATASET))["data"]

    before = digest()
    assert before != Train(config).inputs(SITE, Results(dataset=DATASET))["data"]
    store(mixed, 500, stream_digest=before)
    assert for_data(mixed) == mixed
    problem = Problem(DATASET.splits["train"][0].name, 0, "k", "decode", "")
    (places["more"] / "quarantine.json").write_text(make_quarantine(DATASET, [problem]).to_json())
    assert digest() != before
    assert for_data(mixed).name == f"{mixed.name}-{digest()[:8]}"


@pytest.fixture
def registered(config, monkeypatch):
    """A registry of two versions, whose alias is where a test puts it."""
    versions = [
        ModelVersion("m", number, "r", {"served_digest": number, "model_digest": "d", "scores": "{}"}, ())
        for number in "21"
    ]
    aliases: dict[str, str] = {}

    def version(uri, name, *, alias=None, number=None):
        wanted = aliases.get(alias) if alias else number
        return next((v for v in versions if v.version == wanted), None)

    monkeypatch.setattr(tracking, "versions", lambda uri, name: versions)
    monkeypatch.setattr(tracking, "version", version)
    monkeypatch.setattr(registry.Gate, "_wrong", lambda self, version: None)  # these have no files
    section = config.registry.model_copy(update={"model": "m"})
    return config.model_copy(update={"registry": section}), versions, aliases


class Plain:
    """Scores that are stored as an empty object."""

    def to_plain(self):
        return {}


@pytest.mark.parametrize("digest, number", [("d", "2"), ("another", None)])
def test_a_version_counts_where_it_has_the_weights_and_the_scores(registered, digest, number):
    config, _, aliases = registered
    aliases["candidate"] = "2"
    found = looked_for(config, digest).result
    assert (found and found.version) == number


def looked_for(config, digest):
    run = TrainingResult(tracking.Tracker("u", "r"), "complete", 1, Published("u", 1, digest), None)
    return Register(config).look(SITE, Results(run=run, evaluation=Plain()))


@pytest.mark.parametrize("candidate", [None, "1"])
def test_a_version_counts_once_it_or_a_newer_one_is_the_candidate(registered, candidate):
    config, _, aliases = registered
    aliases["candidate"] = candidate
    assert looked_for(config, "d").reason == "version 2 of m lacks the alias candidate"


def test_the_gate_is_done_where_the_alias_is_at_the_version_by_its_log_and_in_mlflow(registered, monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    config, (second, first), aliases = registered

    def reason(version):
        return Promote(config).look(SITE, Results(version=version)).reason

    assert reason(first) == "champion of m is not at version 1"
    trust = Trust.of(config.registry)
    log = VerdictLog.of(config.storage.root, "m", "champion", STORAGE, trust)
    passed = Verdict(True, "the alias has no version yet", "m", "champion", "1", served_digest="1")
    assert log.add(passed, Signer.of(config.registry), 0)
    assert reason(first) == "champion of m is not at version 1"  # the log says so, and MLflow does not yet
    aliases["champion"] = "1"
    assert reason(first) == "champion is at version 1 already"
    assert reason(second) == "champion of m is not at version 2"
    aliases["champion"] = "2"  # moved without the gate
    assert (reason(first), reason(second)) == (
        "champion of m is not at version 1",
        "champion of m is not at version 2",
    )


def test_the_gate_is_not_asked_again_for_a_version_that_was_rolled_back(registered, monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    config, (second, first), aliases = registered
    log = VerdictLog.of(config.storage.root, "m", "champion", STORAGE, Trust.of(config.registry))
    signer = Signer.of(config.registry)
    passed = [Verdict(True, "better", "m", "champion", number, served_digest=number) for number in "12"]
    back = Verdict(True, "rolled back", "m", "champion", "1", champion="2", served_digest="1", rollback=True, at="2026")
    for number, verdict in enumerate([*passed, back]):
        assert log.add(verdict, signer, number)
    aliases["champion"] = "1"
    look = Promote(config).look(SITE, Results(version=second))
    assert look.reason == "a rollback took champion from version 2"
    assert (look.result.passed, look.result.version, look.result.champion) == (False, "2", None)
    assert not look.result.rollback
    another = replace(second, tags={"served_digest": "another model, that has its number now"})
    assert Promote(config).look(SITE, Results(version=another)).reason == "champion of m is not at version 2"
    assert "at 2026; `ddpm promote models:/m/2 --alias champion` gives it back" in look.result.reason
    assert Promote(config).look(SITE, Results(version=first)).result.passed
    assert log.add(passed[1], signer, 3)  # somebody gives it back
    aliases["champion"] = "2"
    assert Promote(config).look(SITE, Results(version=second)).result.passed
    aliases["champion"] = "1"  # without the gate
    assert Promote(config).look(SITE, Results(version=second)).result is None


def scored_on(number: str, data: str) -> ModelVersion:
    tags = {"scores": json.dumps(scores(stream_digest=data).to_plain()), "served_digest": number}
    return ModelVersion("m", number, "r", tags, ())


@pytest.mark.parametrize(
    "at_alias, expected",
    [
        (scored_on("1", "old"), "1"),
        (scored_on("1", "new"), None),
        (scored_on("2", "old"), None),  # itself
        (ModelVersion("m", "1", "r", {}, ()), None),  # nothing is known of it, and `promote` says so
        (None, None),
    ],
)
def test_a_champion_is_incomparable_where_its_scores_are_of_other_data(registered, monkeypatch, at_alias, expected):
    config, *_ = registered
    monkeypatch.setattr(tracking, "version", lambda *arguments, **named: at_alias)
    found = Promote(config).gate(SITE).incomparable(scored_on("2", "new"))
    assert (found and found.version) == expected


@dataclass
class FakeGate:
    """A gate whose champion is of other data until the version of it that was scored again is promoted."""

    champion: ModelVersion | None
    asked: list[str] = field(default_factory=list)
    uri = "u"
    connect = None

    def incomparable(self, version):
        return self.champion

    def promote(self, version):
        self.asked.append(version.version)
        return Verdict(version.version == "3" or "3" in self.asked, "why", "m", "champion", version.version)


@pytest.mark.parametrize("failing", [False, True])
def test_a_champion_of_other_data_is_scored_anew_and_promoted_before_the_version_is_compared(
    registered, monkeypatch, failing
):
    config, *_ = registered
    gate, sampling = FakeGate(scored_on("1", "old")), object()
    model = SimpleNamespace(spec=SimpleNamespace(sampling=sampling))
    scored: list[tuple[str, object, str | None]] = []

    def register_scored(resolved, settings, config, display, connect, *, dataset_uri):
        if failing:
            raise PipelineError("other classes")
        scored.append((resolved.reference, settings, dataset_uri))
        return scored_on("3", "new")

    monkeypatch.setattr(Promote, "gate", lambda self, site: gate)
    monkeypatch.setattr(
        references, "resolve", lambda reference, **named: SimpleNamespace(reference=reference, model=model)
    )
    monkeypatch.setattr(registry, "register_scored", register_scored)
    aliases: dict[str, str] = {}
    monkeypatch.setattr(tracking, "set_alias", lambda uri, name, alias, number: aliases.update({alias: number}))
    verdict = Promote(config).run(SITE, Results(version=scored_on("2", "new")))
    assert verdict.version == "2"
    assert scored == ([] if failing else [("models:/m/1", sampling, config.data.uri)])
    assert gate.asked == (["2"] if failing else ["3", "2"])
    assert aliases == ({} if failing else {"candidate": "2"})
    assert verdict.passed is not failing  # what cannot be scored is refused as before
    gate.champion = None
    gate.asked.clear()
    Promote(config).run(SITE, Results(version=scored_on("2", "new")))
    assert gate.asked == ["2"]
