"""Retention of published checkpoints by `checkpoint.keep_best`: which ones stay, and the deletion of the others."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from pipelines.checkpoints.catalog import delete_checkpoint
from pipelines.checkpoints.published import BEST, Published, record_published
from pipelines.storage import Fence, Storage
from pipelines.tracking import ModelVersion, Tracker

_MODEL = re.compile(r"runs:/([0-9a-f]+)(?:/(\d+))?")


def names_checkpoint(version: ModelVersion, run_ids: Container[str], images_seen: int | None) -> bool:
    """Return whether a version was made from a published checkpoint, or has it in its tags, such as a guiding network.

    A mention of the run that says no number of images may mean any of its checkpoints.

    Args:
        run_ids: the runs that the checkpoint may be of.
        images_seen: of the checkpoint; None for any of these runs.
    """
    made_at = version.tags.get("images_seen")
    made = version.run_id in run_ids and (made_at is None or images_seen is None or made_at == str(images_seen))
    return made or any(mentions(value, run_ids, images_seen) for value in version.tags.values())


def mentions(text: str, run_ids: Container[str], images_seen: int | None) -> bool:
    """Return whether a text has a MODEL reference to a published checkpoint of these runs; see `names_checkpoint`."""
    return any(
        run_id in run_ids and (at is None or images_seen is None or int(at) == images_seen)
        for run_id, at in mentioned(text)
    )


def mentioned(text: str) -> list[tuple[str, str | None]]:
    """Return the MODEL references to checkpoints in a text: (MLflow's run, images seen or None for any)."""
    return [(run_id, at or None) for run_id, at in _MODEL.findall(text)]


def superseded(
    records: Sequence[Published],
    keep_best: int,
    run_id: str,
    versions: Iterable[ModelVersion],
    references: Iterable[str],
) -> list[Published]:
    """Return the published checkpoints of a run that may be deleted, oldest first.

    All stay but scored ones: what has no score may be about to be scored, or be kept for another reason. Of the scored
    ones those with the lowest Frechet distance stay, the newest checkpoint, and what something names.

    Args:
        keep_best: how many of the best stay.
        versions: of all registered models.
        references: the MODELs that other runs name.
    """
    there = sorted((p for p in records if not p.deleted), key=lambda p: p.images_seen)
    scored = [p for p in there if BEST in p.scores]
    best = sorted(scored, key=lambda p: (p.scores[BEST], p.images_seen))[:keep_best]
    versions, references = list(versions), list(references)

    def named(published: Published) -> bool:
        images = published.images_seen
        return any(names_checkpoint(version, {run_id}, images) for version in versions) or any(
            mentions(reference, {run_id}, images) for reference in references
        )

    return [p for p in scored if p not in best and p is not there[-1] and not named(p)]


def retire(storage: Storage, tracker: Tracker, fence: Fence | None, published: Published) -> Published:
    """Delete a published checkpoint, and return its record, which keeps its scores and is marked as deleted.

    The record comes first: where the deletion is interrupted, nothing names what is left, and `ddpm gc` deletes that.

    Raises:
        FencedError: another driver has taken over the run; nothing is deleted.
    """
    if fence is not None:
        fence.check()
    deleted = replace(published, deleted=True)
    record_published(tracker, deleted)
    delete_checkpoint(storage, published.uri)
    return deleted
