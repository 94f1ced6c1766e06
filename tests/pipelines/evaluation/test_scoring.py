import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec
from pipelines import tracking
from pipelines.checkpoints import Published, lookup, references
from pipelines.checkpoints.references import Resolved
from pipelines.config import compose, sampling
from pipelines.evaluation import data, scoring
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.recorded import Scored, recorded
from pipelines.evaluation.scoring import find_scores, score, score_and_record
from pipelines.presentation.progress import Silent
from pipelines.shards.index import Dataset, DatasetError
from pipelines.signing import Authority, Signer, seal
from pipelines.storage import layout
from tests.pipelines.checkpoints.tiny import SMALL
from tests.pipelines.registry.version import scores

pytestmark = pytest.mark.usefixtures("home")  # whose key signs

CLASSES = tuple("0123456789")
DATA = Dataset("file:///data", {"train": (), "test": ()}, CLASSES, 1, 8, (0.0,), (1.0,), "d")
SPEC = ModelSpec(SMALL, {"kind": "cosine", "num_steps": 20}, "v", 8, CLASSES)


def fits(spec, dataset):
    return EvaluationData(dataset, compose(["+experiment=digits"])).check(spec)


def test_data_of_the_models_shape_and_classes_fit():
    fits(SPEC, DATA)
    fits(replace(SPEC, classes=()), DATA)
    fits(SPEC, replace(DATA, classes=()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 16}, r"images of shape \(1, 16, 16\) and the model draws \(1, 8, 8\)"),
        ({"channels": 3}, r"images of shape \(3, 8, 8\)"),
        ({"classes": CLASSES[:7]}, "it has 7 classes and the model 10"),
        ({"classes": ("cat", *CLASSES[1:])}, "class 0 is 'cat' there and '0' in the model"),
    ],
)
def test_other_data_is_refused_by_what_differs(change, message):
    with pytest.raises(DatasetError, match=message):
        fits(SPEC, replace(DATA, **change))


MIXED = replace(SPEC, classes=(*CLASSES, "ten"), lineage={"sources": [{"name": "a"}]})


def test_a_model_of_a_mixture_fits_the_dataset_that_judges_it_whose_classes_come_first():
    fits(MIXED, DATA)
    with pytest.raises(DatasetError, match="it has 10 classes and the model 11"):
        fits(replace(MIXED, lineage={}), DATA)
    with pytest.raises(DatasetError, match="class 0 is 'cat' there and '0' in the model"):
        fits(MIXED, replace(DATA, classes=("cat", *CLASSES[1:])))


class Recorded:
    """A run that has whatever signed scores it is asked for, and remembers what that was."""

    uri, run_id = "u", "r"

    def __init__(self, there: bool = True, **changed: str) -> None:
        self.asked: list[str] = []
        self.there, self.changed = there, changed

    def names(self, folder):
        return Names(self, folder) if self.there and folder not in self.changed else []

    def read_text(self, name):
        text = json.dumps(scores().to_plain())
        if name.startswith("evaluation/"):
            return self.changed.get("text", text)
        place = self.changed.get("place", name.replace("signatures/", "evaluation/"))
        signer = Signer.of(compose(["+experiment=digits"]).registry)
        return seal({"sha256": hashlib.sha256(text.encode()).hexdigest()}, place, signer).decode()


class Names:
    """All names of a folder, each of which its run remembers."""

    def __init__(self, run: Recorded, folder: str) -> None:
        self.run, self.folder = run, folder

    def __contains__(self, name):
        if self.folder == "evaluation":
            self.run.asked.append(name)
        return True


@pytest.fixture
def judged(home, monkeypatch, tmp_path):
    """The data and the evaluator of a model, which is loaded where a test asks for more than a look."""
    evaluator = SimpleNamespace(digest="e", kind="classifier")
    monkeypatch.setattr(data, "read_dataset", lambda uri, storage: replace(DATA, uri=f"file://{tmp_path}"))
    monkeypatch.setattr(data, "open_evaluator", lambda *arguments, **options: evaluator)
    return evaluator


SETTINGS = [
    (),
    ("sampler.steps=9",),
    ("evaluation.seeds=5",),
    ("evaluation.likelihood_images=7",),
    ("evaluation.n=64",),
]


def test_scores_are_found_without_a_model_where_an_evaluation_would_have_found_them(judged):
    spec = replace(SPEC, lineage={"images_seen": 640})
    resolved = Resolved("x", Model(spec, torch.nn.Identity()), published=Published("u", 640, "digest"))
    asked = []
    for overrides in SETTINGS:
        config, looked, run = compose(["+experiment=digits", *overrides]), Recorded(), Recorded()
        settings = Sampling.of(steps=config.sampler.steps)
        found = find_scores(looked, spec, "digest", settings, config)
        tracked = replace(resolved, tracker=run)
        authority = Authority.of(config.registry)
        scored = score(tracked, settings, EvaluationData.of("", config), Silent(), authority)
        assert (found, scored.fresh) == (scored.scores, False)
        assert looked.asked == run.asked == [scored.artifact]
        asked += looked.asked
    assert len(set(asked)) == len(SETTINGS)


