"""Consistency tuning: a trained model becomes one that maps noise to an image in one evaluation, or in a few.

The consistency function f(x_t, t) is where the trajectory of the probability-flow ODE through x_t ends at t = 0
(Song et al. 2023, "Consistency Models", definition 1). A model learns it by giving two points of one trajectory the
same end; a denoiser's x_0 is what it starts from, because a denoiser is the consistency model of pairs (t, 0) (Easy
Consistency Tuning: Geng et al. 2024, "Consistency Models Made Easy", sec. 3). So f is the x_0 of a `Prediction`.
It has to be the image itself at t = 0, which every parameterization but "x0" gives by its form: v is EDM's skip
connection for data of standard deviation 1, f = alpha_t x_t - sigma_t v, and "x0_skip" that for 0.5.

The paper's noise level t is our k = sigma / alpha; its x is our x_t / alpha_t.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.gaussian import q_sample
from ddpm.noise import Purpose, Seed, normal
from ddpm.prediction import Denoiser, Parameterization, Prediction, coefficients
from ddpm.samplers.consistency import top_ratio
from ddpm.schedule import NoiseSchedule
from ddpm.settings import Settings, setting

EPS_LIMIT = 160.0
"""sigma / alpha at T up to which eps can be predicted: f divides an error of eps by alpha, and 160 is DDPM's linear
schedule (157 at T = 1000)."""


@dataclass(frozen=True)
class Pairs:
    """The two noise levels of each sample of a batch, float64 [B].

    Attributes:
        t: timestep of the noisier point, in [1, T].
        r: timestep of the cleaner point, r < t; 0 where it is the clean image.
        gap: k_t - k_r, the distance of the two ratios sigma / alpha.
    """

    t: Tensor
    r: Tensor
    gap: Tensor

    def to(self, device: torch.device | str) -> Pairs:
        """Return the pairs on `device`."""
        return Pairs(self.t.to(device), self.r.to(device), self.gap.to(device))


@dataclass(frozen=True)
class ConsistencyTuning(Settings):
    """The settings of Easy Consistency Tuning; the defaults are those of the paper for CIFAR-10 (sec. 4, app.).

    Levels are drawn by log k_t ~ N(p_mean, p_std^2). The other one is nearer from stage to stage,
        k_r = k_t (1 - n(k_t) / q^(stage + 1)),   n(k) = 1 + k_factor sigmoid(-b k),   at least 0,
    from diffusion training, where most r are 0, towards r -> t. The stages are equally long in images seen. A level is
    at least that of table index 1, the least that networks are trained on, and at most where sampling starts.

    Examples:
        >>> settings = ConsistencyTuning(q=2.0, k=0.0)
        >>> settings.stage(torch.tensor([0, 500, 999]), images=1000).tolist()
        [0, 4, 7]
        >>> settings.nearer(torch.tensor([1.0, 1.0]), torch.tensor([0, 1])).tolist()
        [0.5, 0.75]
    """

    p_mean: float = setting(-1.1, "mean of log(sigma / alpha) of the noisier of two levels")
    p_std: float = setting(2.0, "standard deviation of log(sigma / alpha) of the noisier of two levels", gt=0)
    q: float = setting(2.0, "factor by which the two levels of a pair come nearer from stage to stage", gt=1)
    k: float = setting(8.0, "how much farther apart the levels of a pair are where there is little noise", ge=0)
    b: float = setting(1.0, "how fast that falls with sigma / alpha", gt=0)
    stages: int = setting(8, "stages of equal length in images, each with nearer levels", ge=1)
    huber: float = setting(0.0, "c of the pseudo-Huber loss sqrt(d^2 + c^2) - c, never below rounding errors", ge=0)
    guidance: float | None = setting(
        None,
        "guidance scale of the init_from model whose trajectories are learned, 1: unguided; None: those of the data",
        ge=0,
    )

    def stage(self, images_seen: Tensor, images: int) -> Tensor:
        """Return the stage in 0..stages - 1, int64 like `images_seen`.

        Args:
            images_seen: ordinals of samples, int64 [B].
            images: length of the run.
        """
        return (images_seen * self.stages // images).clamp(0, self.stages - 1)

    def nearer(self, ratio: Tensor, stage: Tensor) -> Tensor:
        """Return k_r for k_t [B] at these stages [B], in [0, k_t] (Geng et al., sec. 3.2, the sigmoid n(t))."""
        n = 1 + self.k * torch.sigmoid(-self.b * ratio)
        return (ratio * (1 - n * self.q ** -(stage.to(ratio) + 1))).clamp(min=0)

    def pairs(self, schedule: NoiseSchedule, seed: Seed, ordinals: Tensor, images: int) -> Pairs:
        """Return the levels of the samples with these ordinals [B], as functions of (seed, ordinal).

        Args:
            images: length of the run, of which an ordinal is a part: its stage depends on it.
        """
        low, top = schedule.ratio(1).item(), top_ratio(schedule)
        z = normal(seed, ordinals, Purpose.TIMESTEP, ()).double()
        noisier = (self.p_mean + self.p_std * z).exp().clamp(low, top)
        cleaner = self.nearer(noisier, self.stage(ordinals, images))
        cleaner = torch.where(cleaner < low, 0, cleaner)
        t, r = schedule.timestep_of_ratio(torch.stack([noisier, cleaner]))
        return Pairs(t, r, noisier - cleaner)

    def losses(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x_0: Tensor,
        eps: Tensor,
        pairs: Pairs,
        cond: Conditioning | None = None,
        teacher: Denoiser | None = None,
    ) -> Tensor:
        """Return the loss of each sample, [B]: d(f(x_t, t), f(x_r, r)) / (k_t - k_r), the target without gradient.

        d is the pseudo-Huber metric over all pixels of an image (Geng et al., sec. 3.3; Song & Dhariwal 2024, sec.
        3.3). Both points have the same noise, and both passes the same dropout.

        Args:
            denoiser: the model that is tuned; its x_0 is f.
            x_0: clean images in [-1, 1], [B, C, H, W].
            eps: standard normal noise like x_0.
            pairs: levels of the samples, on the device of x_0.
            cond: conditions of both passes.
            teacher: whose trajectories are learned: x_r is then its DDIM step from x_t, which is exact for r -> t
                (Song et al. 2023, algorithm 2). None learns those of the data, with x_r = alpha_r x_0 + sigma_r eps.
        """
        x_t = q_sample(x_0, pairs.t, eps, schedule)
        # The target's pass comes first: DDP synchronises buffers in a pass, which backward must not notice.
        with torch.no_grad(), _same_random_numbers(x_0):
            point = Prediction(x_0, eps) if teacher is None else teacher(x_t, pairs.t, cond)
            alpha, sigma = coefficients(schedule, pairs.r, x_0)
            target = denoiser(alpha * point.x0 + sigma * point.eps, pairs.r, cond).x0
        # Autocast keeps the weights that it has cast, here without gradient, and the next pass would use them.
        torch.clear_autocast_cache()
        error = (denoiser(x_t, pairs.t, cond).x0 - target).flatten(1)
        # A student that begins as its teacher is at distance 0 from some targets, where rounding alone would decide the
        # direction of a gradient of full length: c is never below what rounding makes of such a distance.
        c = max(self.huber, torch.finfo(error.dtype).eps ** 0.5)
        constant = torch.full_like(error[:, :1], c)  # one more pixel
        distance = torch.linalg.vector_norm(torch.cat([error, constant], dim=1), dim=1) - c
        return distance / pairs.gap.to(distance)


def refusal(prediction: Parameterization, schedule: NoiseSchedule) -> str | None:
    """Return why a model of this parameterization cannot be tuned to a consistency model; None where it can.

    Examples:
        >>> from ddpm.schedule import Cosine
        >>> refusal("v", Cosine().make(1000)) is None
        True
        >>> refusal("x0", Cosine().make(1000)).partition(",")[0]
        'a network that predicts x0 does not give the image itself at t = 0'
    """
    if prediction == "x0":
        return (
            "a network that predicts x0 does not give the image itself at t = 0, as a consistency function must: set "
            "objective.prediction=x0_skip, which starts from the weights of such a model as well"
        )
    ratio = schedule.ratio(schedule.num_steps).item()
    if prediction in ("eps", "score") and ratio > EPS_LIMIT:
        return (
            f"sigma / alpha is {ratio:,.0f} at T, and a consistency function of eps divides by alpha: at most "
            f"{EPS_LIMIT:g} is of use; tune a model that was trained with objective.prediction=v, or one of eps on "
            "schedule=linear or schedule=edm"
        )
    return None


@contextmanager
def _same_random_numbers(like: Tensor) -> Iterator[None]:
    """Give what follows the context the random numbers that were drawn in it, on the CPU and the device of `like`."""
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        yield
