"""Which evaluator a configuration and a dataset get, and what cannot work is said before anything starts."""

from dataclasses import replace

import pytest
import ray
import torch

from pipelines.evaluation.evaluators import check_evaluator, evaluator_kind, open_evaluator
from pipelines.evaluation.evaluators.train import Training
from pipelines.presentation.errors import ConfigError
from tests.pipelines.evaluation.evaluators.test_stored import trained


def test_labels_decide_where_nothing_else_does(labelled, unlabelled, config):
    assert evaluator_kind(config(), labelled) == "classifier"
    assert evaluator_kind(config(), unlabelled) == "contrastive"
    assert evaluator_kind(config("evaluation.evaluator=contrastive"), labelled) == "contrastive"


@pytest.mark.parametrize("classes", [True, False])
def test_what_works_is_let_through(labelled, unlabelled, config, classes):
    check_evaluator(config(), labelled if classes else unlabelled)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["task=classifier", "objective=simple"], "task=classifier trains a network that draws no samples"),
        (["evaluation.weights=/nowhere/w.pth"], "weights = /nowhere/w.pth has no use for the evaluator 'classifier'"),
        (["evaluation.evaluator=inception"], "never downloaded: get https://.*evaluation.weights=PATH"),
        (
            ["evaluation.evaluator=inception", "evaluation.weights=/nowhere/w.pth"],
            "/nowhere/w.pth: there is no such file",
        ),
        (["evaluation.evaluator=encoder"], "needs evaluation.weights=PATH"),
        (["evaluation.evaluator=encoder", "evaluation.weights=/nowhere/w.pt"], "/nowhere/w.pt: there is no such file"),
    ],
)
def test_what_cannot_work_is_an_error_that_says_what_to_do(labelled, config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_evaluator(config(*overrides), labelled)


def test_a_dataset_without_a_test_split_is_refused(labelled, config):
    alone = replace(labelled, splits={"train": labelled.splits["train"]})
    with pytest.raises(ConfigError, match=r"no split 'test' of two images or more.*data\.test_fraction"):
        check_evaluator(config(), alone)


def test_a_classifier_of_data_without_labels_is_refused(unlabelled, config):
    with pytest.raises(ConfigError, match=r"has none: use evaluation\.evaluator=contrastive"):
        check_evaluator(config("evaluation.evaluator=classifier"), unlabelled)


@pytest.mark.parametrize("wrong", [["encoder_mean=[0.5]"], ["encoder_mean=[0.5,0.5]", "encoder_std=[0.5,0.5]"]])
def test_mean_and_deviation_fit_together(config, wrong):
    with pytest.raises(ConfigError, match="one value each, for grey images, or three"):
        config(*[f"evaluation.{line}" for line in wrong])


@pytest.mark.parametrize("classes", [True, False])
def test_it_is_trained_once_and_then_found(labelled, unlabelled, config, classes, monkeypatch):
    dataset, trainings, notices, connected = labelled if classes else unlabelled, [], [], []

    def train(training):
        trainings.append(training.kind)
        return trained(dataset, 0, training.kind)

    monkeypatch.setattr(Training, "__call__", train)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    first, second = (
        open_evaluator(config(), dataset, notices.append, connect=lambda: connected.append(1)) for _ in range(2)
    )
    assert trainings == ["classifier" if classes else "contrastive"]
    assert first.digest == second.digest
    assert (first.labels, first.kind) == (classes, trainings[0])
    assert len(notices) == len(connected) == 1
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert torch.equal(first.encoder(images).features, second.encoder(images).features)
