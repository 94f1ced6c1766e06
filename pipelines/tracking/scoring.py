"""MLflow's scoring protocol (`/invocations`) for a function of ours, read, checked and answered by MLflow's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddpm.inference import check_names
from pipelines.tracking.client import import_mlflow

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


Predict = Callable[[dict[str, list[Any]], dict[str, Any]], NDArray[Any]]
"""(columns of the table, parameters that were given) -> predictions; a ValueError says what is wrong with them."""
TABLES = ("dataframe_split", "dataframe_records", "inputs", "instances")
"""Fields of a body of which one holds the table."""
PARAMS = "params"


class Scoring:
    """Answers like `mlflow models serve` for a pyfunc with this signature; see `table_signature` for the arguments."""

    def __init__(self, columns: Mapping[str, str], output: NDArray[Any], params: Mapping[str, tuple[str, Any]]) -> None:
        import_mlflow()
        from mlflow.models import Model
        from mlflow.pyfunc.scoring_server import invocations  # now, so that no request waits for it

        self._invocations = invocations
        self._columns, self._params = list(columns), list(params)
        self._model = Model(signature=table_signature(columns, output, params))
        self._model.add_flavor("python_function", loader_module="pipelines.served_model")

    def __call__(self, body: Mapping[str, Any], content_type: str, predict: Predict) -> tuple[str, int, str]:
        """Return the answer to a request: its text, status of HTTP and type.

        Args:
            body: the JSON object that was sent.
            content_type: the header of that name.
            predict: called in this thread.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.pyfunc import PyFuncModel

        pyfunc = PyFuncModel(self._model, _Predicting(predict))
        try:
            self._check_names(body)
            answer = self._invocations(dict(body), content_type, pyfunc, self._model.get_input_schema())
        except MlflowException as error:
            refused = _without_traceback(error)
            return refused.serialize_as_json(), refused.get_http_status_code(), "application/json"
        return answer.response, answer.status, answer.mimetype

    def _check_names(self, body: Mapping[str, Any]) -> None:
        """Raise MLflow's error if a body has names that the signature lacks: MLflow would drop them silently."""
        from mlflow.exceptions import MlflowException

        params = body.get(PARAMS)
        try:
            check_names("fields", body, (*TABLES, PARAMS))
            check_names("columns", _column_names(body), self._columns)
            check_names("parameters", params if isinstance(params, dict) else (), self._params)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


class _Predicting:
    """The model that MLflow calls after reading a table."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict

    def predict(self, table: Any, params: dict[str, Any] | None = None) -> NDArray[Any]:
        """Return predictions; a mistake in the request becomes MLflow's error for that."""
        from mlflow.exceptions import MlflowException

        given = {name: value for name, value in (params or {}).items() if value is not None and np.size(value)}
        given = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in given.items()}
        columns = {str(name): values.tolist() for name, values in table.items() if not values.isna().all()}
        try:
            return self._predict(columns, given)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


def _without_traceback(error: Any) -> Any:
    """Return an error of MLflow without the traceback that it sends for unexpected errors.

    Raises:
        Exception: the unexpected error, unless it is about the type of a value.
    """
    from mlflow.exceptions import MlflowException

    if "stack_trace" not in error.json_kwargs:
        return error
    cause = error.__context__
    if not isinstance(cause, TypeError | ValueError | ArithmeticError | LookupError):
        raise cause
    return MlflowException.invalid_parameter_value(f"a value is of another type than it should be: {cause}")


def _column_names(body: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the column names of a body's table; nothing if it has another form, which MLflow refuses."""
    for field in TABLES:
        table = body.get(field)
        if field == "dataframe_split":
            names = table.get("columns") if isinstance(table, dict) else None
            yield from names if isinstance(names, list) else ()
        else:
            for row in table if isinstance(table, list) else [table]:
                yield from row if isinstance(row, dict) else ()


def version_of_mlflow() -> str:
    """Return MLflow's version, the answer of `/version` in its protocol."""
    return str(import_mlflow().__version__)
