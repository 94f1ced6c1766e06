"""What becomes of the winner of a study: a new model version, or a configuration that can be trained."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines import registry, tracking
from pipelines.config import Config, sampling_overrides
from pipelines.display import Silent, StageNotice
from pipelines.errors import PipelineError
from pipelines.references import Resolved
from pipelines.search.confirmation import Confirmed
from pipelines.search.space import apply
from pipelines.search.study import StudyStore, TrialRecord
from pipelines.storage import Storage, join
from pipelines.tracking import ModelVersion, Tracker

CONFIRMED, UNCONFIRMED = "config", "config-unconfirmed"
"""Names of the configuration of a winner, and of that of the best trial where nothing is confirmed."""


@dataclass(frozen=True)
class _Lines(Silent):
    """A `Display` of lines alone, for work beside the live table of a study."""

    notice: StageNotice

    def stage(self, name: str, text: str) -> None:
        """Show one line of a stage."""
        self.notice(name, text)


def show_winner(winner: Confirmed | None, notice: StageNotice) -> None:
    """Say which trial has won, and by how much, or that none has."""
    if winner is None:
        notice("study", "no setting beats the default by more than chance")
        return
    assert winner.gain is not None
    notice("study", f"trial {winner.trial} beats the default by {gained(winner)} on fresh noise")


def gained(winner: Confirmed) -> str:
    """Return in words by how much a winner is better than the default."""
    gain = winner.gain
    assert gain is not None
    return f"{gain.value:.4g} in {winner.measure} (95 %: {gain.low:.4g} to {gain.high:.4g}; p = {winner.p:.2g})"


def register_winner(
    winner: Confirmed | None, resolved: Resolved, study: str, config: Config, storage: Storage, notice: StageNotice
) -> ModelVersion | None:
    """Score a registered version with the winner's settings and register that as a new version; no guarded alias moves.

    Args:
        resolved: the model of the study.
        study: its name.
        notice: called with lines for the user, such as the command that moves the alias.

    Returns:
        The new version; None without a winner, or where the model is no registered version.
    """
    show_winner(winner, notice)
    if winner is None:
        return None
    overrides = " ".join(sampling_overrides(winner.settings))
    at_hand = f"register it with `ddpm register {resolved.reference} {overrides}`"
    if resolved.version is None:
        notice("study", f"the model is no registered version: {at_hand}")
        return None
    named = config.registry.model_copy(update={"model": resolved.version.name})
    try:
        version = registry.register_scored(
            resolved,
            winner.settings,
            config.model_copy(update={"registry": named}),
            storage,
            _Lines(notice),
            lambda: None,  # the study is connected
        )
    except PipelineError as error:  # what the study found is not lost for it
        notice("study", f"the winner is not registered: {error}; {at_hand}")
        return None
    assert resolved.tracker is not None
    if "study" not in version.tags:  # of an earlier study that found the same
        tags = {"study": study, "study.gain": gained(winner)}
        tracking.set_version_tags(resolved.tracker.uri, version.name, version.version, tags)
    notice(
        "study", f"{version.uri} serves these settings; `ddpm promote {version.uri} --alias {config.registry.alias}`"
    )
    return version


def write_best(
    config: Config, top: TrialRecord | None, winner: Confirmed | None, store: StudyStore, tracker: Tracker
) -> str | None:
    """Write the configuration of a training study's winner, or of its best trial under a name that says what it is.

    Args:
        config: the configuration that the trials vary.
        top: the best trial by its own score.

    Returns:
        The address of the file, ready for `ddpm train --config`; None where no trial finished.
    """
    found = winner or top
    if found is None:
        return None
    name, other = (CONFIRMED, UNCONFIRMED) if winner is not None else (UNCONFIRMED, CONFIRMED)
    chosen = apply(config, found.params).model_copy(update={"name": f"{store.name}-best"})
    text = tracking.to_json(chosen.model_dump(mode="json"))
    with tracking.recording("has not got the best configuration"):
        tracker.text(text, f"best/{name}.json")
    where = join(store.uri, "best", f"{name}.json")
    store.storage.write(where, text.encode())
    store.storage.delete(join(store.uri, "best", f"{other}.json"))  # of an earlier call of this study
    return where
