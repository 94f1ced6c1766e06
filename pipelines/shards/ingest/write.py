"""Ingest a source's images as WebDataset shards: in parallel, resumable, and with the same bytes each time.

The images of a split are divided into shards by count before any of them is opened, so the content of a shard depends
only on the source and the settings. Each shard is one task (`tasks.write_shard`) that runs on any machine and writes a
record. An interrupted ingest continues from the records; `dataset.json` is written last.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ddpm.image_size import ImageSize, in_words
from pipelines.config.sections import Encoding, Geometry
from pipelines.environment.scratch import temporary_folder
from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
from pipelines.shards.forgotten import quarantine_forgotten
from pipelines.shards.index import Dataset, DatasetError, make_dataset
from pipelines.shards.ingest.alike import Fingerprints, fingerprint_part, keep_together
from pipelines.shards.ingest.collect import Filters
from pipelines.shards.ingest.encode import CaptionEncoder, ImageFormat
from pipelines.shards.ingest.manifest import SourceImage
from pipelines.shards.ingest.places import address
from pipelines.shards.ingest.report import BadImage, IngestReport, ShardRecord
from pipelines.shards.ingest.sources import NO_FILTERS, open_source, source_digest
from pipelines.shards.ingest.spool import ahead
from pipelines.shards.ingest.tasks import (
    IngestSettings,
    ShardJob,
    plan_shards,
    samples_for,
    seconds_of_image,
    write_shard,
)
from pipelines.shards.ingest.tasks import identify as identify_encoder
from pipelines.shards.ingest.written import MergedRecords
from pipelines.shards.quarantine import drop_stale_quarantine
from pipelines.storage import Storage, join, layout

__all__ = ["Ingested", "ingest", "source_digest"]

ALONE_S = 20.0
"""Seconds of writing above which Ray tasks are worth starting."""
SHARD_FILES = (layout.SHARD_SUFFIX, layout.INDEX_SUFFIX)
"""Ends of the names of files that belong to a shard."""


@dataclass(frozen=True)
class Ingested:
    """The result of an ingest: what it wrote, and what it left out.

    Attributes:
        dataset: the content of `dataset.json`.
        bad: images and rows that were left out.
        empty_classes: classes without any sample.
        report: the content of `ingest-report.json`.
        reused_shards: number of shards that an earlier ingest had finished.
    """

    dataset: Dataset
    bad: tuple[BadImage, ...]
    empty_classes: tuple[str, ...]
    report: IngestReport
    reused_shards: int = 0


def ingest(
    source: str,
    uri: str,
    storage: Storage,
    *,
    image_size: ImageSize,
    channels: int,
    shard_samples: int = 1000,
    shard_bytes: int | None = None,
    test_fraction: float = 0.1,
    geometry: Geometry = "crop",
    encoding: Encoding = "png",
    text_encoder: CaptionEncoder | None = None,
    filters: Filters = NO_FILTERS,
    workers: int | None = None,
    progress: Progress = no_progress,
    notice: Notice = no_notice,
    connect: Callable[[], object] | None = None,
) -> Ingested:
    """Write a source's images as shards with `dataset.json`; the same input gives the same bytes and digest.

    Shards are written by Ray tasks where this process is connected to a Ray cluster that can reach source and
    destination, else by threads. After an interruption, the same call continues.

    Args:
        source: "digits"; a folder of class folders, with or without `train/` and `test/` above them; a folder with
            metadata.jsonl, .csv or .parquet; a .zip of either; a .csv, .jsonl or .parquet of paths; a .parquet file or
            WebDataset tar that holds pictures, or a folder of such. Paths, file:/// or s3://.
        uri: the folder to write to; `dataset.json` is written last, and then shards of earlier ingests are deleted.
        image_size: height and width of the written images, in pixels; one number for square ones.
        channels: 1 (grey) or 3 (RGB); other images are converted and counted in the report.
        shard_samples: images per shard; images that cannot be read are missing from their shard.
        shard_bytes: approximate size of a shard, instead of `shard_samples`; estimated from the first images.
        test_fraction: fraction of a source without a test split that becomes one, chosen by a hash of the path;
            near-duplicates are in the split of the first one.
        geometry: "crop", "resize" or "keep"; see `ImageFormat`.
        encoding: "png", "jpg", "webp" or "npy"; see `ImageFormat`.
        text_encoder: maps captions to a `Conditioning`, stored as `emb.npy`; see `pack_embeddings`. Ray pickles it.
        filters: which images to leave out; the report counts them by reason.
        workers: number of threads; by default one for two cores, because they take turns at the interpreter: on two
            cores one of them wrote 9,000 digits in 11 seconds and two in 18, and large photographs a tenth faster. Ray
            uses all CPUs of the cluster.
        progress: called with (images done, images in total).
        notice: called with a line that says whether Ray or threads write the shards.
        connect: connects this process to Ray; called where one process would write for more than `ALONE_S` seconds.

    Raises:
        DatasetError: there is no such source, its layout or a setting is invalid, or a split has no readable image.
        StorageError: source or destination cannot be reached; finished shards are kept for the next call.
    """
    form = ImageFormat(image_size, channels, geometry, encoding)
    _check_settings(source, uri, form, shard_samples, shard_bytes, workers)
    listed = open_source(source, storage, join(uri, layout.INGEST_SOURCES), test_fraction, filters)
    if text_encoder is not None and not listed.captioned:
        raise DatasetError(f"{source} has no captions for the text encoder: add `text` or `caption` to its metadata")
    encoder_id = None if text_encoder is None else identify_encoder(text_encoder)
    settings = IngestSettings(uri, storage, form, listed.classes, listed.captioned, text_encoder, encoder_id, filters)
    if shard_bytes is not None:
        shard_samples = samples_for(shard_bytes, listed.images, settings)
    if connect is not None and len(listed.images) * seconds_of_image(listed.images, storage, form) > ALONE_S:
        connect()
    obstacle, threads = _obstacle_to_ray(source, uri), workers or max(1, len(os.sched_getaffinity(0)) // 2)
    written = MergedRecords(listed, settings)
    with temporary_folder("alike") as scratch:
        images: Iterable[SourceImage] = listed.images
        if written.compared:
            prints = Fingerprints(listed.images, join(uri, layout.FINGERPRINTS), filters)
            _fingerprint(prints, threads, notice, over_ray=obstacle is None)
            images = keep_together(listed.images, prints.leaders(scratch), written.alike, remove=written.removes)
        jobs = plan_shards(written.counted(images), settings, shard_samples)
        meter = _Meter(len(listed.images), progress)
        for record, reused in _write_shards(jobs, settings, meter, threads, notice, obstacle):
            written.add(record, reused)
    return _publish(source, written)


def _check_settings(
    source: str, uri: str, form: ImageFormat, shard_samples: int, shard_bytes: int | None, workers: int | None
) -> None:
    """Refuse settings with which no dataset can be written.

    Raises:
        DatasetError: names the setting.
    """
    if source != "digits" and f"{uri.rstrip('/')}/".startswith(f"{address(source)}/"):
        raise DatasetError(f"{uri} lies inside the source {source}, which the next ingest would read: write elsewhere")
    for name, value in (("shard_samples", shard_samples), ("shard_bytes", shard_bytes), ("workers", workers)):
        if value is not None and value < 1:
            raise DatasetError(f"{name} must be at least 1, got {value}")
    if source == "digits" and (form.size, form.channels) != (8, 1):
        size = in_words(form.size)
        raise DatasetError(f"digits are 8x8 grey, not {size} with {form.channels} channels: use data=digits")


class _StoppedError(Exception):
    """Stop writing, because another shard has failed."""


class _Meter:
    """Counts finished images of many threads as progress, and stops all threads after an error."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.error: BaseException | None = None

    def __call__(self, count: int) -> None:
        if self.stopped.is_set():
            raise _StoppedError
        with self.lock:
            self.done += count
            self.progress(self.done, self.total)

    def stop(self, error: BaseException) -> None:
        """Stop all threads because of an error, unless they are stopped already."""
        with self.lock:
            if not self.stopped.is_set():
                self.error = error
                self.stopped.set()


