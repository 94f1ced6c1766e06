"""The signature of a pyfunc whose columns and parameters are all optional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mlflow.models import ModelSignature


def table_signature(
    columns: Mapping[str, str], output: NDArray[Any], params: Mapping[str, tuple[str, Any]]
) -> ModelSignature:
    """Return the signature of a pyfunc from a table to an array.

    Args:
        columns: column -> type of its values: "any", or MLflow's name of a type, such as "long".
        output: an example; its first axis is that of the rows.
        params: parameter -> (type, default). None means no value, and a list makes the parameter a list.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    inputs = [ColSpec(AnyType() if kind == "any" else kind, name, required=False) for name, kind in columns.items()]
    lists = {name: (-1,) if isinstance(default, list) else None for name, (_, default) in params.items()}
    return ModelSignature(
        Schema(inputs),
        Schema([TensorSpec(np.dtype(output.dtype), (-1, *output.shape[1:]))]),
        ParamSchema([ParamSpec(name, kind, default, lists[name]) for name, (kind, default) in params.items()]),
    )
