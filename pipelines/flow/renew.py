"""Training again when the data have changed: under a name of its own, because a run goes on with its own data only."""

from __future__ import annotations

from pipelines.checkpoints import newest_checkpoint
from pipelines.config import Config
from pipelines.shards.index import read_dataset
from pipelines.shards.quarantine import read_quarantine, stream_digest
from pipelines.storage import Storage


def for_data(config: Config) -> Config:
    """Return the configuration whose run is of the data that are there now.

    That is the given one where its run is of these data, may go on with others (`data.allow_changed`), or is not there
    yet; else one with the name NAME-DIGEST, the same for the same data. The registered model stays the same.

    Raises:
        DatasetError: there is no dataset.
        ModelError: none of the run's checkpoints is complete.
    """
    storage = Storage.of(config)
    state = newest_checkpoint(config)
    dataset = read_dataset(config.data.uri, storage)
    digest = stream_digest(dataset, read_quarantine(config.data.uri, storage))
    if state is None or state.stream_digest == digest or config.data.allow_changed:
        return config
    return config.model_copy(update={"name": f"{config.name}-{digest[:8]}"})
