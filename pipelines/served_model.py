"""The registered model as an MLflow pyfunc. Logged as code: imports mlflow and ddpm only, so any server can load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas  # comes with mlflow
import torch

from ddpm.generate import to_uint8
from ddpm.model import load_model


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
            params: scale of the guidance (negative: the model's default; `guidance_scale` is read too), steps (0: the
                model's default), seed.

        Returns:
            uint8 images [N, H, W, C].
        """
        params = params or {}
        scale = max(params.get("scale", -1.0), params.get("guidance_scale", -1.0))
        steps = params.get("steps", 0)
        changed = {"scale": scale} if scale >= 0 else {}
        changed |= {"steps": steps} if steps > 0 else {}
        sampling = self.model.spec.sampling.with_fields(**changed)
        rows = len(model_input)
        labels = None
        if self.model.spec.classes:
            labels = torch.as_tensor(model_input["label"].to_numpy(copy=True), dtype=torch.long)
        images = self.model.generate(
            labels.to(self.device) if labels is not None else None,
            seed=int(params.get("seed", 0)),
            sampling=sampling,
            image_ids=torch.arange(rows, device=self.device),
        )
        return to_uint8(images).cpu().numpy()


mlflow.models.set_model(DiffusionModel())
