"""Ingest a source's images as WebDataset shards: in parallel, resumable, and with the same bytes each time.

The images of a split are divided into shards by count before any of them is opened, so the content of a shard depends
only on the source and the settings. Each shard is one task (`tasks.write_shard`) that runs on any machine and writes a
record. An interrupted ingest continues from the records; `dataset.json` is written last.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import reduce
from operator import add

from pipelines.config.sections import Encoding, Geometry
from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
from pipelines.shards.index import Dataset, DatasetError, ShardInfo, make_dataset
from pipelines.shards.ingest.alike import Fingerprint, fingerprints, keep_together
from pipelines.shards.ingest.encode import CaptionEncoder, ImageFormat
from pipelines.shards.ingest.report import BadImage, IngestReport, ShardRecord
from pipelines.shards.ingest.sources import Source, SourceImage, open_source, source_digest
from pipelines.shards.ingest.tasks import (
    IngestSettings,
    ShardJob,
    plan_shards,
    samples_for,
    seconds_of_image,
    write_shard,
)
from pipelines.shards.ingest.tasks import identify as identify_encoder
from pipelines.shards.ingest.trees import address, shown
from pipelines.shards.quarantine import drop_stale_quarantine
from pipelines.storage import Storage, is_local, join, layout

__all__ = ["Ingested", "ingest", "source_digest"]

ALONE_S = 20.0
"""Seconds of writing above which Ray tasks are worth starting."""
STALLED_S = 1800.0
"""Seconds without a finished Ray task, each of up to thousands of large images, after which none is waited for."""
COMPARED = 500
"""Images that a task takes at a time, to find near-duplicates."""
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
    image_size: int,
    channels: int,
    shard_samples: int = 1000,
    shard_bytes: int | None = None,
    test_fraction: float = 0.1,
    geometry: Geometry = "crop",
    encoding: Encoding = "png",
    text_encoder: CaptionEncoder | None = None,
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
            metadata.jsonl or metadata.csv; a .zip of either; a .csv or .jsonl of paths. Paths, file:/// or s3://.
        uri: the folder to write to; `dataset.json` is written last, and then shards of earlier ingests are deleted.
        image_size: height and width of the written images, in pixels.
        channels: 1 (grey) or 3 (RGB); other images are converted and counted in the report.
        shard_samples: images per shard; images that cannot be read are missing from their shard.
        shard_bytes: approximate size of a shard, instead of `shard_samples`; estimated from the first images.
        test_fraction: fraction of a source without a test split that becomes one, chosen by a hash of the path;
            near-duplicates are in the split of the first one.
        geometry: "crop", "resize" or "keep"; see `ImageFormat`.
        encoding: "png", "jpg", "webp" or "npy"; see `ImageFormat`.
        text_encoder: maps captions to a `Conditioning`, stored as `emb.npy`; see `pack_embeddings`. Ray pickles it.
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
    listed = open_source(source, storage, test_fraction)
    if text_encoder is not None and not listed.captioned:
        raise DatasetError(f"{source} has no captions for the text encoder: add `text` or `caption` to its metadata")
    encoder_id = None if text_encoder is None else identify_encoder(text_encoder)
    settings = IngestSettings(uri, storage, form, listed.classes, listed.captioned, text_encoder, encoder_id)
    if shard_bytes is not None:
        shard_samples = samples_for(shard_bytes, listed.images, settings)
    if connect is not None and len(listed.images) * seconds_of_image(listed.images, storage, form) > ALONE_S:
        connect()
    obstacle, threads = _obstacle_to_ray(source, uri), workers or max(1, len(os.sched_getaffinity(0)) // 2)
    alike: tuple[str, ...] = ()
    if listed.drawn:
        prints = _fingerprints(listed.images, storage, threads, notice, over_ray=obstacle is None)
        listed, alike = keep_together(listed, prints)
    jobs = plan_shards(listed.images, settings, shard_samples, _recorded(uri, storage))
    if any(job.recorded is None for job in jobs):
        # From here on shards of an earlier dataset are overwritten, so that its description is no longer true.
        storage.delete(join(uri, layout.DATASET))
    meter = _Meter(sum(len(job.images) for job in jobs), progress)
    records = _write_shards(jobs, settings, meter, threads, notice, obstacle)
    return _publish(source, listed, settings, jobs, records, alike)


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
        size = f"{form.size}x{form.size}"
        raise DatasetError(f"digits are 8x8 grey, not {size} with {form.channels} channels: use data=digits")


def _recorded(uri: str, storage: Storage) -> dict[str, ShardRecord]:
    found = storage.list(join(uri, layout.INGEST_PROGRESS))
    with ThreadPoolExecutor(16) as pool:
        records = pool.map(lambda entry: ShardRecord.from_json(storage.read(entry.uri)), found)
    return {record.name: record for record in records if record is not None}


class _StoppedError(Exception):
    """Stop writing, because another shard has failed."""


class _Meter:
    """Counts finished images of many threads as progress, and stops all threads after an error."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def __call__(self, count: int) -> None:
        if self.stopped.is_set():
            raise _StoppedError
        with self.lock:
            self.done += count
            self.progress(self.done, self.total)


