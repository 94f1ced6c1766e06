"""SDEdit: the noised image from which the sampling of an edited image starts (Meng et al. 2022)."""

from __future__ import annotations

from torch import Tensor

from ddpm.gaussian import q_sample
from ddpm.masks import same_shape
from ddpm.schedule import NoiseSchedule


def noised_start(
    schedule: NoiseSchedule, image: Tensor, strength: float, noise: Tensor, *, steps: int = 50
) -> tuple[Tensor, list[float]]:
    """Return SDEdit's start (x_t0, timesteps) (Meng et al. 2022, algorithm 1, for a variance-preserving process).

    It is the image noised to t0 = strength T, and the levels from t0 to 0 for a sampler of `steps` steps:
        x_t0, timesteps = noised_start(schedule, image, 0.5, noise)
        DDIM()(denoiser, schedule, x_t0, timesteps=timesteps)
    The levels are table timesteps, spaced as by `schedule.timesteps` (the same list for strength 1), unless steps > t0.

    Args:
        image: clean images [B, C, H, W].
        strength: t0 / T, in (0, 1]. Near 0 the result is the image; at 1 only the share alpha_T of it is kept.
        noise: standard normal noise of the image's shape.
        steps: number of sampling steps from t0 to 0, at least 1.

    Raises:
        ValueError: `strength` or `steps` is out of range, or the noise has another shape than the image.

    Examples:
        >>> import torch
        >>> from ddpm.schedule import Linear
        >>> image = torch.zeros(1, 1, 8, 8)
        >>> x_t, levels = noised_start(Linear().make(1000), image, 0.5, torch.ones_like(image), steps=5)
        >>> x_t.shape, levels
        (torch.Size([1, 1, 8, 8]), [500.0, 400.0, 300.0, 200.0, 100.0, 0.0])
    """
    timesteps = edit_levels(schedule, strength, steps=steps)
    same_shape(image, noise, "image and noise")
    return q_sample(image, timesteps[0], noise, schedule), timesteps


def edit_levels(schedule: NoiseSchedule, strength: float, *, steps: int = 50) -> list[float]:
    """Return the levels from t0 = strength T to 0 that an edit visits; see `noised_start`.

    Raises:
        ValueError: `strength` or `steps` is out of range.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> edit_levels(Linear().make(1000), strength=0.2, steps=4)
        [200.0, 150.0, 100.0, 50.0, 0.0]
    """
    if not 0 < strength <= 1 or steps < 1:
        raise ValueError(f"need strength in (0, 1] and steps >= 1, got strength={strength} and steps={steps}")
    t0 = strength * schedule.num_steps
    timesteps = [i * t0 / steps for i in range(steps, -1, -1)]
    return [float(round(t)) for t in timesteps] if t0 >= steps else timesteps
