"""Trainings that were given a picture which somebody has asked to forget: signed records, and the gate's line.

A record says from which ordinal on a training had been given the picture, so that it holds for versions that are
registered later, too. It names neither the picture nor where it came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.checkpoints import mentioned
from pipelines.registry.verdict import VerdictRow
from pipelines.signing import Authority, SignatureError, Trust, seal, unseal
from pipelines.storage import NotFoundError, Storage, join, layout
from pipelines.tracking import ModelVersion

FORGET_TAG = "forget_request"
"""Tag of a version that had been given a picture which is to be forgotten: the id of the request."""


@dataclass(frozen=True)
class ForgetRecord:
    """A request to forget a picture, and what had been given it.

    Attributes:
        query: SHA-256 of the picture, or the key or digest by which it was named.
        images: SHA-256 of the stored images.
        at: when it was asked for, in UTC.
        reason: as it was given.
        trainings: MLflow run -> ordinal from which on it had been given one of the images; -1 where it began from a
            model that had, or where that is not known.
    """

    query: str
    images: tuple[str, ...]
    at: str
    reason: str
    trainings: Mapping[str, int]

    @property
    def id(self) -> str:
        """Digest of the images: equal requests are one."""
        return hashlib.sha256("".join(sorted(self.images)).encode()).hexdigest()[:16]

    def concerns(self, run_id: str, images_seen: int) -> bool:
        """Return whether a model of a run at so many images had been given one of the images."""
        first = self.trainings.get(run_id)
        return first is not None and images_seen > first


def write_record(record: ForgetRecord, root: str, storage: Storage, authority: Authority) -> ForgetRecord:
    """Write a record below a root, signed, or add its trainings to the one that is there; return what is there then."""
    place = layout.forget_file(record.id)
    written = [record]

    def change(stored: bytes | None) -> bytes:
        try:
            present = None if stored is None else _of_plain(unseal(stored, place, authority.trust))
        except (SignatureError, KeyError, TypeError, ValueError):  # nobody believes it, so that it says nothing
            present = None
        if present is None:
            written[0] = record
        else:
            trainings = {
                run_id: min(found)
                for run_id in sorted(present.trainings.keys() | record.trainings.keys())
                if (found := [each.trainings[run_id] for each in (present, record) if run_id in each.trainings])
            }
            written[0] = ForgetRecord(present.query, present.images, present.at, present.reason, trainings)
            if stored is not None and written[0] == present:
                return stored
        return seal(asdict(written[0]), place, authority.signer)

    storage.update(join(root, place), change)
    return written[0]


def read_records(root: str, storage: Storage, trust: Trust) -> list[ForgetRecord]:
    """Return the records below a root that somebody who is trusted has signed, in order of their time."""
    found = []
    for entry in storage.list(join(root, layout.FORGOTTEN)):
        name = entry.uri.rpartition("/")[2].removesuffix(".json")
        with suppress(SignatureError, NotFoundError, KeyError, TypeError, ValueError):
            found.append(_of_plain(unseal(storage.read(entry.uri), layout.forget_file(name), trust)))
    return sorted(found, key=lambda record: record.at)


def record_of(
    version: ModelVersion, lineage: Mapping[str, Any], records: Iterable[ForgetRecord]
) -> ForgetRecord | None:
    """Return a record of a picture that a version had been given; None without one.

    Args:
        lineage: of the version, from its evidence or its tags.
    """
    own = [(str(lineage.get("run_id") or version.run_id), int(lineage.get("images_seen") or 0))]
    origin = mentioned(str(lineage.get("init_from_origins") or lineage.get("init_from") or ""))
    own += [(run_id, int(at) if at is not None and at.isdigit() else 1 << 62) for run_id, at in origin]
    return next((record for record in records if any(record.concerns(*each) for each in own)), None)


def forgotten_row(record: ForgetRecord, *, refuse: bool) -> VerdictRow:
    """Return the line of the gate's table about a version that had been given a picture which is to be forgotten."""
    figure = f"given one that was to be forgotten on {record.at} (request {record.id})"
    bound = "none" if refuse else "none, though registry.forgotten=warn lets it pass"
    return VerdictRow("pictures that are to be forgotten", figure, bound, passed=not refuse)


def _of_plain(plain: Mapping[str, Any]) -> ForgetRecord:
    trainings = {str(run_id): int(first) for run_id, first in plain["trainings"].items()}
    images = tuple(str(image) for image in plain["images"])
    return ForgetRecord(str(plain["query"]), images, str(plain["at"]), str(plain["reason"]), trainings)
