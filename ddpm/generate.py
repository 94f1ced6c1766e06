"""From conditions and a seed to images: `Sampling` says how they are drawn, `generate` draws them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.guidance import GUIDANCE, ClassifierFree, Guidance, Guides
from ddpm.prediction import Clipping, Denoiser
from ddpm.samplers import DDIM, SAMPLERS, Sample, Sampler, initial_noise, last, step_noise
from ddpm.schedule import NoiseSchedule
from ddpm.settings import settings_of

# The fields of the first release in its order, with the values that they had where a kind does not use them. Stored
# settings and the keys of evaluations begin with these.
_FIRST: dict[str, Any] = {
    "scale": 1.0,
    "interval": [0.0, 1.0],
    "rescale": 0.0,
    "kind": "ddim",
    "steps": 50,
    "eta": 0.0,
    "variance": "small",
    "corrector_steps": 1,
    "snr": 0.16,
    "clip": 1.0,
    "threshold": None,
    "guidance": "classifier_free",
    "classifier": None,
    "weak": None,
}
# Fields that came later, with the values that draw what was drawn before: how older files are read.
_NEUTRAL: dict[str, Any] = {"spacing": "trailing", "clip_when": "after_guidance", "shift": "score"}


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from a denoiser; none of it needs training.

    It has one form as JSON, flat, which the model folder, a version's tags, configurations of studies, the command line
    and the server share: the fields of sampler, guidance and clipping side by side, with the sampler's name as `kind`
    and that of the guidance as `guidance`.

    Attributes:
        sampler: the algorithm.
        guidance: how the condition is strengthened.
        clipping: how the predicted image is kept in range.
    """

    sampler: Sampler = DDIM()
    guidance: Guidance = ClassifierFree()
    clipping: Clipping = Clipping()

    @classmethod
    def of(cls, **fields: Any) -> Sampling:
        """Settings from the fields of the flat form; the others have the defaults of the kinds that are named.

        Raises:
            ValueError: an unknown kind, a field that the named kinds do not have, or a value out of its range.
        """
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        names: tuple[Any, Any] = given.pop("kind", "ddim"), given.pop("guidance", "classifier_free")
        kinds: list[Any] = [SAMPLERS.find(names[0]), GUIDANCE.find(names[1]), Clipping]
        own = [{setting.name for setting in settings_of(kind)} for kind in kinds]
        allowed = set().union(*own)
        if unknown := given.keys() - allowed:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: no setting of the sampler {names[0]!r}, of the guidance {names[1]!r} "
                f"or of clipping; they have: {', '.join(sorted(allowed))}"
            )
        return cls(*(kind(**{n: given[n] for n in of & given.keys()}) for kind, of in zip(kinds, own, strict=True)))

    def with_fields(self, **fields: Any) -> Sampling:
        """The same with some fields of the flat form changed; of another kind, what the kinds share stays.

        Raises:
            ValueError: see `of`.
        """
        kept = self.to_json()
        chosen: list[Any] = [SAMPLERS.find(fields.get("kind", kept["kind"]))]
        chosen.append(GUIDANCE.find(fields.get("guidance", kept["guidance"])))
        chosen.append(Clipping)
        there = {"kind", "guidance"} | {s.name for kind in chosen for s in settings_of(kind)}
        return type(self).of(**{**{name: value for name, value in kept.items() if name in there}, **fields})

    def to_json(self) -> dict[str, Any]:
        """The flat form, complete, so that a default that changes later does not change what is stored."""
        plain: dict[str, Any] = {"kind": SAMPLERS.name_of(self.sampler), "guidance": GUIDANCE.name_of(self.guidance)}
        for part in (self.guidance, self.sampler, self.clipping):
            for setting in settings_of(type(part)):
                value = getattr(part, setting.name)
                plain[setting.name] = list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Sampling:
        """Read the flat form; what an older file lacks has the value that draws what was drawn then.

        Raises:
            ValueError: an unknown kind or field, or a value out of its range.
        """
        sampler = SAMPLERS.find(plain.get("kind", "ddim"))
        guidance = GUIDANCE.find(plain.get("guidance", "classifier_free"))
        kinds: list[Any] = [sampler, guidance, Clipping]
        known = {s.name for kind in kinds for s in settings_of(kind)}
        # The first release wrote the fields of every kind; those of other kinds than the one in use say nothing.
        used = {name: value for name, value in plain.items() if name in known or name not in _FIRST}
        older = {name: value for name, value in _NEUTRAL.items() if name in known}
        names = {"kind": SAMPLERS.name_of(sampler), "guidance": GUIDANCE.name_of(guidance)}
        return cls.of(**{**older, **used, **names})

    def key(self) -> dict[str, Any]:
        """What tells these settings apart from others, for the keys by which results are stored and found.

        As the first release wrote its settings, with later fields only where they draw something else.
        """
        plain = self.to_json()
        first = {name: plain.get(name, neutral) for name, neutral in _FIRST.items()}
        later = sorted(plain.keys() - _FIRST.keys())
        return first | {n: plain[n] for n in later if n not in _NEUTRAL or plain[n] != _NEUTRAL[n]}

    def wrap(self, denoiser: Denoiser, schedule: NoiseSchedule, guides: Guides | None = None) -> Denoiser:
        """Return the denoiser under this guidance and clipping.

        Raises:
            ValueError: guidance by a network that is not among `guides`.
        """
        if self.clipping.clip_when == "after_guidance":
            return self.clipping.wrap(self.guidance.wrap(denoiser, schedule, guides), schedule)
        if guides is not None and guides.weak is not None:
            guides = replace(guides, weak=self.clipping.wrap(guides.weak, schedule))
        return self.guidance.wrap(self.clipping.wrap(denoiser, schedule), schedule, guides)


