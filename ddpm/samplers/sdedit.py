"""SDEdit: where the sampling of an edited image starts (Meng et al. 2022)."""

from __future__ import annotations

from torch import Tensor

from ddpm.gaussian import q_sample
from ddpm.masks import same_shape
from ddpm.schedule import NoiseSchedule


def noised_start(
    schedule: NoiseSchedule, image: Tensor, strength: float, noise: Tensor, *, steps: int = 50
) -> tuple[Tensor, list[float]]:
    """Where SDEdit starts (Meng et al. 2022, algorithm 1, for a variance-preserving process): (x_t0, timesteps).

    The image, noised to t0 = strength T, and the levels from there to 0 for a sampler of `steps` steps:
        x_t0, timesteps = noised_start(schedule, image, 0.5, noise)
        DDIM()(denoiser, schedule, x_t0, timesteps=timesteps)
    They are the table's, spaced as by `schedule.timesteps` (the same list at strength 1), unless steps > t0.

    Args:
        image: clean images [B, C, H, W].
        strength: in (0, 1]. Near 0 the image comes back; at 1 nothing is kept of it but alpha_T's share.
        noise: standard normal, like the image.
        steps: at least 1.

    Raises:
        ValueError: `strength` or `steps` out of range, or noise of another shape.
    """
    if not 0 < strength <= 1 or steps < 1:
        raise ValueError(f"need strength in (0, 1] and steps >= 1, got strength={strength} and steps={steps}")
    same_shape(image, noise, "image and noise")
    t0 = strength * schedule.num_steps
    timesteps = [i * t0 / steps for i in range(steps, -1, -1)]
    timesteps = [float(round(t)) for t in timesteps] if t0 >= steps else timesteps
    return q_sample(image, timesteps[0], noise, schedule), timesteps
