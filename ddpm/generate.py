"""Sampling of images from conditions and a seed: `Sampling` holds the settings, `generate` draws the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.guidance import GUIDANCE, ClassifierFree, Guidance, Guides
from ddpm.prediction import Arithmetic, Clipping, Denoiser
from ddpm.samplers import DDIM, SAMPLERS, Sampler
from ddpm.schedule import NoiseSchedule
from ddpm.settings import settings_of

# The fields of the first release, in its order, with the values it wrote for fields that a kind does not use. Stored
# settings and the keys of evaluations start with these fields.
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
# Fields added later, with the values that reproduce the old behaviour; older files are read with these values.
_NEUTRAL: dict[str, Any] = {
    "time": "ratio",
    "spacing": "trailing",
    "timesteps": None,
    "clip_when": "after_guidance",
    "shift": "score",
    "precision": "fp32",
    "compile": False,
    "weights": None,
}
OF_ALL_KINDS: tuple[Any, ...] = (Clipping, Arithmetic)
"""Settings that every kind of sampler and guidance has."""


@dataclass(frozen=True)
class Sampling:
    """The settings for drawing images from a denoiser; changing them needs no training.

    Model folder, tags of a registered version, configurations of studies, command line and server all use the same flat
    JSON form: the fields of sampler, guidance, clipping and arithmetic side by side, with the sampler's name as `kind`
    and the guidance's name as `guidance`.

    Attributes:
        sampler: the sampling algorithm.
        guidance: the kind of guidance and its scale.
        clipping: how the predicted x_0 is kept within the range of images.
        arithmetic: in what precision the networks compute, and whether they are compiled.

    Examples:
        >>> sampling = Sampling.of(kind="heun", steps=10, scale=2.0)
        >>> Sampling.from_json(sampling.to_json()) == sampling
        True
        >>> sampling.with_fields(kind="ddim").sampler
        DDIM(steps=10, spacing='trailing', timesteps=None, eta=0.0)
    """

    sampler: Sampler = DDIM()
    guidance: Guidance = ClassifierFree()
    clipping: Clipping = Clipping()
    arithmetic: Arithmetic = Arithmetic()

    @classmethod
    def of(cls, **fields: Any) -> Sampling:
        """Return the settings from fields of the flat form; fields not given have the defaults of the named kinds.

        Raises:
            ValueError: a kind is unknown, the named kinds do not have a field, or a value is out of range.
        """
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        names: tuple[Any, Any] = given.pop("kind", "ddim"), given.pop("guidance", "classifier_free")
        kinds: list[Any] = [SAMPLERS.find(names[0]), GUIDANCE.find(names[1]), *OF_ALL_KINDS]
        own = [{setting.name for setting in settings_of(kind)} for kind in kinds]
        allowed = set().union(*own)
        if unknown := given.keys() - allowed:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: no setting of the sampler {names[0]!r}, of the guidance {names[1]!r} "
                f"of clipping or of arithmetic; they have: {', '.join(sorted(allowed))}"
            )
        return cls(*(kind(**{n: given[n] for n in of & given.keys()}) for kind, of in zip(kinds, own, strict=True)))

    def with_fields(self, **fields: Any) -> Sampling:
        """Return the settings with some fields changed; if the kind changes, fields that both kinds have are kept.

        Explicit `timesteps` and learned `weights` are for one kind of sampler and one number of steps; they go with it.

        Raises:
            ValueError: as for `of`.
        """
        kept = self.to_json()
        if any(fields.get(name, kept[name]) != kept[name] for name in ("kind", "steps")):
            for name in ("timesteps", "weights"):
                kept.pop(name, None)
        chosen: list[Any] = [SAMPLERS.find(fields.get("kind", kept["kind"]))]
        chosen.append(GUIDANCE.find(fields.get("guidance", kept["guidance"])))
        chosen.extend(OF_ALL_KINDS)
        there = {"kind", "guidance"} | {s.name for kind in chosen for s in settings_of(kind)}
        return type(self).of(**{**{name: value for name, value in kept.items() if name in there}, **fields})

    def to_json(self) -> dict[str, Any]:
        """Return the flat form with every field, so that stored settings do not change if a default does."""
        plain: dict[str, Any] = {"kind": SAMPLERS.name_of(self.sampler), "guidance": GUIDANCE.name_of(self.guidance)}
        for part in (self.guidance, self.sampler, self.clipping, self.arithmetic):
            for setting in settings_of(type(part)):
                value = getattr(part, setting.name)
                plain[setting.name] = list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Sampling:
        """Return the settings from their flat form; fields missing in older files get the value of the old behaviour.

        Raises:
            ValueError: a kind or field is unknown, or a value is out of range.
        """
        sampler = SAMPLERS.find(plain.get("kind", "ddim"))
        guidance = GUIDANCE.find(plain.get("guidance", "classifier_free"))
        kinds: list[Any] = [sampler, guidance, *OF_ALL_KINDS]
        known = {s.name for kind in kinds for s in settings_of(kind)}
        # The first release wrote the fields of every kind: ignore those of the kinds not in use.
        used = {name: value for name, value in plain.items() if name in known or name not in _FIRST}
        older = {name: value for name, value in _NEUTRAL.items() if name in known}
        names = {"kind": SAMPLERS.name_of(sampler), "guidance": GUIDANCE.name_of(guidance)}
        return cls.of(**{**older, **used, **names})

    @property
    def guides(self) -> dict[str, str]:
        """MODEL reference of each network that guides, by the field of `Model` that holds it: those that are named."""
        named = {s.name: getattr(self.guidance, s.name) for s in settings_of(type(self.guidance)) if s.reference}
        return {name: reference for name, reference in named.items() if reference is not None}

    @property
    def exact(self) -> Sampling:
        """These settings in float32 and without `torch.compile`, so that machines differ least."""
        return self.with_fields(precision="fp32", compile=False)

    def key(self) -> dict[str, Any]:
        """Return the fields that identify these settings in the keys of stored results.

        The fields of the first release are always there; later fields only if they differ from the old behaviour, so
        that results stored by older releases are still found.
        """
        plain = self.to_json()
        first = {name: plain.get(name, neutral) for name, neutral in _FIRST.items()}
        later = sorted(plain.keys() - _FIRST.keys())
        return first | {n: plain[n] for n in later if n not in _NEUTRAL or plain[n] != _NEUTRAL[n]}

    def wrap(self, denoiser: Denoiser, schedule: NoiseSchedule, guides: Guides | None = None) -> Denoiser:
        """Return the denoiser with this guidance and clipping applied, in this arithmetic.

        Raises:
            ValueError: the guidance needs a network that `guides` does not have.
        """
        denoiser = self.arithmetic.of_network(denoiser)
        if guides is not None and guides.weak is not None:
            guides = replace(guides, weak=self.arithmetic.of_network(guides.weak))
        if self.clipping.clip_when == "after_guidance":
            return self.arithmetic.wrap(self.clipping.wrap(self.guidance.wrap(denoiser, schedule, guides), schedule))
        if guides is not None and guides.weak is not None:
            guides = replace(guides, weak=self.clipping.wrap(guides.weak, schedule))
        clipped = self.clipping.wrap(denoiser, schedule)
        return self.arithmetic.wrap(self.guidance.wrap(clipped, schedule, guides))

    def wrap_unguided(self, denoiser: Denoiser, schedule: NoiseSchedule) -> Denoiser:
        """Return the denoiser with this clipping applied, in this arithmetic."""
        return self.arithmetic.wrap(self.clipping.wrap(self.arithmetic.of_network(denoiser), schedule))


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
    device: torch.device | str | None = None,
) -> Tensor:
    """Return generated images in [-1, 1], float32 [N, C, H, W].

    The image with a given seed and id does not depend on the other images of its batch, up to float rounding.

    Args:
        cond: conditions of N images; None for unconditional images.
        shape: (C, H, W).
        seed: seed of the noise.
        image_ids: id of each image, int64 [N]; default 0 .. N - 1.
        count: N, needed if neither `cond` nor `image_ids` is given.
        batch_size: images per network call.
        guides: the classifier or weaker model that the guidance needs.
        device: where images are drawn whose ids are not given; default: the CPU.

    Raises:
        ValueError: the number of images is not given, or the guidance needs a network that is missing.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> gaussian = NetworkDenoiser(lambda x, row, cond: 0 * x, schedule, "v")
        >>> given = {"cond": None, "shape": (1, 2, 2), "seed": 0}
        >>> images = generate(gaussian, schedule, Sampling(DDIM(steps=5)), **given, count=3)
        >>> alone = generate(gaussian, schedule, Sampling(DDIM(steps=5)), **given, image_ids=torch.tensor([2]))
        >>> images.shape, torch.allclose(alone, images[2:])  # an image does not depend on its batch
        (torch.Size([3, 1, 2, 2]), True)
    """
    from ddpm.inference.drawing import Drawing, Painter, paint  # which needs `Sampling`
    from ddpm.inference.noise import Noise

    total = len(cond) if cond is not None else len(image_ids) if image_ids is not None else count
    if total is None:
        raise ValueError("give cond, image_ids or count: the number of images is not known")
    where = torch.device(device or "cpu") if image_ids is None else image_ids.device
    ids = torch.arange(total, device=where) if image_ids is None else image_ids
    painter = Painter(denoiser, schedule, guides or Guides(), shape, where)
    drawing = Drawing(Noise(torch.full_like(ids, seed), ids), sampling, cond, negative=painter.guides.negative)
    return paint(painter, drawing, batch_size=batch_size).images


def to_uint8(images: Tensor) -> Tensor:
    """Convert images from float [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C] in 0..255, rounded.

    Examples:
        >>> images = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 4)
        >>> to_uint8(images).shape, to_uint8(images).flatten().tolist()
        (torch.Size([1, 1, 4, 1]), [0, 128, 255, 255])
    """
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
