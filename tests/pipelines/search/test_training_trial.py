from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import ConfigError, compose
from pipelines.presentation.progress import no_stage_notice
from pipelines.search.study import trials_seed
from pipelines.search.training_search import TrainingSearch
from pipelines.search.training_trial import rungs, trial_config
from tests.pipelines.evaluation.test_prompts import some_captions
from tests.pipelines.search.test_training_search import study

BASE = compose(["+experiment=digits", "storage=file", "storage.root=file:///nowhere"])


@given(st.integers(1, 10_000_000), st.integers(1, 512), st.integers(1, 6), st.integers(2, 5))
def test_rungs_are_whole_batches_that_end_where_the_run_does(images, batch_size, count, reduction):
    chosen = study(rungs=count, reduction=reduction)
    if count > 1 and images // reduction ** (count - 1) < batch_size:
        with pytest.raises(ConfigError, match=r"before the first batch"):
            rungs(images, batch_size, chosen)
        return
    found = rungs(images, batch_size, chosen)
    assert len(found) == count
    assert list(found) == sorted(set(found)) or images < 2 * batch_size
    assert all(rung % batch_size == 0 for rung in found)
    assert images <= found[-1] < images + batch_size


def test_a_trial_is_scored_at_its_rungs_alone_whatever_the_base_asks_of_a_run():
    base = compose(["+experiment=digits", "evaluation.every=640", "checkpoint.keep_best=1"])
    config = trial_config(study(), base, "s", {})
    assert (config.evaluation.every, config.checkpoint.keep_best) == (None, None)
    assert config.evaluation.seed == base.evaluation.seed


def test_trials_on_text_are_judged_by_the_captions_of_test_images():
    train = SimpleNamespace(class_counts=(2, 3), moments=None)
    real = SimpleNamespace(train=train, test=SimpleNamespace(count=5))
    drawn = some_captions([f"a {i}" for i in range(6)], labels=[1, 0, 0, 1, 1, 0])
    held = some_captions([f"b {i}" for i in range(5)], labels=[0, 1, 0, 1, 0]).condition(torch.arange(5), labels=True)
    images = torch.zeros(5, 1, 1, 1)
    search = TrainingSearch(BASE, "s", study(samples=4, bits_per_dim_images=2), no_stage_notice, {})
    search.data = SimpleNamespace(real=real, evaluator=SimpleNamespace(encoder=None))
    search.captions, search.held_out = drawn, (images, held)
    judge = search.judge()
    order = drawn.shuffled(trials_seed(BASE, "s"))
    assert torch.equal(judge.cond.pooled, order.pooled[:4])
    assert torch.equal(judge.cond.label, order.labels[:4])
    judging, of_them = judge.held_out
    assert torch.equal(of_them.pooled, held.pooled[:2])
    assert (of_them.label.tolist(), len(judging)) == ([0, 1], 2)
    labels = replace(held, text=None, text_mask=None, pooled=None)
    search.captions, search.held_out = None, (images, labels)
    without = search.judge()
    assert (without.cond.present, without.cond.label.bincount().tolist()) == (("label",), [2, 3])
    assert without.held_out[1].present == ("label",)
