"""What is read of a run: every part that is there, and where one is damaged, all others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

import pytest

from pipelines import tracking
from pipelines.checkpoints import Published
from pipelines.config import compose
from pipelines.evaluation.recorded import evaluation_pictures, find_artifact
from pipelines.report.gather import gather
from pipelines.report.sections import sections
from pipelines.report.subject import ReportSubject
from pipelines.search.study import StudyStore, TrialRecord
from pipelines.storage import Storage, join
from pipelines.tracking import ModelVersion
from pipelines.training.goodput import Attempt, Session
from pipelines.training.ledger import write_session
from tests.pipelines.report.facts import BETTER, SCORES, VERDICT, picture
from tests.pipelines.shards.test_joined import mixed, write_source

RUN = "0123456789abcdef0123456789abcdef"
PNG = picture(7).data


@dataclass
class Recorded:
    """A run whose records lie in memory, under the names that a `Tracker` has."""

    files: dict[str, bytes]
    curves: dict[str, list[tuple[int, float]]]
    tags: dict[str, str] = field(default_factory=dict)
    uri: str = "http://127.0.0.1:9"
    url: str = "http://127.0.0.1:9/#/runs/1"
    run_id: str = RUN

    def tag(self, key):
        return self.tags.get(key)

    def read_file(self, name):
        return self.files[name]

    def read_text(self, name):
        return self.read_file(name).decode()

    def names(self, folder):
        return [name for name in self.files if name.startswith(f"{folder}/")]

    def last_steps(self):
        return {key: points[-1][0] for key, points in self.curves.items()}

    def metric(self, key):
        return self.curves[key]


def grid(key: str, step: int) -> str:
    return f"images/{key}+step+{step}+timestamp+1+0a.png"


@pytest.fixture
def config(tmp_path):
    return compose(["+experiment=digits", "name=first", "storage=file", f"storage.root=file://{tmp_path}"])


@pytest.fixture
def tracker(config):
    published = [
        Published(f"{config.storage.root}/1", 500, "x", {"eval/frechet_distance": 6.0}, deleted=True),
        Published(f"{config.storage.root}/2", 1000, "x", {"eval/frechet_distance": 3.2, "eval/frechet_low": 3.0}),
    ]
    files = {one.name: json.dumps(asdict(one)).encode() for one in published}
    files |= {grid("samples", step): PNG for step in (0, 500, 1000)}
    files |= {grid("evaluation", 1000): PNG, grid("nearest-training-images", 1000): PNG}
    files["evaluation/000000001000-aa.json"] = json.dumps(SCORES.to_plain()).encode()
    files["bound/000000001000-aa.json"] = b'{"timesteps": [1, 2, 2], "bits_per_dim": [2.0, 1.0, 0.1]}'
    files["config.json"] = json.dumps(config.model_dump(mode="json")).encode()
    curves = {"train/loss": [(100, 1.0), (200, 0.9), (200, 0.5)], "updates/lr": [(100, 0.1)]}
    return Recorded(files, curves, {"ddpm.run": "first"})


@pytest.fixture
def read(config, tracker, monkeypatch):
    """The facts of the run, as they are recorded now."""
    storage = Storage()
    attempt = Attempt(5.0, 95.0, 0, 1000, {"step": 70.0})
    write_session(storage, join(config.storage.root, "runs", "first"), 1, Session(0.0, 100.0, (attempt,)))
    champion = ModelVersion("digits", "1", "other", {"scores": json.dumps(BETTER.to_plain())}, ("champion",))
    monkeypatch.setattr(tracking, "version", lambda *_, **__: champion)
    gate = {"gate.champion.table": json.dumps(VERDICT.to_plain())}
    version = ModelVersion("digits", "2", RUN, {"images_seen": "1000", **gate}, ())
    return lambda: gather(ReportSubject("first", tracker, version), config)


def test_the_samples_shown_are_those_of_the_evaluation_whose_scores_are_shown(read, tracker):
    other, own = picture(9), grid("evaluation", 1000)
    beside = {"scale": 7.0, **{k: v for k, v in SCORES.sampling.items() if k != "scale"}}
    name, scores = "evaluation/000000001000-bbbbbbbbcc.json", replace(SCORES, sampling=beside)
    tracker.files[name] = json.dumps(scores.to_plain()).encode()
    tracker.files[grid("evaluation-bbbbbbbb", 1000)] = other.data
    facts = read()  # of the last one, where nothing says which is the checkpoint's own
    assert (facts.scores, facts.samples, facts.nearest) == (scores, other, picture(7))
    assert find_artifact(tracker, scores, 1000) == name
    names = tracker.names("images")
    assert evaluation_pictures(names, "evaluation/000000001000-bbbbbbbbcc.json", 1000)["evaluation"] != own
    assert evaluation_pictures(names, "evaluation/000000001000-aa.json", 1000)["evaluation"] == own
    assert evaluation_pictures(names, None, 1000)["evaluation"] == own
    assert find_artifact(tracker, SCORES, 1000) == "evaluation/000000001000-aa.json"
    assert find_artifact(tracker, SCORES, 500) is None
    tracker.files["evaluation/000000001000-0.json"] = b'{"of": "a newer release"}'
    assert find_artifact(tracker, scores, 1000) == name
    assert read().scores == scores
    del tracker.files[name]
    assert read().samples == picture(7)


def test_of_a_mixture_each_source_is_named_with_its_weights_and_its_losses(read, tracker, config, tmp_path):
    first, second = (write_source(tmp_path / name, ["cat", "dog"], range(8)) for name in "ab")
    data = mixed([("a", first, 2), ("b", second, {0: 1, 1000: 0.5})])
    settings = config.model_dump(mode="json") | {"data": data.model_dump(mode="json")}
    tracker.files["config.json"] = json.dumps(settings).encode()
    tracker.curves["train/loss/a"] = [(100, 0.7)]
    facts = read()
    rows = dict(facts.data)
    assert rows["source a"] == f"{first}, weight 2"
    assert rows["source b"] == f"{second}, weight 1, from sample 1,000 on 0.5"
    assert rows["images"].startswith("16 train")
    assert rows["classes"] == "2: cat, dog"
    assert [(p.x, p.y) for p in facts.curves["train/loss/a"]] == [(100, 0.7)]


def test_every_part_of_a_run_is_read(read):
    facts = read()
    assert (facts.name, facts.version, facts.images_seen) == ("first", "models:/digits/2", 1000)
    assert facts.goodput.fraction == pytest.approx(0.7)
    assert [(p.x, p.y) for p in facts.curves["train/loss"]] == [(100, 1.0), (200, 0.5)]  # a step that came twice
    assert [(p.x, p.y, p.low, p.high) for p in facts.curves["eval/frechet_distance"]] == [
        (500, 6.0, None, None),  # of a checkpoint that is gone by now
        (1000, 3.2, 3.0, None),
    ]
    assert facts.scores == SCORES
    assert facts.champion == ("models:/digits/1", BETTER)
    assert facts.verdicts == (VERDICT,)
    assert [seen for seen, _ in facts.growth] == [0, 500, 1000]
    assert facts.samples == facts.nearest == picture(7)
    assert [p.y for p in facts.bound] == [2.0, 1.0, 0.1]
    assert dict(facts.training)["learning rate"] == "0.002"


@pytest.mark.parametrize("images, said", [(4000, "1,000 of 4,000"), (1000, "1,000"), (600, "1,000")])
def test_a_training_that_went_beyond_its_first_guess_has_no_total(read, tracker, config, images, said):
    tracker.files["config.json"] = json.dumps({**config.model_dump(mode="json"), "images": images}).encode()
    assert dict(read().training)["images seen"] == said


def test_the_studies_of_this_run_and_of_no_other_are_read(read, config):
    for name, run in (("own", RUN), ("others", "f" * 32)):
        store = StudyStore.of(config, name)
        subject = {"subject": json.dumps({"run_id": run})}
        store.storage.write(join(store.uri, "study.json"), json.dumps(subject).encode())
        scores = {"frechet_distance": 5.0, "evaluations": 18.0}
        store.record(TrialRecord("t", {"guidance.scale": 2.0}, "finished", scores))
    assert [tried.source for tried in read().tried if tried.evaluations] == ["study own"]


def test_scores_that_do_not_compare_have_no_champion_beside_them_and_say_why(read, monkeypatch):
    unlike = replace(BETTER, evaluator_digest="another")
    champion = ModelVersion("digits", "1", "other", {"scores": json.dumps(unlike.to_plain())}, ("champion",))
    monkeypatch.setattr(tracking, "version", lambda *_, **__: champion)
    facts = read()
    assert facts.champion is None
    assert facts.champion_note.startswith("models:/digits/1, at the alias champion, was scored with another evaluator")


DAMAGED = {
    "config.json": (b"{", "the run's configuration"),
    "evaluation/000000001000-aa.json": (b"{}", "the scores evaluation/000000001000-aa.json"),
    "bound/000000001000-aa.json": (b"[]", "the terms of the bound"),
    grid("samples", 500): (b"no picture", "the pictures"),
    "checkpoints/000000001000.json": (b"null", "the published checkpoints"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_part_is_named_and_the_others_are_there(name, read, tracker):
    content, what = DAMAGED[name]
    tracker.files[name] = content
    facts = read()
    assert any(note.startswith(f"{what} could not be read: ") for note in facts.notes)
    assert len(sections(facts)) >= 6
    assert facts.goodput is not None
    assert facts.verdicts == (VERDICT,)