def test_there_are_no_scores_where_the_run_has_none_or_the_evaluator_is_not_trained(judged, monkeypatch):
    config, settings, run = compose(["+experiment=digits"]), Sampling.of(steps=9), Recorded(there=False)
    assert find_scores(run, SPEC, "digest", settings, config) is None
    assert run.asked == []

    def untrained(*arguments, connect):
        connect()

    monkeypatch.setattr(data, "open_evaluator", untrained)
    assert find_scores(Recorded(), SPEC, "digest", settings, config) is None


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"text": json.dumps(scores().to_plain()).replace("0.9", "0.99")}, "changed after they were signed"),
        ({"signatures": "gone"}, "they are not signed"),
        ({"place": "evaluation/000000000640-of-another-model.json"}, "it is a copy of evaluation/000000000640-of-an"),
    ],
)
def test_scores_that_nobody_who_is_trusted_has_signed_are_named_and_not_used(judged, monkeypatch, changed, reason):
    config, settings, said = compose(["+experiment=digits"]), Sampling.of(steps=9), []
    spec = replace(SPEC, lineage={"images_seen": 640})
    assert find_scores(Recorded(**changed), spec, "digest", settings, config) is None

    class AgainError(Exception):
        """The model is scored."""

    def again(*arguments, **options):
        raise AgainError

    monkeypatch.setattr(data, "open_real", again)
    display = SimpleNamespace(stage=lambda stage, text: said.append(text), counter=lambda *of: None)
    resolved = Resolved("x", Model(spec, torch.nn.Identity()), Recorded(**changed), Published("u", 640, "digest"))
    with pytest.raises(AgainError):
        score(resolved, settings, EvaluationData.of("", config), display, Authority.of(config.registry))
    assert "scored again: the scores that the run has, evaluation/000000000640-" in said[0]
    assert reason in said[0]


def test_scores_of_a_model_are_those_of_the_networks_that_guide_it_too(judged, monkeypatch):
    """The weaker model is named by the same reference, and has other weights."""
    config, settings = compose(["+experiment=digits"]), Sampling.of(guidance="auto", weak="weak", scale=2.0)
    spec, asked = replace(SPEC, lineage={"images_seen": 640}), []
    for bias in (0.0, 0.0, 1.0):
        weak = Model(SPEC, torch.nn.Linear(1, 1))
        torch.nn.init.constant_(weak.network.bias, bias)
        torch.nn.init.zeros_(weak.network.weight)
        monkeypatch.setattr(references, "guided", lambda model, *of, weak=weak: replace(model, weak=weak))
        run = Recorded()
        find_scores(run, spec, "digest", settings, config)
        asked += run.asked
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize(
    "overrides, other, compares",
    [
        ([], None, True),
        (["evaluation.likelihood_images=0", "evaluation.batch_size=7"], None, True),
        (["evaluation.n=64"], None, False),
        (["evaluation.seeds=1"], None, False),
        (["evaluation.evaluator=contrastive"], None, False),
        ([], "file:///other", False),
        (["sampler.steps=7"], None, False),
    ],
)
def test_only_scores_that_compare_with_its_runs_go_into_the_record_of_a_checkpoint(
    judged, monkeypatch, overrides, other, compares
):
    trained, config = compose(["+experiment=digits"]), compose(["+experiment=digits", *overrides])
    run = SimpleNamespace(names=lambda: [layout.CONFIG], read_text=lambda name: tracking.to_json(trained.model_dump()))
    spec = replace(SPEC, sampling=sampling(trained))
    resolved = Resolved("x", Model(spec, torch.nn.Identity()), tracker=run, published=Published("u", 640, "digest"))
    said = watched(monkeypatch)
    score_and_record(resolved, sampling(config), config, Silent(), lambda: None, other)
    assert said == ([("its logged model", True, True), 640] if compares else [(None, False, True)])


@pytest.mark.parametrize(("judge", "own"), [(scores().stream_digest, True), ("another", False)])
def test_the_own_scores_of_a_model_of_a_mixture_are_those_by_the_dataset_that_judges_it(
    judged, monkeypatch, judge, own
):
    config = compose(["+experiment=digits"])
    run = SimpleNamespace(names=lambda: [layout.CONFIG], read_text=lambda name: tracking.to_json(config.model_dump()))
    lineage = {"stream_digest": "of the mixture", "reference_digest": judge}
    spec = replace(SPEC, sampling=sampling(config), lineage=lineage)
    resolved = Resolved("x", Model(spec, torch.nn.Identity()), tracker=run, published=Published("u", 640, "digest"))
    said = watched(monkeypatch)
    score_and_record(resolved, sampling(config), config, Silent(), lambda: None)
    assert (said[0][1], len(said)) == ((True, 2) if own else (False, 1))


