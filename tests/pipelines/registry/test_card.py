from dataclasses import replace

import pytest

from ddpm.generate import Sampling
from ddpm.model import ModelSpec
from ddpm.models import UNetConfig
from pipelines import tracking
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.registry.card import LARGEST, MARK, Origin, below_notes, card, describe, parameters
from pipelines.registry.evidence import Evidence
from pipelines.registry.verdict import Verdict, VerdictRow
from pipelines.shards.audit.contents import plain_contents
from pipelines.shards.index import ShardInfo, make_dataset
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion, TrackingError
from tests.pipelines.report.facts import CONTENTS

SAMPLING = Sampling.of(steps=50, scale=2.0)
SPEC = ModelSpec(
    network=UNetConfig(
        in_channels=1, out_channels=1, channels=(32, 64), attention=(False, True), num_classes=3, layers_per_block=1
    ),
    schedule={"kind": "cosine", "num_steps": 1000, "s": 0.008, "beta_start": None},
    prediction="eps",
    image_size=8,
    classes=("zero", "one", "two"),
    sampling=SAMPLING,
)
SCORES = Scores(
    estimates={
        "class_accuracy": Estimate(0.9907, 0.985, 0.996),
        "frechet_distance": Estimate(0.87, 0.65, 1.09, 0.1, floor=2.76, ceiling=52.3),
    },
    n=2000,
    seeds=(1, 2, 3),
    evaluator="classifier",
    evaluator_digest="e" * 64,
    features=64,
    real_accuracy=0.9944,
    dataset_digest="d" * 64,
    stream_digest="s",
    real={"train": 719, "test": 359},
    sampling=SAMPLING.to_json(),
    memorisation={"copies": False, "verdict": "none found: 1.1% of 1,000 samples"},
)
EVIDENCE = Evidence(
    scores=SCORES,
    lineage={
        "run": "digits",
        "images_seen": 76800,
        "dataset_digest": "d" * 64,
        "quarantined": 4,
        "code_version": "1.2.3",
        "git_commit": "abc123",
        "precision": "bf16",
    },
    model_digest="w" * 64,
    dataset_uri="s3://ddpm/datasets/digits",
    files={"model.safetensors": "f" * 64},
    code={"served_model.py": "c" * 64},
    packages={"torch": "2.9.0", "ray": "2.60.0"},
    probe={},
)


def shard(name: str, samples: int) -> ShardInfo:
    return ShardInfo(name, samples, 1, "0")


DATASET = make_dataset(
    EVIDENCE.dataset_uri,
    splits={"train": (shard("a.tar", 719),), "test": (shard("b.tar", 359),)},
    classes=SPEC.classes,
    channels=1,
    image_size=8,
    mean=(0.0,),
    std=(1.0,),
)
SETTINGS = {"batch_size": 128, "objective": {"loss": "mse", "weight": "min_snr"}, "optim": {"lr": 0.002}}
ORIGIN = Origin(
    replace(DATASET, digest="d" * 64),
    SETTINGS,
    "#/experiments/1/runs/r",
    {"evaluation": "get-artifact?run_uuid=r&path=images/e.png"},
)
VERDICT = Verdict(
    True,
    "better: 0.87 against 1.90",
    "digits",
    "champion",
    "2",
    "w" * 64,
    "1",
    "v" * 64,
    attempt=2,
    n=5000,
    rows=(VerdictRow("Frechet distance", "0.87", "< 1.90", True), VerdictRow("copies", "12 %", "at most 2 %", False)),
    at="2026-11-26T03:00:00+00:00",
)


def text_of(evidence=EVIDENCE, spec=SPEC, verdict=VERDICT, origin=ORIGIN) -> str:
    return card("models:/digits/2", evidence, spec, verdict, origin)


