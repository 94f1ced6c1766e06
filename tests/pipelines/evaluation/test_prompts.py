import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from ddpm.generate import Sampling
from ddpm.model import ModelSpec
from pipelines.config import compose
from pipelines.evaluation import data
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.evaluators.matcher import Matcher
from pipelines.evaluation.prompts import PromptRows, Prompts, wilson
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.samples import SamplePlan
from pipelines.shards.captions import Captions
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.pipelines.captioned import WIDTH, captions, embed, write_shapes
from tests.pipelines.checkpoints.tiny import SMALL

ROWS = PromptRows("digest", 10, None)


def some_captions(texts, labels=None):
    cond = embed(texts)
    tokens = tuple(each[mask] for each, mask in zip(cond.text, cond.text_mask, strict=True))
    labels = None if labels is None else torch.tensor(labels)
    return Captions(np.arange(len(texts)), tuple(texts), tokens, cond.pooled, labels)


def spec(text_dim):
    network = replace(SMALL, in_channels=3, out_channels=3, num_classes=0, text_dim=text_dim)
    return ModelSpec(network, {"kind": "cosine", "num_steps": 50}, "v", 8)


def test_samples_are_drawn_from_all_captions_in_turn_in_an_order_of_the_seed():
    rows = ROWS.rows(25, seed=1)
    for turn in (rows[:10], rows[10:20]):
        assert sorted(turn) == list(range(10))
    assert np.array_equal(ROWS.rows(25, 1), rows)
    assert not np.array_equal(ROWS.rows(25, 2), rows)


def test_a_plan_with_prompts_has_their_classes_and_another_folder_for_other_captions():
    plan = SamplePlan("digest", Sampling.of(steps=4), 25, (1, 2), (5, 5), 8, "file:///evaluations")
    labels = (0, 1) * 5
    asked = replace(plan, prompts=replace(ROWS, labels=labels))
    assert asked.labels(1).tolist() == [labels[row] for row in ROWS.rows(25, 1)]
    assert plan.rows(1) is None
    units = asked.units()
    assert [n for unit in units[:4] for n in unit.captions] == ROWS.rows(25, 1).tolist()
    assert [n for unit in units[4:] for n in unit.captions] == ROWS.rows(25, 2).tolist()
    others = [replace(plan, prompts=each) for each in (None, ROWS, replace(ROWS, digest="other"))]
    assert len({each.folder for each in others}) == 3


def judge(accuracy=0.9):
    torch.manual_seed(0)
    return Evaluator(Matcher(3, 8, WIDTH), "captions", "digest", "here", "none", False, accuracy)


def test_the_accuracy_is_the_share_of_samples_whose_own_caption_matches_best(tmp_path):
    found = some_captions([*captions(), *captions()])
    prompts = Prompts(found, found, False, judge())
    plan = SamplePlan("digest", Sampling.of(steps=4), 60, (1,), (), 8, "file:///x", prompts.plan)
    rows, (first, numbers) = plan.rows(1), found.different
    with torch.no_grad():
        vectors = prompts.matcher.encoder.texts(found.pooled[first])[numbers[torch.from_numpy(rows)]]
    right = Rows(tmp_path / "right", (vectors.shape[1],), np.float32)
    right.write(0, vectors.numpy())
    assert prompts.accuracy(right, 0, rows, seed=1).value == 1
    half = vectors.clone()
    half[:30] = F.normalize(-half[:30], dim=1)
    mixed = Rows(tmp_path / "mixed", (vectors.shape[1],), np.float32)
    mixed.write(0, half.numpy())
    share = prompts.accuracy(mixed, 0, rows, seed=1)
    assert share.value == pytest.approx(0.5)
    estimate = prompts.estimate([share])
    assert (estimate.floor, estimate.ceiling) == (0.9, 1 / 6)
    assert estimate.low < 0.5 < estimate.high
    assert prompts.record() | {"captions_digest": "", "evaluator_digest": ""} == {
        "captions": 12,
        "examples": captions()[:4],
        "different": 6,
        "choices": 6,
        "chance": 1 / 6,
        "real_accuracy": 0.9,
        "captions_digest": "",
        "evaluator_digest": "",
    }


def test_the_interval_has_a_width_where_all_are_right_and_holds_what_it_should():
    assert wilson(1.0, 50)[0] == pytest.approx(1 / (1 + 1.959964**2 / 50))
    assert wilson(1.0, 50)[1] == pytest.approx(1)
    assert wilson(0.0, 50)[0] == pytest.approx(0)
    rng = np.random.default_rng(0)
    found = [wilson(share, 40) for share in rng.binomial(40, 0.9, 4000) / 40]
    assert np.mean([low <= 0.9 <= high for low, high in found]) == pytest.approx(0.95, abs=0.02)


@pytest.fixture
def config(tmp_path):
    return compose(
        ["+experiment=digits", "data.num_classes=0", "model.class_conditional=false", f"data.cache_dir={tmp_path}/c"]
    )


def write(folder, encoder, count=60):
    options = {"shard_samples": 32, "test_fraction": 0.3, "image_size": 8, "channels": 3}
    source = write_shapes(folder / "shapes", count)
    return ingest(str(source), f"file://{folder}/data", Storage(), text_encoder=encoder, **options).dataset


def asked(dataset, config, said):
    return EvaluationData(dataset, config, notice=said.append)


@pytest.mark.usefixtures("home")  # whose key signs the matcher
def test_a_model_on_text_is_asked_for_the_captions_of_test_images(tmp_path, config):
    dataset, said = write(tmp_path, embed), []
    found = asked(dataset, config, said).prompts(spec(WIDTH))
    assert set(found.captions.texts) <= set(captions())
    assert len(found.captions) == dataset.samples("test")
    assert found.matcher.kind == "captions"
    assert len(found.held_out) == min(32, dataset.samples("test"))
    again = asked(dataset, config, said).prompts(spec(WIDTH))
    assert again.record() == found.record()
    assert len(said) == 1


@pytest.mark.usefixtures("home")  # whose key signs the evaluators
def test_what_is_sent_to_a_task_has_its_prompts_and_reads_none_again(tmp_path, config, monkeypatch):
    dataset = write(tmp_path, embed)
    opened = asked(dataset, config, [])
    vars(opened).update(evaluator="the evaluator", real="what it says")
    sent = pickle.loads(pickle.dumps(opened.opened(spec(WIDTH))))
    monkeypatch.setattr(data, "open_captions", lambda *of: pytest.fail("captions are read again"))
    assert sent.prompts(spec(WIDTH)).record() == opened.prompts(spec(WIDTH)).record()
    assert (sent.evaluator, sent.real, sent.stream) == ("the evaluator", "what it says", opened.stream)


def test_other_models_and_data_without_fitting_captions_have_no_prompts(tmp_path, config):
    said = []
    assert asked(write(tmp_path / "1", embed), config, said).prompts(spec(0)) is None
    assert said == []
    assert asked(write(tmp_path / "2", None), config, said).prompts(spec(WIDTH)) is None
    assert asked(write(tmp_path / "3", embed), config, said).prompts(spec(8)) is None
    assert "no embeddings of captions: samples are drawn without prompts" in said[0]
    assert "embeddings of 16 numbers, the model takes 8" in said[1]


def test_where_all_captions_are_alike_there_is_nothing_to_tell_apart():
    found = some_captions(["a red circle"] * 3)
    prompts = Prompts(found, found, False, None)
    assert prompts.accuracy(None, 0, np.zeros(3, np.int64), 0) is None
    assert prompts.record()["evaluator_digest"] is None
