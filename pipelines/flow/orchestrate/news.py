"""Whether the data of an experiment are others than those that its runs have seen, by digests alone."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.checkpoints import newest_checkpoint
from pipelines.config import Config
from pipelines.flow.ingest import Ingest
from pipelines.flow.renew import for_data
from pipelines.flow.stage import Results, Site
from pipelines.presentation.progress import Silent
from pipelines.shards.quarantine import read_quarantine, stream_digest
from pipelines.storage import Storage


@dataclass(frozen=True)
class News:
    """What is known of the data of an experiment.

    Attributes:
        digest: of the source's state and the settings of an ingest, without a source of the dataset; and of what is in
            quarantine.
        new: whether no run has seen these data.
        reason: in words.
    """

    digest: str
    new: bool
    reason: str


def look(config: Config, storage: Storage) -> News:
    """Look whether there are data that no run of an experiment has seen; nothing is started or written.

    Raises:
        PipelineError: there are no data, or they cannot be reached.
    """
    found = Ingest(config).look(Site(storage, {}, Silent()), Results())
    if found.result is None:
        return News(found.inputs["source"], True, found.reason)
    quarantine = read_quarantine(config.data.uri, storage)
    stream = stream_digest(found.result, quarantine)
    # An ingest turns a source into a dataset, and that is no news.
    digest = found.inputs.get("source", found.result.digest) + (quarantine.digest if quarantine else "")
    current = for_data(config, storage)
    if newest_checkpoint(current, storage) is None:
        return News(digest, True, f"no run has seen the data of digest {stream[:12]}")
    return News(digest, False, f"run '{current.name}' is of the data of digest {stream[:12]}")