def _fingerprints(
    images: Sequence[SourceImage], storage: Storage, threads: int, notice: Notice, *, over_ray: bool
) -> list[Fingerprint | None]:
    """Return the fingerprints of images, computed in batches of some hundreds in Ray tasks or threads."""
    pieces = [images[first : first + COMPARED] for first in range(0, len(images), COMPARED)]
    if over_ray:
        import ray

        from pipelines.remote.tasks import finished

        task = ray.remote(num_cpus=1)(fingerprints)
        calls = [task.remote(piece, storage) for piece in pieces]
        compared = dict(finished(calls, {"CPU": 1}, "compare images", stalled_s=STALLED_S, notice=notice))
        found = [compared[place] for place in range(len(pieces))]
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="compare") as pool:
            found = list(pool.map(lambda piece: fingerprints(piece, storage), pieces))
    return [own for piece in found for own in piece]


def _write_shards(
    jobs: Sequence[ShardJob],
    settings: IngestSettings,
    meter: _Meter,
    threads: int,
    notice: Notice,
    obstacle: str | None,
) -> list[tuple[ShardRecord, bool]]:
    """Write the shards in Ray tasks if possible, else in threads.

    Args:
        obstacle: to Ray; None where there is none.

    Returns:
        The record of each shard, and whether it was finished before.
    """
    if obstacle is None:
        notice(f"{len(jobs):,} shards as Ray tasks on {_ray_cpus():,} CPUs")
        return _write_over_ray(jobs, settings, meter, notice)
    named = "1 thread" if threads == 1 else f"{threads} threads"
    notice(f"{len(jobs):,} shards by {named} of this process{obstacle and ': ' + obstacle}")
    return _write_in_threads(jobs, settings, meter, threads)


