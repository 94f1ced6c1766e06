"""The identity of a run: a random id, in its folder and as a tag of its MLflow run.

Neither a name nor an address tells: a root may be moved, mounted or spelt otherwise, and the trainings of two roots may
have one name on one MLflow server. A run of an earlier release gets its id at its next start.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping

from pipelines import checkpoints, tracking
from pipelines.config import Config
from pipelines.storage import ConflictError, NotFoundError, Storage, join, layout
from pipelines.tracking import FIRST_ANSWER_S, ID_TAG, Tracker
from pipelines.training.errors import TrainingError

VERSION = 1


def read_run_id(storage: Storage, folder: str) -> str | None:
    """Return the id of the run whose folder lies at an address; None where it has none.

    Raises:
        TrainingError: the file that holds it is damaged.
    """
    try:
        return str(json.loads(storage.read(join(folder, layout.RUN)))["id"])
    except NotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f'{join(folder, layout.RUN)} is damaged: it should hold {{"id": …}} with what the tag {ID_TAG} of '
            "the run's MLflow run says; write that, or bring the file back"
        ) from error


def find_training_run(config: Config, patience_s: float = FIRST_ANSWER_S) -> Tracker | None:
    """Return the MLflow run of the configuration's run; None where there is none.

    Args:
        patience_s: how long to wait for MLflow's first answer.

    Raises:
        TrackingError: no MLflow server answers.
        TrainingError: the MLflow run of its name is that of a run in another folder.
    """
    uri, folder = config.tracking.server, checkpoints.run_folder(config)
    found = tracking.runs_of(uri, config.tracking.experiment, config.name, patience_s)
    if not found:
        return None
    own = read_run_id(Storage.of(config), folder)
    ours = [tracker for tracker, run_id in found if run_id is not None and run_id == own]
    ours += [t for t, run_id in found if run_id is None and _is_of(t, config)]
    if ours:
        return ours[0]
    raise TrainingError(
        f"the run '{config.name}' of experiment '{config.tracking.experiment}' in MLflow is another one than that of "
        f"{folder}: its id is {found[0][1] or 'not recorded'}, and that of the folder "
        f"{own or 'not recorded'}. Set another name= or tracking.experiment=, or storage.root= to where that run is "
        f"stored; where its files are gone for good, `ddpm rm {config.name}` makes the name free"
    )


def open_training_run(
    config: Config, tags: Mapping[str, str] | None = None, patience_s: float = FIRST_ANSWER_S
) -> Tracker:
    """Return the MLflow run of the configuration's run, which is made where there is none; both have the run's id.

    Args:
        tags: of an MLflow run that is made.
        patience_s: how long to wait for MLflow's first answer; more where the address was used before.

    Raises:
        TrackingError: no MLflow server answers.
        TrainingError: the MLflow run of its name is that of a run in another folder.
    """
    storage = Storage.of(config)
    while True:
        found = find_training_run(config, patience_s)
        run_id = given_id(storage, checkpoints.run_folder(config))
        if found is not None:
            if found.tag(ID_TAG) is None:
                found.tags({ID_TAG: run_id})
            return found
        opened = {**(tags or {}), ID_TAG: run_id}
        tracker, existed = tracking.open_run(
            config.tracking.server, config.tracking.experiment, config.name, opened, patience_s
        )
        if not existed:  # else somebody was faster, here or in another folder
            return tracker


def given_id(storage: Storage, folder: str) -> str:
    """Return the id of the run whose folder lies at an address, which gets one where it has none."""
    while True:
        found = read_run_id(storage, folder)
        if found is not None:
            return found
        made = uuid.uuid4().hex
        try:
            storage.write_if(join(folder, layout.RUN), json.dumps({"version": VERSION, "id": made}).encode(), None)
        except ConflictError:
            continue
        return made


def _is_of(tracker: Tracker, config: Config) -> bool:
    """Return whether an MLflow run without an id, of an earlier release, is that of the configuration's folder.

    Checkpoints name their MLflow run. A run that was lost before its first one has left something else in its folder.
    """
    storage = Storage.of(config)
    lineage = checkpoints.newest_lineage(config)
    if lineage:
        return lineage.get("run_id") in (None, tracker.run_id)
    folder = checkpoints.run_folder(config)
    return any(entry.uri != join(folder, layout.RUN) for entry in storage.list(folder))
