"""The stages of a configuration."""

from __future__ import annotations

from typing import Any

from pipelines.config import Config
from pipelines.flow.ingest import Ingest
from pipelines.flow.judge import Evaluate, MakeEvaluator, Promote, Register
from pipelines.flow.stage import Stage
from pipelines.flow.train import Train


def stages(config: Config) -> tuple[Stage[Any], ...]:
    """Return the stages of a configuration, each after those that it needs.

    Args:
        config: with every address filled in.
    """
    parts = (Ingest, Train, MakeEvaluator, Evaluate, Register, Promote)
    return tuple(part(config) for part in parts)
