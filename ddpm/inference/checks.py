"""Checks of a request against a model; every error says what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.model import ModelSpec
from ddpm.schedule import NoiseSchedule

MAX_VALUES = 1 << 30
"""Largest number of pixel values in one call: 4 GiB of float32."""


def class_indices(labels: Sequence[str | int], classes: Sequence[str], field: str = "labels") -> list[int]:
    """Return the index of each class, given by its name or index.

    Args:
        field: name of the argument with the labels, for the message.

    Raises:
        ValueError: the model has no classes, or not this one.

    Examples:
        >>> class_indices(["dog", 0, "1"], ["cat", "dog"])
        [1, 0, 1]
        >>> class_indices(["dgo"], ["cat", "dog"])
        Traceback (most recent call last):
            ...
        ValueError: labels: no class 'dgo'; the model has: cat, dog. Did you mean 'dog'?
    """
    if not classes:
        raise ValueError("this model has no classes: leave the labels out")
    return [_class_index(label, classes, field) for label in labels]


def check_names(what: str, names: Iterable[object], allowed: Iterable[str]) -> None:
    """Raise if a name is not allowed.

    Args:
        what: what the names denote, in the plural, for the message.

    Raises:
        ValueError: a name is unknown; the message lists the unknown and the allowed ones.

    Examples:
        >>> check_names("columns", ["label", "colour"], ["label", "seed"])
        Traceback (most recent call last):
            ...
        ValueError: unknown columns colour; there are: label, seed
    """
    known = list(allowed)
    if unknown := {str(name) for name in names} - set(known):
        raise ValueError(f"unknown {what} {', '.join(sorted(unknown))}; there are: {', '.join(known)}")


def check_count(count: int, spec: ModelSpec) -> None:
    """Raise if there are no pictures to draw, or more than fit into memory at once.

    Raises:
        ValueError: `count` is out of range.

    Examples:
        >>> from ddpm.models import UNetConfig
        >>> spec = ModelSpec(UNetConfig(), {"kind": "linear"}, "v", image_size=32)
        >>> check_count(1_000_000, spec)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: 1,000,000 pictures are too many for one call, at most 349,525: draw them in ...
    """
    if count < 1:
        raise ValueError("no pictures were requested: the count must be at least 1")
    most = MAX_VALUES // math.prod(spec.shape)
    if count > most:
        raise ValueError(f"{count:,} pictures are too many for one call, at most {most:,}: draw them in parts, by seed")


def can_inpaint(spec: ModelSpec) -> bool:
    """Return whether a model was trained to fill hidden pixels.

    Examples:
        >>> from ddpm.models import UNetConfig
        >>> network = UNetConfig(context_channels=3)
        >>> can_inpaint(ModelSpec(network, {"kind": "linear"}, "v", image_size=32))
        True
    """
    return spec.network.context_channels > 0


def check_steps(steps: int, schedule: NoiseSchedule) -> None:
    """Raise if a sampler has more steps than the schedule.

    Raises:
        ValueError: `steps` is out of range.

    Examples:
        >>> from ddpm.schedule import Linear
        >>> check_steps(2000, Linear().make(1000))
        Traceback (most recent call last):
            ...
        ValueError: steps must be in 1..1000 for this model, got 2000
    """
    if not 1 <= steps <= schedule.num_steps:
        raise ValueError(f"steps must be in 1..{schedule.num_steps} for this model, got {steps}")


def check_takes_text(spec: ModelSpec, field: str) -> None:
    """Raise if a model was not trained on text.

    Args:
        field: name of the argument with the text, for the message.

    Raises:
        ValueError: the model takes no text.

    Examples:
        >>> from ddpm.models import UNetConfig
        >>> check_takes_text(ModelSpec(UNetConfig(), {"kind": "linear"}, "v", image_size=32), "prompts")
        Traceback (most recent call last):
            ...
        ValueError: prompts: this model was not trained on text (model.text_dim), leave it out
    """
    if not spec.network.text_dim:
        raise ValueError(f"{field}: this model was not trained on text (model.text_dim), leave it out")


def check_condition(name: str, cond: Conditioning, spec: ModelSpec, count: int) -> None:
    """Check that a condition has one row per picture and is of a kind that the model was trained on.

    Raises:
        ValueError: the message names the condition, what it has and what the model takes.

    Examples:
        >>> import torch
        >>> from ddpm.models import UNetConfig
        >>> spec = ModelSpec(UNetConfig(num_classes=2), {"kind": "linear"}, "v", image_size=32, classes=("cat", "dog"))
        >>> check_condition("the condition", Conditioning(label=torch.tensor([0, 5])), spec, count=2)
        Traceback (most recent call last):
            ...
        ValueError: labels must be in 0..1, got [0, 5]
    """
    if len(cond) != count:
        raise ValueError(f"{name} has {len(cond)} rows for {count} pictures")
    if cond.label is not None:
        if not spec.classes:
            raise ValueError("this model has no classes: leave the labels out")
        if bool((cond.label < 0).any()) or bool((cond.label >= len(spec.classes)).any()):
            raise ValueError(f"labels must be in 0..{len(spec.classes) - 1}, got {cond.label.unique().tolist()}")
    if cond.pooled is not None or cond.text is not None:
        check_takes_text(spec, "prompts")
        width = spec.network.text_dim
        found = {e.shape[-1] for e in (cond.text, cond.pooled) if e is not None}
        if found != {width}:
            raise ValueError(
                f"the text encoder's embeddings have {', '.join(map(str, found))} numbers, the model takes {width}: "
                "use the encoder that embedded its training data"
            )


def check_images(images: Tensor, spec: ModelSpec, count: int) -> None:
    """Check that there are `count` images of the model's shape, with finite values in [-1, 1].

    Raises:
        ValueError: number, shape, dtype or values are wrong.

    Examples:
        >>> import torch
        >>> from ddpm.models import UNetConfig
        >>> spec = ModelSpec(UNetConfig(), {"kind": "linear"}, "v", image_size=32)
        >>> check_images(torch.zeros(1, 3, 8, 8), spec, count=1)
        Traceback (most recent call last):
            ...
        ValueError: images must be [1, 3, 32, 32] for this model, got [1, 3, 8, 8]
    """
    if list(images.shape) != [count, *spec.shape]:
        raise ValueError(f"images must be {[count, *spec.shape]} for this model, got {list(images.shape)}")
    if not images.is_floating_point() or not bool(images.isfinite().all()) or float(images.abs().max()) > 1 + 1e-6:
        raise ValueError("images must be floating point in [-1, 1]: bytes are x / 127.5 - 1")


def check_mask(name: str, known: Tensor) -> None:
    """Raise if the mask of a picture hides every pixel or none.

    Args:
        name: name of the mask, for the message.
        known: bool, True where a pixel is known.

    Raises:
        ValueError: the mask hides everything or nothing.

    Examples:
        >>> import torch
        >>> check_mask("the mask", torch.zeros(1, 8, 8, dtype=torch.bool))
        Traceback (most recent call last):
            ...
        ValueError: the mask hides every pixel: it must hide some pixels, which are filled, and keep others
    """
    everything = bool(known.all())
    if everything or not bool(known.any()):
        what = "no pixel" if everything else "every pixel"
        raise ValueError(f"{name} hides {what}: it must hide some pixels, which are filled, and keep others")


def _class_index(label: str | int, classes: Sequence[str], field: str) -> int:
    text = str(label).strip()
    for name in (label, text) if isinstance(label, str) else ():  # a name may have spaces of its own around it
        if name in classes:
            return list(classes).index(name)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    shown = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
    close = difflib.get_close_matches(text, classes, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"{field}: no class {text!r}; the model has: {shown}.{hint}")
