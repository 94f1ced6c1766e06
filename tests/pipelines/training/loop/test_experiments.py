"""The shipped experiments of digits, as they are but short: each trains, and draws as its own settings say."""

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.model import load_model
from ddpm.samplers import Ancestral, AnnealedLangevin, Consistency
from pipelines.checkpoints import ModelError
from pipelines.config import compose
from tests.pipelines.training.loop.ranks import TINY, last_checkpoint, train_here


def trained(folder, digits, name, *overrides):
    config = compose(
        [
            f"+experiment={name}",
            *TINY["unet"],
            "images=1280",
            "optim.warmup_images=0",
            "optim.lr=0.01",
            "optim.ema_half_life=100",
            "checkpoint.every=100000",
            "tracking.grid_every=null",
            "storage=file",
            f"storage.root=file://{folder}",
            f"data.cache_dir={folder}/cache",
            *overrides,
        ]
    )
    _, tracker = train_here(folder, digits, config)
    losses = [value for _, value in tracker.metric("train/loss")]
    return load_model(last_checkpoint(folder)), losses


@pytest.fixture(scope="module")
def base(digits, tmp_path_factory):
    """The checkpoint of a model of v, from which others start."""
    folder = tmp_path_factory.mktemp("base")
    trained(folder, digits, "digits")
    return last_checkpoint(folder)


@pytest.mark.heavy
def test_a_learned_variance_is_trained_and_used_by_the_sampler_that_has_one(digits, tmp_path):
    model, losses = trained(tmp_path, digits, "digits_learned_variance", "tracking.log_every=128")
    assert losses[-1] < 0.75 * losses[0]
    assert isinstance(model.spec.sampling.sampler, Ancestral)
    x_t, t = torch.randn(4, 1, 8, 8), torch.full((4,), 500.0)
    fraction = model.denoiser(x_t, t, Conditioning(label=torch.arange(4))).variance_fraction
    assert fraction is not None
    assert fraction.std() > 0
    images = model.generate(torch.arange(4), sampling=model.spec.sampling.with_fields(steps=10))
    assert images.isfinite().all()


@pytest.mark.heavy
def test_a_score_model_trains_and_is_sampled_by_annealed_langevin(digits, tmp_path):
    model, losses = trained(tmp_path, digits, "digits_score", "tracking.log_every=128")
    assert losses[-1] < 0.75 * losses[0]
    assert isinstance(model.spec.sampling.sampler, AnnealedLangevin)
    assert model.spec.prediction == "eps"
    few = model.spec.sampling.with_fields(steps=10)
    images = model.generate(torch.arange(4), sampling=few)
    assert images.isfinite().all()
    assert not torch.equal(images, model.generate(torch.arange(4), sampling=few, seed=1))


@pytest.mark.heavy
def test_known_pixels_are_learned_sooner_from_a_model_that_has_never_seen_them(digits, base, tmp_path):
    often, start = "tracking.log_every=128", f"init_from={base}"
    model, tuned = trained(tmp_path / "tuned", digits, "digits_inpainting", often, start)
    assert model.spec.network.context_channels == 1
    _, alone = trained(tmp_path / "alone", digits, "digits_inpainting", often)
    assert alone[-1] < 0.75 * alone[0]
    assert tuned[0] < 0.75 * alone[0]


def test_the_demos_model_is_tuned_to_draw_in_two_evaluations_and_one_of_eps_is_refused(digits, base, tmp_path):
    often = ["tracking.log_every=128", "images=256"]
    model, losses = trained(tmp_path / "student", digits, "digits_consistency", *often, f"init_from={base}")
    assert torch.tensor(losses).isfinite().all()
    assert model.spec.sampling.sampler == Consistency(steps=2)
    images = model.generate(torch.arange(4))
    assert images.isfinite().all()
    assert not torch.equal(images, model.generate(torch.arange(4), seed=1))
    trained(tmp_path / "eps", digits, "digits", *often, "objective.prediction=eps")
    with pytest.raises(ModelError, match=r"predicts eps, and objective\.prediction = v"):
        trained(tmp_path / "other", digits, "digits_consistency", f"init_from={last_checkpoint(tmp_path / 'eps')}")