@pytest.mark.parametrize(
    "line",
    [
        f"Draws 8x8 grey images of 3 classes: a denoising diffusion model (unet, {parameters(SPEC):,} parameters) of "
        "the run [`digits`](#/experiments/1/runs/r), after 76,800 images.",
        "![evaluation](get-artifact?run_uuid=r&path=images/e.png)",
        "| class accuracy | &emsp;0.9907 (0.985 to 0.996) | &emsp;0.9944 |  |",
        "| Frechet distance to the train split | &emsp;0.87 (0.65 to 1.09) | &emsp;2.76 | &emsp;52.3 |",
        "Of 3 x 2,000 samples (noise seeds 1, 2, 3), judged by the classifier against 719 train and 359 test images. "
        "The evaluator is `eeeeeeeeeeee`.",
        "Copies of training images: none found: 1.1% of 1,000 samples.",
        "Alias champion, version 2, 2026-11-26 03:00:00 UTC: passed: better: 0.87 against 1.90; compared with version "
        "1 on 5,000 samples of each, attempt 2.",
        "| yes | &emsp;Frechet distance | &emsp;0.87 | &emsp;&lt; 1.90 |",
        "| NO | &emsp;copies | &emsp;12 % | &emsp;at most 2 % |",
        "- The evaluator names the class of 99.44% of real test images: a class accuracy near or above that tells no "
        "more.",
        "ddpm sample models:/digits/2 --labels 0,1 --out samples",
        "ddpm verify models:/digits/2",
        "model = mlflow.pyfunc.load_model('models:/digits/2')",
        "- data: `s3://ddpm/datasets/digits`",
        f"- digest: `{'d' * 12}`",
        "- images: 719 train, 359 test",
        "- left out by quarantine: 4",
        "- classes: zero, one, two",
        "- images seen: 76,800",
        "- schedule: cosine (num_steps 1000, s 0.008)",
        "- prediction: eps",
        "- batch_size: 128",
        "- objective.weight: min_snr",
        "- optim.lr: 0.002",
        "- precision: bf16",
        "- code: 1.2.3, commit `abc123`",
        "- packages: ray 2.60.0, torch 2.9.0",
        '`kind "ddim", guidance "classifier_free", scale 2.0, interval [0.0, 1.0], rescale 0.0, steps 50, spacing '
        '"trailing", eta 0.0, clip 1.0, clip_when "after_guidance", precision "fp32", compile false`',
    ],
)
def test_the_card_tells(line):
    assert line in text_of().splitlines()


def test_scores_stand_in_their_usual_order_whatever_order_they_were_stored_in():
    text = text_of()
    assert text.index("Frechet distance to the train split") < text.index("| class accuracy")


def test_a_model_that_copies_its_training_images_says_so_first():
    copies = {"copies": True, "verdict": "COPIES of training images: 12% of 1,000 samples"}
    evidence = replace(EVIDENCE, scores=replace(SCORES, memorisation=copies))
    assert text_of(evidence).startswith("**COPIES of training images: 12% of 1,000 samples**")


def test_limits_follow_from_the_scores():
    few = text_of(replace(EVIDENCE, scores=replace(SCORES, n=359)))
    assert "359 samples are few for 64 features" in few
    assert "few for" not in text_of()
    only_distance = {"frechet_distance": Estimate(0.87)}
    unlabelled = replace(SCORES, estimates=only_distance, real_accuracy=None, memorisation=None)
    text = text_of(replace(EVIDENCE, scores=unlabelled))
    assert "It was judged without labels" in text
    assert "was not looked at: there were too few images" in text
    assert "The scores have no intervals" in text
    assert "| Frechet distance to the train split | &emsp;0.87 |  |  |" in text


def test_a_model_without_classes_is_used_without_labels():
    spec = replace(SPEC, classes=(), network=replace(SPEC.network, num_classes=0))
    text = text_of(spec=spec)
    assert "--labels" not in text
    assert 'pandas.DataFrame({"label": [0] * 2})' in text
    assert "- classes: none" in text


