"""Addresses of MLflow's pages, relative to the address of the server.

MLflow has a view for language-model traces and one for model training. It opens the one in the query of the address, or
else the one that the browser opened last, at first the one for traces.
"""

from __future__ import annotations

from urllib.parse import quote

_TRAINING = "?workflowType=machine_learning"


def run_page(experiment_id: str, run_id: str, tab: str = "") -> str:
    """Return the address of a run's page.

    Args:
        tab: "model-metrics", "system-metrics", "artifacts" or "artifacts/NAME" of a file outside folders; "" for the
            overview.
    """
    return f"#/experiments/{experiment_id}/runs/{run_id}{'/' * bool(tab)}{quote(tab)}{_TRAINING}"


def version_page(name: str, version: str) -> str:
    """Return the address of the page of a registered model's version."""
    return f"#/models/{quote(name, safe='')}/versions/{version}{_TRAINING}"


def artifact(run_id: str, name: str) -> str:
    """Return the address of an artifact itself, such as a picture that a text shows."""
    return f"get-artifact?run_uuid={run_id}&path={quote(name, safe='/')}"
