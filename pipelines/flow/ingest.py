"""The first stage: a source of images becomes a dataset of shards, and what that changed or left out is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from pipelines.config import Config, ConfigError
from pipelines.flow.stage import INGEST, Results, Site, Stage, StageSpec, StageStatus, digest
from pipelines.presentation.progress import Display
from pipelines.shards.index import Dataset, DatasetError, read_dataset
from pipelines.shards.ingest.collect import Filters
from pipelines.shards.ingest.encode import CaptionEncoder
from pipelines.shards.ingest.write import Ingested, ingest, source_digest
from pipelines.storage import Storage, join, layout
from pipelines.training import prepare
from pipelines.training.resources import connect_ray

INGEST_SETTINGS = (
    "image_size",
    "channels",
    "geometry",
    "encoding",
    "shard_samples",
    "shard_bytes",
    "test_fraction",
    "text_encoder",
)
LATER_SETTINGS = ("min_side", "max_aspect", "min_caption", "min_score", "near_duplicates")
"""Settings that count once they differ from their defaults, because datasets were written before there were any."""
SHOWN = 20
"""Lines of a list that are shown; the report has all of them."""


@dataclass(frozen=True)
class Ingest(Stage[Dataset]):
    """Write `data.source` as shards to `data.uri`; without a source, what lies there is used as it is."""

    spec: ClassVar[StageSpec] = INGEST

    @property
    def output(self) -> str:
        """Address of the dataset."""
        return self.config.data.uri

    def inputs(self, site: Site, given: Results) -> dict[str, str]:
        """Return the digest of the source's state and of the settings of an ingest; none without a source."""
        if self.config.data.source is None:
            return {}
        return {"source": ingest_key(self.config)}

    def done(self, site: Site, given: Results, inputs: Mapping[str, str]) -> StageStatus[Dataset]:
        """Look whether the dataset was written from this source, as it is now, with these settings.

        Raises:
            DatasetError: there is neither a source nor a dataset.
        """
        data, storage = self.config.data, site.storage
        if data.source is None:
            dataset = read_dataset(data.uri, storage)
            return StageStatus(dataset, f"data.source is not set, {data.uri} is used as it is")
        recorded = storage.find(join(data.uri, layout.INGEST_KEY))
        if recorded is None:
            return StageStatus(None, f"{data.uri} holds no dataset that a flow has finished")
        if recorded.decode() != inputs["source"]:
            return StageStatus(None, f"{data.uri} was made from another state of {data.source}, or with other settings")
        try:
            dataset = read_dataset(data.uri, storage)
            prepare.check_dataset(dataset, self.config)
        except DatasetError as error:
            return StageStatus(None, str(error))
        return StageStatus(dataset, f"{data.uri} holds this input already (digest {dataset.digest[:12]})")

    def run(self, site: Site, given: Results) -> Dataset:
        """Write the dataset.

        Raises:
            DatasetError: the source has another number of classes, say, than the configuration.
        """
        connect = partial(connect_ray, self.config)
        local = self.config.storage.local_stack  # whose tasks start later than this process has written some images
        if not local:
            connect()
        dataset = write_dataset(self.config, site.display, connect if local else None).dataset
        prepare.check_dataset(dataset, self.config)
        return dataset


def write_dataset(config: Config, display: Display, connect: Callable[[], object] | None = None) -> Ingested:
    """Ingest `data.source` with the settings of the configuration, and record the ingest key.

    The work runs on Ray where this process is connected to a cluster that can read the source and write the dataset.

    Args:
        connect: as for `ingest`.

    Raises:
        ConfigError: there is no such text encoder.
    """
    storage = Storage.of(config)
    data = config.data
    assert data.source is not None
    key, encoder = ingest_key(config), _text_encoder(data.text_encoder)
    storage.delete(join(data.uri, layout.INGEST_KEY))  # an interrupted ingest must not look finished
    display.stage("ingest", f"{data.source} -> {data.uri}")
    done = ingest(
        data.source,
        data.uri,
        storage,
        image_size=data.image_size,
        channels=data.channels,
        shard_samples=data.shard_samples,
        shard_bytes=data.shard_bytes,
        test_fraction=data.test_fraction,
        geometry=data.geometry,
        encoding=data.encoding,
        text_encoder=encoder,
        filters=Filters(**data.model_dump(include=set(LATER_SETTINGS))),
        progress=display.counter("ingest", "images"),
        notice=lambda text: display.stage("ingest", text),
        connect=connect,
    )
    storage.write(join(data.uri, layout.INGEST_KEY), key.encode())
    show_ingested(done, display)
    return done


def show_ingested(done: Ingested, display: Display) -> None:
    """Show what was written, how images were changed, and the names of those that were left out."""
    dataset = done.dataset
    _show_some(display, "left out", [f"{bad.origin}: {bad.reason}" for bad in done.bad])
    _show_some(display, "empty", [f"class {name} has no readable image" for name in done.empty_classes])
    for line in done.report.lines():
        display.stage("note", line)
    if done.reused_shards:
        shards = sum(map(len, dataset.splits.values()))
        display.stage("ingest", f"{done.reused_shards:,} of {shards:,} shards were finished before and are whole")
    counts = ", ".join(f"{dataset.samples(split):,} {split}" for split in dataset.splits)
    classes = f"{len(dataset.classes)} classes, digest {dataset.digest[:12]}"
    display.stage("dataset", f"{dataset.uri}: {counts}, {classes}, {len(done.bad)} left out")
    display.stage("report", join(dataset.uri, layout.INGEST_REPORT))


def _show_some(display: Display, name: str, lines: list[str]) -> None:
    """Show the first lines of a list, and how many more there are."""
    for line in lines[:SHOWN]:
        display.stage(name, line)
    if len(lines) > SHOWN:
        display.stage(name, f"… and {len(lines) - SHOWN:,} more; ingest-report.json has all {len(lines):,}")


def _text_encoder(name: str | None) -> CaptionEncoder | None:
    """Load the text encoder of this name or path.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if name is None:
        return None
    from pipelines.shards.text import TextEncoder

    try:
        return TextEncoder(name)
    except ValueError as error:
        raise ConfigError(f"data.text_encoder: {error}") from error


def ingest_key(config: Config) -> str:
    """Return the digest of the input and of every setting that decides what an ingest writes.

    The versions of this code and of Pillow are left out: an upgrade must not rewrite a dataset that runs train on.
    """
    data = config.data
    assert data.source is not None
    settings = data.model_dump(mode="json", include=set(INGEST_SETTINGS))
    settings |= data.model_dump(mode="json", include=set(LATER_SETTINGS), exclude_defaults=True)
    return digest([source_digest(data.source, Storage.of(config)), settings])