def test_what_is_gone_is_left_out_and_what_has_changed_is_said():
    bare = text_of(verdict=None, origin=Origin())
    assert "### The gate" not in bare
    assert "![" not in bare
    assert "- images:" not in bare
    assert "batch_size" not in bare
    assert "(there now, which is other data)" in text_of(origin=replace(ORIGIN, dataset=DATASET))
    elsewhere = EVIDENCE.lineage | {"dataset_digest": "other", "dataset_uri": "s3://a/b"}
    assert "- trained on other data: `s3://a/b`" in text_of(replace(EVIDENCE, lineage=elsewhere))


def test_a_model_of_a_mixture_names_its_sources_with_weights_and_digests():
    sources = [
        {"name": "birds", "uri": "s3://b/birds", "stream_digest": "7" * 64, "weights": {"0": 3.0, "1000000": 0.5}},
        {"name": "web", "uri": "s3://b/web", "stream_digest": "8" * 64, "weights": {"0": 1.0}},
    ]
    mixed = EVIDENCE.lineage | {"dataset_digest": "of the mixture", "sources": sources}
    evidence = replace(EVIDENCE, lineage=mixed)
    lines = text_of(evidence).splitlines()
    birds = "- trained on source birds (weight 3, from sample 1,000,000 on 0.5): `s3://b/birds`, digest `777777777777`"
    assert birds in lines
    assert "- trained on source web (weight 1): `s3://b/web`, digest `888888888888`" in lines
    assert not any("other data" in line for line in lines)
    assert "sources" not in evidence.tags()  # a tag may be no longer than the server's limit


def test_the_card_has_the_summary_of_the_training_data():
    about = plain_contents([CONTENTS, replace(CONTENTS, name="web", licences={}, changed=True)])
    lines = text_of(replace(EVIDENCE, training_data=about)).splitlines()
    for line in (
        "- images: 1,438 train, 359 test",
        "- images of each class: zero 800, one 600",
        "- without a class: 38",
        "- with a caption: 12",
        "- licences: CC0 700; 738 say none",
        "- from 1 host: a.example 5",
        "- copies of another file: 2; 3 pairs are nearly the same",
        "- left out by quarantine: decode 4",
        "- erased: 1",
        "- licences of web: their metadata say none",
        "- images of web: 1,438 train, 359 test (as it is now: the dataset has changed since)",
    ):
        assert line in lines, line


def test_a_model_that_was_tuned_from_another_one_names_it():
    tuned = EVIDENCE.lineage | {"init_from": "models:/digits/3", "init_from_digest": "9" * 64}
    text = text_of(replace(EVIDENCE, lineage=tuned))
    assert " images from the weights of `models:/digits/3`." in text.splitlines()[0]
    assert f"- started from: `models:/digits/3`, weights `{'9' * 12}`" in text
    assert "started from" not in text_of()


def test_names_of_classes_are_text_and_not_markup():
    spec = replace(SPEC, classes=("<script>", "a|b", "[x](http://evil)\n# y"))
    text = text_of(spec=spec)
    assert r"- classes: &lt;script\>, a\|b, \[x\](http://evil) \# y" in text


def test_a_card_that_is_too_long_for_mlflows_database_loses_its_last_sections():
    whole = text_of()
    assert len(whole) < LARGEST
    last = "More is in `evidence.json` and `model.json` among the artifacts of the version."
    assert last not in whole
    for room in range(600, len(whole), 100):
        short = card("models:/digits/2", EVIDENCE, SPEC, VERDICT, ORIGIN, room)
        assert len(short) <= room
        assert whole.startswith(short.removesuffix(last).rstrip())
        assert short.endswith(last)
    assert "### Scores" in card("models:/digits/2", EVIDENCE, SPEC, VERDICT, ORIGIN, 2000)


def test_what_a_person_wrote_above_the_card_stays():
    first = below_notes("", "card 1")
    assert first == f"{MARK}\n\ncard 1"
    edited = f"Ours.\n\n{first}"
    assert below_notes(edited, "card 2") == f"Ours.\n\n{MARK}\n\ncard 2"
    stored = (
        "Ours.\n\n<!-- model card: written by ddpm, anew with each verdict; a text above this line stays -->\n\ncard 1"
    )
    assert below_notes(stored, "card 2") == f"Ours.\n\n{MARK}\n\ncard 2"  # as earlier releases have written it
    assert below_notes("by hand", "card 1") == f"by hand\n\n{MARK}\n\ncard 1"


