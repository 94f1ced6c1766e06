"""The conditions of a batch: class, text and the known pixels of inpainting, with a null condition per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch of samples; the first axis of every tensor is the batch.

    Attributes:
        label: class index in [0, num_classes), int64 [B]; -1 for a sample without a label, which takes the null one.
        text: token embeddings [B, L, D].
        text_mask: bool [B, L], True for real tokens, False for padding; None if there is no padding.
        pooled: embedding of the whole text, [B, D].
        mask: bool or float [B, 1, H, W], 1 where a pixel is known (inpainting).
        context: the clean image [B, C, H, W]; the network sees only the pixels where `mask` is 1.
        drop: bool [B]; True replaces the sample's label and text by the network's null condition. Mask and context are
            never dropped.

    Examples:
        >>> cond = Conditioning(label=torch.tensor([3, 7]))
        >>> len(cond), cond[:1].label.tolist(), cond.present
        (2, [3], ('label',))
        >>> cond.dropped(torch.tensor([True, False])).drop.tolist()
        [True, False]
        >>> Conditioning.join([cond, cond]).label.tolist()
        [3, 7, 3, 7]
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    mask: Tensor | None = None
    context: Tensor | None = None
    drop: Tensor | None = None

    @classmethod
    def of_text(cls, tokens: Sequence[Tensor], pooled: Tensor) -> Conditioning:
        """Return the condition of texts of different lengths, padded with zeros.

        Args:
            tokens: token embeddings of each text, [L_i, D].
            pooled: embeddings of the whole texts, [B, D].
        """
        lengths = torch.tensor([len(each) for each in tokens])
        text = pad_sequence(list(tokens), batch_first=True)
        return cls(text=text, text_mask=torch.arange(text.shape[1])[None] < lengths[:, None], pooled=pooled)

    @classmethod
    def join(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Return the conditions of several batches as one; shorter texts are padded with zeros.

        Args:
            parts: all of them with the same tensors, except that those without padding may have no `text_mask`.
        """
        longest = max((part.text.shape[1] for part in parts if part.text is not None), default=0)
        padded = [part._padded(longest) for part in parts]
        joined: dict[str, Tensor | None] = {}
        for field in fields(cls):
            tensors = [getattr(part, field.name) for part in padded]
            assert len({tensor is None for tensor in tensors}) == 1, f"only some have {field.name}"
            joined[field.name] = None if tensors[0] is None else torch.cat(tensors)
        return cls(**joined)

    def _padded(self, length: int) -> Conditioning:
        if self.text is None:
            return self
        more = length - self.text.shape[1]
        mask = self.text.new_ones(self.text.shape[:2], dtype=torch.bool) if self.text_mask is None else self.text_mask
        return replace(self, text=pad(self.text, (0, 0, 0, more)), text_mask=pad(mask, (0, more), value=False))

    def dropped(self, drop: Tensor) -> Conditioning:
        """Return the conditions with the samples in `drop` [B] dropped as well (Ho & Salimans 2022, algorithm 1)."""
        return replace(self, drop=drop if self.drop is None else self.drop | drop)

    def __len__(self) -> int:
        """Return the number of samples.

        Raises:
            ValueError: the condition has no tensors, so it fits any number of samples.
        """
        for _, tensor in self._tensors():
            if tensor is not None:
                return len(tensor)
        raise ValueError("a condition without any tensor has no length")

    def __getitem__(self, span: slice | Tensor) -> Conditioning:
        """Return the conditions of some of the samples."""
        return self.map(lambda tensor: tensor[span])

    @property
    def present(self) -> tuple[str, ...]:
        """The names of the tensors that are there: conditions that are equal in it can be joined."""
        return tuple(name for name, tensor in self._tensors() if tensor is not None and name != "text_mask")

    def null(self) -> Conditioning:
        """Return the null condition: no label and no text, but the same known pixels."""
        return Conditioning(mask=self.mask, context=self.context)

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        """Return the conditions with f applied to every tensor, for example to move, slice or repeat the batch."""
        return Conditioning(**{k: None if v is None else f(v) for k, v in self._tensors()})

    def to(self, device: torch.device | str) -> Conditioning:
        """Return the conditions on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def _tensors(self) -> list[tuple[str, Tensor | None]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]
