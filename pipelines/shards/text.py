"""Text encoders, which turn captions into token embeddings and a pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.model import check_text_encoder
from ddpm.tensor_files import tensors_digest

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
"""Errors that `sentence-transformers` raises for damaged or foreign folders."""
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def local_encoder(name: str) -> Path | None:
    """Return the folder of a text encoder that is on this machine; None where there is none of this name."""
    folder = Path(name).expanduser()
    return folder.resolve() if folder.is_dir() else None


def is_path(name: str) -> bool:
    """Return whether the name of an encoder can only be that of a folder, as a hub's names are OWNER/NAME or NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


class TextEncoder:
    """A text encoder whose weights are not trained.

    Args:
        name: hub name or folder of a `sentence-transformers` model or any `transformers` encoder. For an encoder
            without pooling, the pooled vector is the mean over tokens.
        device: device on which it runs.
        digest: that it has to have; None for any.

    Attributes:
        name: hub name, or the whole path of the folder.
        dim: width of the embeddings; equals `text_dim` of a network that uses them.
        digest: SHA-256 over its weights.

    Raises:
        ValueError: the extra `text` is not installed, the encoder cannot be loaded, or it is another one.
    """

    def __init__(self, name: str = DEFAULT_ENCODER, device: str = "cpu", digest: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise ValueError("text encoders need the extra `text`: pip install 'ddpm-pipelines[text]'") from error
        disable_progress_bar()  # of reading the weights, among the lines of whoever shows progress
        folder = local_encoder(name)
        try:
            if folder is not None:
                check_text_encoder(folder)
            self._encoder: Any = SentenceTransformer(name, device=device)
        except DAMAGED as error:
            why = (str(error) or repr(error)).splitlines()[0]
            raise ValueError(f"cannot load the text encoder {name!r}: {why}") from error
        self.name = name if folder is None else str(folder)
        self.digest = tensors_digest(dict(self._encoder.named_parameters()))
        if digest is not None and digest != self.digest:
            raise ValueError(
                f"the text encoder {name!r} is another one ({self.digest[:12]}) than the one that embedded the "
                f"training data ({digest[:12]}): name that one (text_encoder)"
            )
        self.dim = int(self._encoder.encode([""], show_progress_bar=False).shape[1])

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Return conditions with `text` [B, L, D], `text_mask` [B, L] and `pooled` [B, D], float32 on the CPU.

        L is the number of tokens of the longest caption; captions above the encoder's limit are truncated.

        Raises:
            ValueError: there are no captions.
        """
        if not captions:
            raise ValueError("give at least one caption")
        with torch.no_grad():
            encoded = self._encoder.encode(list(captions), output_value=None, show_progress_bar=False)
        tokens = [self._tokens(e) for e in encoded]
        return Conditioning.of_text(tokens, torch.stack([e["sentence_embedding"].float().cpu() for e in encoded]))

    @staticmethod
    def _tokens(encoded: dict[str, Any]) -> Tensor:
        """Return the embeddings of the tokens of one caption, without padding."""
        return encoded["token_embeddings"][encoded["attention_mask"].bool()].float().cpu()
