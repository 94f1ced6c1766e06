"""The registered model as an MLflow pyfunc. Logged as code: imports mlflow and ddpm only, so any server can load it."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas  # comes with mlflow
import torch
from mlflow.exceptions import MlflowException
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.inference import draw_table
from ddpm.model import TEXT_ENCODER, check_text_encoder, load_model
from ddpm.tensor_files import tensors_digest


class DiffusionModel(mlflow.pyfunc.PythonModel):
    """Labels, prompts, or images with masks or strengths in; pictures out."""

    def load_context(self, context: Any) -> None:
        """Read the model folder; on a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.folder = Path(context.artifacts["model"])
        self.model = load_model(self.folder, device)
        self.encoder: Any = None

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """One picture per row; see `ddpm.inference.draw_table`.

        Args:
            context: unused.
            model_input: a table with some of the columns `label` (name or index of a class), `prompt`, `image` with
                `mask` or `strength`, and `seed`. Pictures are the bytes of a PNG file of the model's size, or their
                base64 text; white pixels of a mask are filled. For a model without classes the labels only count.
            params: sampling settings by their names, such as `scale`, `steps`, `kind` (of the sampler) and `interval`;
                `seed` of all rows where there is no such column, `negative_prompt`, and the `method` of inpainting.
                Those that are None are the model's own.

        Returns:
            uint8 images [N, H, W, C].

        Raises:
            MlflowException: the model cannot do what is asked; the message says what it can.
        """
        given = {name: value for name, value in (params or {}).items() if value is not None and np.size(value)}
        given = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in given.items()}
        columns = {str(name): values.tolist() for name, values in model_input.items() if not values.isna().all()}
        try:
            return draw_table(self.model, columns, given, encode=self._encode, decode=_decode).numpy()
        except ValueError as error:  # which a server would not show to whom it answers
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        """Return the embeddings of texts by the encoder that embedded the model's training data."""
        if self.encoder is None:
            self.encoder = self._load_encoder()
        encoded = self.encoder.encode(list(texts), output_value=None, show_progress_bar=False)
        tokens = [e["token_embeddings"][e["attention_mask"].bool()].float().cpu() for e in encoded]
        return Conditioning.of_text(tokens, torch.stack([e["sentence_embedding"].float().cpu() for e in encoded]))

    def _load_encoder(self) -> Any:
        """Load the text encoder that the model carries, or else the one that it names."""
        own, lineage = self.folder / TEXT_ENCODER, self.model.spec.lineage
        name = str(own) if own.is_dir() else lineage.get("text_encoder")
        if name is None:
            raise ValueError("the model does not say which text encoder embedded its training data")
        try:
            from sentence_transformers import SentenceTransformer

            if own.is_dir():
                check_text_encoder(own)
            encoder = SentenceTransformer(name, device="cpu")
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"prompts cannot be embedded here by {name}: {error}") from error
        digest = lineage.get("text_encoder_digest")
        if digest is not None and tensors_digest(dict(encoder.named_parameters())) != digest:
            raise ValueError(f"the text encoder {name} is another one than the one that embedded the training data")
        return encoder


def _decode(value: Any, channels: int, what: str) -> Tensor:
    """Return the pixels of an encoded picture, or of its base64 text, uint8 [H, W, C].

    As in the pictures that a model is trained on, an EXIF orientation is applied, 16 bits are scaled to 8, and what is
    transparent in an image is white; a mask has its own pixels.
    """
    from PIL import Image, ImageOps

    damaged: tuple[type[Exception], ...] = (  # what Pillow's decoder raises for damaged files
        *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, RuntimeError),
        *(struct.error, zlib.error, Image.DecompressionBombError),
    )
    try:
        text = value.removeprefix("data:image/png;base64,") if isinstance(value, str) else None
        data = bytes(value) if text is None else base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            opened.load()
            with contextlib.suppress(*damaged):  # an EXIF that cannot be read says nothing
                ImageOps.exif_transpose(opened, in_place=True)
            image: Image.Image = opened
            if image.mode.startswith("I;16"):
                wide = np.asarray(image).astype(np.uint32)
                image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
            elif what == "image" and image.has_transparency_data:
                image = Image.new("RGBA", opened.size, "white")
                image.alpha_composite(opened.convert("RGBA"))
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except damaged as error:
        raise ValueError(f"the {what} cannot be read ({error}): send a PNG file, or its base64 text") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels)


mlflow.models.set_model(DiffusionModel())