def _write_in_threads(
    jobs: Sequence[ShardJob], settings: IngestSettings, meter: _Meter, threads: int
) -> list[tuple[ShardRecord, bool]]:
    """Write the shards in threads: decoding and encoding of large images release the interpreter's lock.

    Returns:
        The record of each shard, and whether it was finished before.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="ingest") as pool:
        futures = [pool.submit(write_shard, job, settings, meter) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            meter.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _obstacle_to_ray(source: str, uri: str) -> str | None:
    """Return why Ray cannot write the shards; None if it can, "" if this process is not connected to Ray."""
    if "ray" not in sys.modules:
        return ""  # a connected process has imported ray
    import ray

    if not ray.is_initialized():
        return ""
    if _ray_cpus() < 1:
        return "the Ray cluster has no CPUs"
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        return None
    ends = [uri] if source == "digits" else [address(source), uri]
    local = next((end for end in ends if is_local(end)), None)
    return None if local is None else f"the Ray cluster's other nodes do not see {shown(local)}"


def _ray_cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def _write_over_ray(
    jobs: Sequence[ShardJob], settings: IngestSettings, meter: _Meter, notice: Notice
) -> list[tuple[ShardRecord, bool]]:
    """Write the shards as Ray tasks, twice as many at a time as the cluster has CPUs; Ray repeats lost tasks.

    Returns:
        The record of each shard, and whether it was finished before.
    """
    import ray

    from pipelines.remote.tasks import finished

    task = ray.remote(num_cpus=1)(write_shard)
    shared, found = ray.put(settings), {}
    calls = (task.remote(job, shared) for job in jobs)
    written = finished(calls, {"CPU": 1}, "write shards", at_once=2 * _ray_cpus(), stalled_s=STALLED_S, notice=notice)
    try:
        for place, record in written:
            found[place] = record
            meter(len(jobs[place].images))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return [found[place] for place in range(len(jobs))]


def _publish(
    source: str,
    listed: Source,
    settings: IngestSettings,
    jobs: Sequence[ShardJob],
    written: Sequence[tuple[ShardRecord, bool]],
    alike: tuple[str, ...],
) -> Ingested:
    storage, uri = settings.storage, settings.uri
    records = [record for record, _ in written]
    report = _compose_report(source, listed, settings, records, alike)
    storage.write(join(uri, layout.INGEST_REPORT), report.to_json().encode())
    splits = {
        split: tuple(ShardInfo(r.name, r.samples, r.size, r.sha256) for r in records if r.split == split and r.samples)
        for split in ("train", "test")
    }
    for split, shards in splits.items():
        if not shards:
            raise DatasetError(_explain_empty(source, split, listed, report))
    pixels = reduce(add, (record.pixels for record in records if record.split == "train"))
    dataset = make_dataset(
        uri,
        splits=splits,
        classes=listed.classes,
        channels=settings.form.channels,
        image_size=settings.form.size,
        mean=pixels.mean(),
        std=pixels.std(),
    )
    drop_stale_quarantine(dataset, storage)
    storage.write(join(uri, layout.DATASET), dataset.to_json().encode())
    _remove_stale(uri, {s.name for shards in splits.values() for s in shards}, {job.name for job in jobs}, storage)
    reused = sum(found for _, found in written)
    return Ingested(dataset, report.bad, report.empty_classes, report, reused)


def _compose_report(
    source: str, listed: Source, settings: IngestSettings, records: Iterable[ShardRecord], alike: tuple[str, ...]
) -> IngestReport:
    """Return the report of an ingest, from the records of its shards and the findings about its source."""
    samples: dict[str, Counter[int]] = {"train": Counter(), "test": Counter()}
    changes: Counter[str] = Counter()
    left_out = list(listed.bad)
    for record in records:
        samples[record.split].update(record.per_class)
        changes.update(record.changes)
        left_out += record.bad
    named = dict(enumerate(listed.classes)) or {0: ""}
    empty = (n for i, n in named.items() if listed.classes and not any(c[i] for c in samples.values()))
    return IngestReport(
        source=source,
        settings=settings.described(),
        samples={split: {name: count[i] for i, name in named.items()} for split, count in samples.items()},
        bad=tuple(left_out),
        empty_classes=tuple(empty),
        changes=dict(sorted(changes.items())),
        without_caption=tuple(image.origin for image in listed.images if settings.captioned and not image.caption),
        unused=dict(listed.unused),
        alike=alike,
        deeper=listed.deeper,
    )


def _explain_empty(source: str, split: str, listed: Source, report: IngestReport) -> str:
    """Return the error message for a split without readable images."""
    named = "".join(f"\n  {bad.origin}: {bad.reason}" for bad in report.bad[:5])
    more = f"\n  and {len(report.bad) - 5:,} more: see {layout.INGEST_REPORT}" if len(report.bad) > 5 else ""
    if any(image.split == split for image in listed.images):
        return f"{source}: no readable image for the {split} split{named}{more}"
    other = sum(image.split != split for image in listed.images)
    fix = f"the {other:,} images fell to the other: choose another test_fraction, or make train/ and test/ yourself"
    return f"{source}: no readable image for the {split} split; {fix if other else 'it holds no image'}{named}{more}"


def _remove_stale(uri: str, shards: set[str], planned: set[str], storage: Storage) -> None:
    """Delete shards, sidecars and records that do not belong to the new dataset."""
    current = {name for shard in shards for name in (shard, layout.index_name(shard))} | {
        layout.progress_name(name) for name in planned
    }
    for entry in storage.list(uri):
        name = entry.uri[len(uri.rstrip("/")) + 1 :]
        # A write to a folder that was killed leaves a hidden temporary file.
        ours = name.lstrip(".").startswith(("train-", "test-")) and (name[0] == "." or name.endswith(SHARD_FILES))
        if (ours or name.startswith(f"{layout.INGEST_PROGRESS}/")) and name not in current:
            storage.delete(entry.uri)