def watched(monkeypatch, *, fresh: bool = True) -> list[object]:
    """Give scores, fresh or not, to whoever asks for an evaluation; return what becomes known of how they are recorded.

    That is (logged model, own, shown) of a record in the run, and the images seen by a checkpoint that gets them.
    """
    said: list[object] = []
    scored = SimpleNamespace(fresh=fresh, scores=scores(), images_seen=640)
    scored.record = lambda tracker, model, signer, own=True, shown=True: said.append((model, own, shown))
    monkeypatch.setattr(scoring, "score", lambda *arguments: scored)
    monkeypatch.setattr(tracking, "checkpoint_models", lambda tracker: {640: "its logged model"})
    monkeypatch.setattr(scoring, "record_scores", lambda tracker, images, metrics: said.append(images))
    return said


def of_run(monkeypatch, published: Published | None, others: Sequence[Published] = (), **lineage: str) -> Resolved:
    """Return a model of a run that scores it as the configuration says."""
    monkeypatch.setattr(lookup, "scored_alike", lambda *arguments: True)
    monkeypatch.setattr(scoring, "list_published", lambda tracker, deleted: list(others))
    spec = replace(SPEC, sampling=sampling(compose(["+experiment=digits"])), lineage=lineage)
    return Resolved("x", Model(spec, torch.nn.Identity()), tracker=SimpleNamespace(), published=published)


def recorded_of(resolved: Resolved, *overrides: str) -> None:
    config = compose(["+experiment=digits", *overrides])
    score_and_record(resolved, sampling(config), config, Silent(), lambda: None)


def test_scores_that_are_there_go_into_the_record_of_a_checkpoint_that_has_them_not(judged, monkeypatch):
    said, published = watched(monkeypatch, fresh=False), Published("u", 640, "digest")
    recorded_of(of_run(monkeypatch, replace(published, scores=scores().metrics())))
    assert said == []
    recorded_of(of_run(monkeypatch, published))
    assert said == [("its logged model", True, True), 640]
    said.clear()
    recorded_of(of_run(monkeypatch, published), "sampler.steps=7")
    assert said == []


def test_scores_on_data_that_were_quarantined_since_do_not_take_the_place_of_a_checkpoints_own(judged, monkeypatch):
    said, published = watched(monkeypatch), Published("u", 640, "digest", scores().metrics())
    recorded_of(of_run(monkeypatch, published, stream_digest="another"))
    assert said == [(None, False, False)]


def test_the_curves_of_a_run_keep_its_own_scores_where_another_evaluation_has_the_same_images(judged, monkeypatch):
    said, published = watched(monkeypatch), Published("u", 640, "digest")
    own = replace(published, scores=scores().metrics())
    for of, others in ((own, []), (None, [own]), (None, [published])):
        recorded_of(of_run(monkeypatch, of, others), "sampler.steps=7")
    assert said == [(None, False, False), (None, False, False), (None, False, True)]


@pytest.mark.parametrize("shown", [True, False])
def test_curves_and_score_line_get_only_scores_that_are_shown(monkeypatch, shown):
    written = []
    run = SimpleNamespace(metrics=lambda *given: written.append("curves"), text=lambda text, name: written.append(name))
    monkeypatch.setattr(tracking, "describe", lambda tracker, parts: written.append("line"))
    scored = Scored(scores(), "evaluation/000000000640-0123abcd4567.json", 640, ("d", "e"), {}, None, 1)
    scored.record(run, None, None, own=False, shown=shown)
    assert written == (["curves", scored.artifact, "line"] if shown else [scored.artifact])


def test_scores_are_believed_as_they_were_recorded(home):
    written: dict[str, str] = {}
    run = SimpleNamespace(
        text=lambda text, name: written.update({name: text}),
        names=lambda folder: [name for name in written if name.startswith(folder)],
        read_text=written.get,
    )
    authority = Authority.of(compose(["+experiment=digits"]).registry)
    scored = Scored(scores(), "evaluation/000000000640-0123abcd4567.json", 640, ("d", "e"), {}, None, 1)
    scored.record(run, None, authority, own=False, shown=False)
    assert list(written) == [scored.artifact.replace("evaluation", "signatures"), scored.artifact]
    assert recorded(run, scored.artifact, authority.trust) == scored.scores


@pytest.mark.parametrize("own, key", [(True, "evaluation"), (False, "evaluation-0123abcd")])
def test_pictures_of_another_evaluation_have_keys_of_their_own(monkeypatch, own, key):
    drawn = []
    run = SimpleNamespace(
        metrics=lambda *given: None,
        text=lambda *given: None,
        has_picture=lambda *given: False,
        image=lambda key, picture, step: drawn.append((key, step)),
    )
    monkeypatch.setattr(tracking, "describe", lambda tracker, parts: None)
    artifact = "evaluation/000000000640-0123abcd4567.json"
    scored = Scored(scores(), artifact, 640, ("d", "e"), {"evaluation": np.zeros((2, 2, 3), np.uint8)}, None, 1)
    scored.record(run, None, None, own=own)
    assert drawn == [(key, 640)]
