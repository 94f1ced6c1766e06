"""Every shipped experiment trains as far as a test can tell, and docs/experiments.md says what it is and takes."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines.config import compose, groups
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.speed import made_up, made_up_job
from pipelines.training.loop.state import make_state
from pipelines.training.loop.train import step
from pipelines.training.memory import Placement, estimate
from tests.allocated import allocated
from tests.docs.modules import load

experiments = load("experiments")
NAMES = groups()["experiment"]
CPU = torch.device("cpu")
SMALL = {"digits", "digits_inpainting"}
"""Those whose step is tried by the unit tests too: all together take ten seconds of a core, and some of them more."""
STEPS = [pytest.param(name, marks=[] if name in SMALL else pytest.mark.heavy) for name in NAMES]


@pytest.mark.parametrize("name", STEPS)
def test_an_experiment_makes_an_optimizer_step_or_one_forward_pass_without_numbers(name):
    config = experiments.composed(name)
    if not experiments.takes_a_step(experiments.count(config)):
        size = config.data.image_size
        images = torch.empty(2, config.data.channels, size, size, device="meta")
        output = experiments.build(config)(images, torch.zeros(2, device="meta"))
        assert output.shape == (2, config.data.channels * (2 if config.model.learned_variance else 1), size, size)
        return
    few = ["batch_size=2", "data.lanes=1", "cluster=local", "cluster.num_workers=1", "optim.warmup_images=0"]
    config = compose([f"+experiment={name}", *experiments.NEEDED.get(name, []), *few])
    context = RunContext.of(made_up_job(config), rank=0, world_size=1, device=CPU)
    state = make_state(context.config, context.device, context.precision)
    before = {key: value.clone() for key, value in state.network.state_dict().items()}
    result = step(context, state, made_up(config))
    assert result.updated
    assert math.isfinite(result.loss)
    assert any(not torch.equal(before[key], value) for key, value in state.network.state_dict().items())


NARROW = ["model.width=192", "model.depth=4", "model.heads=6", "data.lanes=1", "cluster=local", "cluster.num_workers=1"]
TRANSFORMERS = ["imagenet256", "imagenet256_large", "imagenet64_flow", "photos128"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_narrow_transformer_takes_ten_steps_of_an_experiment_in_the_memory_that_is_estimated(name):
    tokens = [] if name == "imagenet64_flow" else ["model.class_tokens_from=1"]
    of_batch = ["batch_size=8", "micro_batch_size=8", "optim.precision=fp32", "optim.warmup_images=0"]
    needed = experiments.NEEDED.get(name, [])
    config = compose([f"+experiment={name}", *needed, *NARROW, *tokens, *of_batch, "data.num_classes=10"])
    found = allocated(config, steps=10)
    assert len(found.losses) == 10
    assert all(math.isfinite(loss) for loss in found.losses)
    assert found.most == pytest.approx(sum(estimate(config, Placement(1, 1, "cpu", "fp32")).device.values()), rel=0.15)


def test_the_page_has_every_experiment_with_what_its_configuration_gives():
    page = experiments.PAGE.read_text()
    assert page == experiments.page_with(page, experiments.tables(experiments.count_all())), (
        "python docs/site/experiments.py writes it again"
    )


@pytest.mark.parametrize(
    "name, millions",
    [
        ("cifar10", 35.7),
        ("cifar10_improved", 52.5),
        ("imagenet64", 277.2),
        ("dit_s", 32.5),
        ("dit_b", 130.4),
        ("imagenet256", 131.1),
    ],
)
def test_networks_of_papers_have_the_parameters_that_are_told(name, millions):
    assert round(experiments.count(experiments.composed(name)).parameters / 1e6, 1) == millions


def test_estimates_are_of_operations_and_bytes():
    config = compose(["+experiment=cifar10"])
    counts = experiments.Counts(parameters=2**28, flops=62.4e12 * 3600 / config.images, activations=2**27)
    assert experiments.hours(config, counts) == pytest.approx(1)
    assert experiments.memory_gib(config, counts) == pytest.approx(5 + 2)


def test_what_autograd_keeps_of_an_image_does_not_count_weights():
    network = torch.nn.Conv2d(3, 5, 3, padding=1, device="meta")

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = network

        def forward(self, x, t):
            return self.conv(x).square()

    assert experiments._kept(Network(), (3, 8, 8)) == 4 * (3 + 5) * 8 * 8
