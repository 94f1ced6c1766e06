"""Stored runs and their records: list them, remove one, and collect what nothing refers to any more."""

from pipelines.housekeeping.folders import Folder, folders
from pipelines.housekeeping.garbage import GRACE_S, GarbageVerdict, Stored, collect, find_garbage, judge
from pipelines.housekeeping.runs import (
    Removal,
    RemovalError,
    RunSummary,
    find_removal,
    kept_from_training,
    list_runs,
    plan_removal,
    removal_order,
    remove,
    summaries,
)

__all__ = [
    "GRACE_S",
    "Folder",
    "GarbageVerdict",
    "Removal",
    "RemovalError",
    "RunSummary",
    "Stored",
    "collect",
    "find_garbage",
    "find_removal",
    "folders",
    "judge",
    "kept_from_training",
    "list_runs",
    "plan_removal",
    "removal_order",
    "remove",
    "summaries",
]