def _fingerprint(prints: Fingerprints, threads: int, notice: Notice, *, over_ray: bool) -> None:
    """Store the fingerprints that are missing, part by part in Ray tasks or threads."""
    images = prints.images
    if over_ray:
        import ray

        from pipelines.remote.spread import STALLED_S, TASKS_PER_CPU, cluster_cpus
        from pipelines.remote.tasks import finished

        task, shared = ray.remote(num_cpus=1)(fingerprint_part), ray.put(images)
        calls = (task.remote(number, shared, prints.uri) for number in images.numbers)
        at_once = TASKS_PER_CPU * cluster_cpus()
        for _ in finished(calls, {"CPU": 1}, "compare images", at_once=at_once, stalled_s=STALLED_S, notice=notice):
            pass
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="compare") as pool:
        for _ in ahead(pool, lambda number: fingerprint_part(number, images, prints.uri), images.numbers, 2 * threads):
            pass


def _write_shards(
    jobs: Iterator[ShardJob],
    settings: IngestSettings,
    meter: _Meter,
    threads: int,
    notice: Notice,
    obstacle: str | None,
) -> Iterator[tuple[ShardRecord, bool]]:
    """Write the shards in Ray tasks if possible, else in threads.

    Args:
        obstacle: to Ray; None where there is none.

    Yields:
        The record of each shard, and whether it was finished before.
    """
    if obstacle is None:
        from pipelines.remote.spread import cluster_cpus

        notice(f"{meter.total:,} images as Ray tasks on {cluster_cpus():,} CPUs")
        return _write_over_ray(jobs, settings, meter, notice)
    named = "1 thread" if threads == 1 else f"{threads} threads"
    notice(f"{meter.total:,} images by {named} of this process{obstacle and ': ' + obstacle}")
    return _write_in_threads(jobs, settings, meter, threads)


