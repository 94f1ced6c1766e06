"""The registered model as an MLflow pyfunc. Logged as code: imports mlflow and ddpm only, so any server can load it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas  # comes with mlflow
import torch

from ddpm.generate import to_uint8
from ddpm.interop import load_model


class DiffusionModel(mlflow.pyfunc.PythonModel):
    """Class labels in, images out."""

    def load_context(self, context: Any) -> None:
        """Read the model folder; on a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(Path(context.artifacts["model"]), device)
        self.device = device

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """One image per row.

        Args:
            context: unused.
            model_input: a table with the column `label` (class index); for a model without classes its rows only count.
            params: guidance_scale (negative: the model's default), steps (0: the model's default), seed.

        Returns:
            uint8 images [N, H, W, C].
        """
        params = params or {}
        scale, steps = params.get("guidance_scale", -1.0), params.get("steps", 0)
        settings = self.model.spec.sampling
        settings = replace(
            settings,
            scale=settings.scale if scale < 0 else scale,
            steps=settings.steps if steps <= 0 else steps,
        )
        rows = len(model_input)
        labels = None
        if self.model.spec.classes:
            labels = torch.as_tensor(model_input["label"].to_numpy(copy=True), dtype=torch.long)
        images = self.model.generate(
            labels.to(self.device) if labels is not None else None,
            seed=int(params.get("seed", 0)),
            settings=settings,
            images=torch.arange(rows, device=self.device),
        )
        return to_uint8(images).cpu().numpy()


mlflow.models.set_model(DiffusionModel())