def test_the_card_is_written_though_its_data_and_its_run_are_gone(monkeypatch, tmp_path):
    written = {}

    def gone(uri, call, patience_s=0):
        raise TrackingError("no run r")

    monkeypatch.setattr("pipelines.tracking.run.ask", gone)
    monkeypatch.setattr(tracking, "version_description", lambda *version: "mine")
    monkeypatch.setattr(tracking, "describe_version", lambda uri, *version: written.update([(version[:2], version[2])]))
    evidence = replace(EVIDENCE, dataset_uri=f"file://{tmp_path}/nowhere")
    describe("", ModelVersion("digits", "2", "r", {}, ()), evidence, SPEC, None, Storage())
    assert written[("digits", "2")].startswith(f"mine\n\n{MARK}\n\nDraws 8x8 grey images")


def test_a_long_text_above_the_card_leaves_it_less_room(monkeypatch, tmp_path):
    written = {}
    monkeypatch.setattr("pipelines.registry.card.read_origin", lambda *version: ORIGIN)
    monkeypatch.setattr(tracking, "version_description", lambda *version: "m" * 3000)
    monkeypatch.setattr(tracking, "describe_version", lambda uri, *version: written.update([(version[:2], version[2])]))
    describe("", ModelVersion("digits", "2", "r", {}, ()), EVIDENCE, SPEC, VERDICT, Storage())
    assert len(written[("digits", "2")]) <= LARGEST
    assert "Draws 8x8 grey images" in written[("digits", "2")]


def test_a_server_that_refuses_a_description_fails_nothing(monkeypatch, tmp_path, caplog):
    def refuse(uri, call, patience_s=0):
        raise TrackingError("too long")

    monkeypatch.setattr("pipelines.tracking.run.ask", refuse)
    monkeypatch.setattr("pipelines.tracking.model_registry.ask", refuse)
    evidence = replace(EVIDENCE, dataset_uri=f"file://{tmp_path}/nowhere")
    describe("", ModelVersion("digits", "2", "r", {}, ()), evidence, SPEC, None, Storage())
    assert "failed at the model card of models:/digits/2" in caplog.text


def test_the_newest_picture_of_each_key_at_a_number_of_images_is_found():
    names = [
        "images/evaluation+step+6400+timestamp+2+b.png",
        "images/evaluation+step+6400+timestamp+3+a.png",
        "images/evaluation+step+6400+timestamp+3+a.webp",
        "images/evaluation+step+12800+timestamp+4+c.png",
        "images/samples+step+6400+timestamp+1+d.png",
        "images/other.png",
    ]
    assert tracking.pictures_at(names, 6400) == {"evaluation": names[1], "samples": names[4]}


def test_the_card_of_a_model_on_text_says_how_prompts_were_judged_and_shows_one():
    network = replace(SPEC.network, num_classes=0, text_dim=4)
    asked = {"captions": 40, "examples": ['a "red" `circle`'], "different": 12, "choices": 10, "chance": 0.1}
    estimates = {name: score for name, score in SCORES.estimates.items() if name != "class_accuracy"}
    estimates["prompt_accuracy"] = Estimate(0.93, 0.9, 0.96, floor=0.97, ceiling=0.1)
    scores = replace(SCORES, estimates=estimates, prompts={**asked, "real_accuracy": 0.97}, real_accuracy=None)
    spec = replace(SPEC, network=network, classes=())
    text = card("models:/shapes/1", replace(EVIDENCE, scores=scores), spec, None, Origin())
    assert "| prompt accuracy | &emsp;0.93 (0.9 to 0.96) | &emsp;0.97 | &emsp;0.1 |" in text
    assert "drawn from 40 captions of test images; each has to match its own best of 10 different ones, which" in text
    assert "judged without labels" not in text
    assert 'ddpm sample models:/shapes/1 --prompts "a red circle" --out samples' in text
    assert "grey images by prompts" in text