def _write_in_threads(
    jobs: Iterator[ShardJob], settings: IngestSettings, meter: _Meter, threads: int
) -> Iterator[tuple[ShardRecord, bool]]:
    """Write the shards in threads: decoding and encoding of large images release the interpreter's lock.

    Yields:
        The record of each shard, and whether it was finished before.
    """

    def write(job: ShardJob) -> tuple[ShardRecord, bool]:
        try:
            return write_shard(job, settings, meter)
        except BaseException as error:
            meter.stop(error)
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="ingest") as pool:
        try:
            yield from ahead(pool, write, jobs, 2 * threads)
        except _StoppedError:  # a shard comes before the one whose error stopped it
            raise meter.error or AssertionError("nothing stopped it") from None
        finally:
            meter.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _obstacle_to_ray(source: str, uri: str) -> str | None:
    """Return why Ray cannot write the shards; None if it can, "" if this process is not connected to Ray."""
    if "ray" not in sys.modules:
        return ""  # a connected process has imported ray
    from pipelines.remote.spread import obstacle_to_tasks

    return obstacle_to_tasks([uri] if source == "digits" else [address(source), uri])


def _write_over_ray(
    jobs: Iterator[ShardJob], settings: IngestSettings, meter: _Meter, notice: Notice
) -> Iterator[tuple[ShardRecord, bool]]:
    """Write the shards as Ray tasks, twice as many at a time as the cluster has CPUs; Ray repeats lost tasks.

    Yields:
        The record of each shard, and whether it was finished before.
    """
    import ray

    from pipelines.remote.spread import STALLED_S, TASKS_PER_CPU, cluster_cpus
    from pipelines.remote.tasks import finished

    task = ray.remote(num_cpus=1)(write_shard)
    shared, sizes = ray.put(settings), dict[int, int]()

    def calls() -> Iterator[Any]:
        for place, job in enumerate(jobs):
            sizes[place] = len(job.images)
            yield task.remote(job, shared)

    at_once = TASKS_PER_CPU * cluster_cpus()
    written = finished(calls(), {"CPU": 1}, "write shards", at_once=at_once, stalled_s=STALLED_S, notice=notice)
    try:
        for place, record in written:
            yield record
            meter(sizes.pop(place))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _publish(source: str, written: MergedRecords) -> Ingested:
    """Store the report and the description of the dataset, and delete what belongs to no shard of it."""
    settings, listed = written.settings, written.listed
    storage, uri = settings.storage, settings.uri
    report = written.report(source)
    storage.write(join(uri, layout.INGEST_REPORT), report.to_json().encode())
    splits = {split: tuple(sorted(shards, key=lambda s: s.name)) for split, shards in written.shards.items()}
    for split, shards in splits.items():
        if not shards:
            raise DatasetError(written.explain_empty(source, split, report))
    dataset = make_dataset(
        uri,
        splits=splits,
        classes=listed.classes,
        channels=settings.form.channels,
        image_size=settings.form.size,
        mean=written.pixels.mean(),
        std=written.pixels.std(),
    )
    drop_stale_quarantine(dataset, storage)
    quarantine_forgotten(dataset, storage)
    storage.write(join(uri, layout.DATASET), dataset.to_json().encode())
    _remove_stale(uri, {s.name for shards in splits.values() for s in shards}, written, storage)
    return Ingested(dataset, report.bad, report.empty_classes, report, written.reused)


def _remove_stale(uri: str, shards: set[str], written: MergedRecords, storage: Storage) -> None:
    """Delete shards, sidecars and records that do not belong to the new dataset."""
    current = {name for shard in shards for name in (shard, layout.index_name(shard))} | {
        layout.progress_name(name) for name in written.planned
    }
    parts = set(written.listed.images.numbers)
    for entry in storage.scan(uri):
        name = entry.uri[len(uri.rstrip("/")) + 1 :]
        folder, _, base = name.rpartition("/")
        if folder in (layout.INGEST_SOURCES, layout.FINGERPRINTS):
            kept = base.removesuffix(".parquet").isdecimal() and int(base.removesuffix(".parquet")) in parts
            if not kept or (folder == layout.FINGERPRINTS and not written.compared):
                storage.delete(entry.uri)
            continue
        # A write to a folder that was killed leaves a hidden temporary file.
        ours = name.lstrip(".").startswith(("train-", "test-")) and (name[0] == "." or name.endswith(SHARD_FILES))
        if (ours or name.startswith(f"{layout.INGEST_PROGRESS}/")) and name not in current:
            storage.delete(entry.uri)
