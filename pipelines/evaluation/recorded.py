"""Scores among the artifacts of a run: signed, under a name that is the digest of all that decides them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines import tracking
from pipelines.evaluation.samples import SampleFiles
from pipelines.evaluation.scores import Scores
from pipelines.presentation.progress import Notice, no_notice
from pipelines.signing import Authority, SignatureError, Trust, seal, unseal
from pipelines.storage import layout
from pipelines.tracking import CheckpointModel, Tracker


@dataclass(frozen=True)
class Scored:
    """The result of an evaluation, as a run records it.

    Attributes:
        artifact: name of the file of the scores among the artifacts of the run.
        images_seen: by the model in its training.
        dataset: (name, digest) of the data that it was compared with.
        pictures: by their keys, uint8 [H, W, 3]; none where the scores were read.
        terms: of the variational bound by timestep, as JSON; None where there are none.
        at_ms: when it was made, in milliseconds since the epoch; None where the scores were read.
        files: of the samples that were drawn; None where the scores were read.
    """

    scores: Scores
    artifact: str
    images_seen: int
    dataset: tuple[str, str]
    pictures: Mapping[str, NDArray[np.uint8]]
    terms: str | None
    at_ms: int | None
    files: SampleFiles | None = None

    @property
    def fresh(self) -> bool:
        """Whether the scores were computed now."""
        return self.at_ms is not None

    def record(
        self,
        tracker: Tracker,
        model: CheckpointModel | None,
        authority: Authority | None,
        *,
        own: bool = True,
        shown: bool = True,
    ) -> None:
        """Record scores and pictures in a run; the file last, by which a later evaluation finds the scores.

        Done again after an interruption, everything is there once.

        Args:
            authority: signs the scores and samples; None where nobody can, and then the next who needs them makes both
                again.
            model: the logged model of the checkpoint, which gets the scores too; None where it has none.
            own: whether the run scores its checkpoints so; pictures of another evaluation have keys of their own.
            shown: whether the curves of the run and its Score line get them; no others take the place of its own.
        """
        at_ms = int(time.time() * 1000) if self.at_ms is None else self.at_ms
        if shown and model is None:
            tracker.metrics(self.scores.metrics(), self.images_seen, at_ms)
        elif shown and model is not None:
            tracking.log_scores(tracker, model, self.scores.metrics(), self.dataset, at_ms)
        for kind, picture in self.pictures.items():
            key = kind if own else f"{kind}{_suffix(self.artifact)}"
            if model is None or not tracker.has_picture(key, self.images_seen):
                tracker.image(key, picture, self.images_seen)
        if self.terms is not None:
            tracker.text(self.terms, self.artifact.replace(layout.SCORES_RECORDED, layout.BOUND_TERMS, 1))
        text = tracking.to_json(self.scores.to_plain())
        if authority is not None:
            if self.files is not None:
                self.files.signed(authority)
            sealed = seal({"sha256": _sha256(text)}, self.artifact, authority.signer)
            tracker.text(sealed.decode(), _signature(self.artifact))
        tracker.text(text, self.artifact)
        if shown:
            scored = "; ".join(f"{name} {text}" for name, text in self.scores.lines())
            tracking.describe(tracker, {"Score": f"at {self.images_seen:,} images: {scored}."})


def _suffix(artifact: str) -> str:
    """Return what the keys of an evaluation's pictures end with, where its run scores checkpoints otherwise."""
    return f"-{artifact.rpartition('-')[2][:8]}"


def evaluation_pictures(names: Iterable[str], artifact: str | None, images_seen: int) -> dict[str, str]:
    """Return key -> artifact of the pictures at a number of images seen; those of one evaluation, where it has its own.

    Args:
        names: artifacts of a run, its pictures among them.
        artifact: of the scores of the evaluation; None where it is not known, and the run's own pictures are meant.
    """
    found = tracking.pictures_at(names, images_seen)
    if artifact is None:
        return found
    suffix = _suffix(artifact)
    return found | {key.removesuffix(suffix): name for key, name in found.items() if key.endswith(suffix)}


def find_artifact(tracker: Tracker, scores: Scores, images_seen: int) -> str | None:
    """Return the artifact of a run that has these scores of its model; None without one."""
    for name in tracker.names(layout.SCORES_RECORDED):
        if name.startswith(f"{layout.SCORES_RECORDED}/{images_seen:012d}-"):
            with suppress(LookupError, TypeError, ValueError):  # those of a newer release may not be understood
                if read_scores(tracker, name) == scores:
                    return name
    return None


def recorded(tracker: Tracker, artifact: str, trust: Trust, notice: Notice = no_notice) -> Scores | None:
    """Return the scores in an artifact of a run; None where it has none that somebody who is trusted has signed."""
    if artifact not in tracker.names(layout.SCORES_RECORDED):
        return None
    text = tracker.read_text(artifact)
    try:
        if _signature(artifact) not in tracker.names(layout.SIGNATURES):
            raise SignatureError("they are not signed")
        signed = unseal(tracker.read_text(_signature(artifact)).encode(), artifact, trust)
        if signed["sha256"] != _sha256(text):
            raise SignatureError("they were changed after they were signed")
    except SignatureError as error:
        notice(f"scored again: the scores that the run has, {artifact}, are not believed: {error}")
        return None
    return Scores.from_plain(json.loads(text))


def _signature(artifact: str) -> str:
    """Return the name of the artifact that has the signature of scores."""
    return artifact.replace(layout.SCORES_RECORDED, layout.SIGNATURES, 1)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_scores(tracker: Tracker, artifact: str) -> Scores:
    """Return the scores in an artifact of a run."""
    return Scores.from_plain(json.loads(tracker.read_text(artifact)))