def trajectory(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    sampling: Sampling,
    *,
    cond: Conditioning | None,
    image_ids: Tensor,
    shape: tuple[int, ...],
    seed: int,
    guides: Guides | None = None,
) -> Iterator[Sample]:
    """The sampler's steps for the images of these numbers, int64 [B]; see `generate`."""
    x_T = initial_noise(seed, image_ids, shape)
    guided = sampling.wrap(denoiser, schedule, guides)
    return sampling.sampler(guided, schedule, x_T, cond, noise=step_noise(seed, image_ids, shape))


# Not inference mode: classifier guidance differentiates through x_t.
@torch.no_grad()
def generate(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    sampling: Sampling,
    *,
    cond: Conditioning | None,
    shape: tuple[int, ...],
    seed: int,
    image_ids: Tensor | None = None,
    count: int | None = None,
    batch_size: int = 64,
    guides: Guides | None = None,
) -> Tensor:
    """Images in [-1, 1], float32 [N, C, H, W].

    Image i of a seed is the same whatever is generated beside it, up to float rounding.

    Args:
        cond: what each image is conditioned on, N on the first axis; None for unconditional images.
        shape: (C, H, W).
        seed: of the noise.
        image_ids: numbers of the images, int64 [N]; default 0 .. N - 1.
        count: N where there are neither conditions nor numbers.
        batch_size: images per network call.
        guides: the classifier or weaker model that the guidance needs.

    Raises:
        ValueError: the number of images cannot be told, or a guide that is missing.
    """
    total = len(cond) if cond is not None else len(image_ids) if image_ids is not None else count
    if total is None:
        raise ValueError("give cond, image_ids or count: the number of images is not known")
    numbers = torch.arange(total) if image_ids is None else image_ids
    parts = []
    for i in range(0, total, batch_size):
        span = slice(i, i + batch_size)
        some = None if cond is None else cond[span]
        steps = trajectory(
            denoiser, schedule, sampling, cond=some, image_ids=numbers[span], shape=shape, seed=seed, guides=guides
        )
        parts.append(last(steps).clamp(-1, 1))
    return torch.cat(parts)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float [N, C, H, W] to 0..255 uint8 [N, H, W, C], rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
