"""Text encoders, which turn captions into token embeddings and a pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


class TextEncoder:
    """A text encoder whose weights are not trained.

    Args:
        name: hub name or folder of a `sentence-transformers` model or any `transformers` encoder. For an encoder
            without pooling, the pooled vector is the mean over tokens.
        device: device on which it runs.

    Attributes:
        dim: width of the embeddings; equals `text_dim` of a network that uses them.

    Raises:
        ValueError: the extra `text` is not installed, or the encoder cannot be loaded.
    """

    def __init__(self, name: str = DEFAULT_ENCODER, device: str = "cpu") -> None:
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise ValueError("text encoders need the extra `text`: pip install 'ddpm-pipelines[text]'") from error
        disable_progress_bar()  # of reading the weights, among the lines of whoever shows progress
        try:
            self._encoder: Any = SentenceTransformer(name, device=device)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the text encoder {name!r}: {str(error).splitlines()[0]}") from error
        self.name = name
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
