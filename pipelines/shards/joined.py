"""The data of a training: one dataset, or the sources of a mixture as one dataset, with their labels in one space."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddpm.image_size import as_setting
from pipelines.config import DataConfig
from pipelines.shards.index import Dataset, DatasetError, MixtureSource, read_dataset
from pipelines.shards.mixture import Schedule, by_stretch
from pipelines.shards.quarantine import Quarantine, kept_shards, read_quarantine, stream_digest
from pipelines.storage import Storage

TRAIN = "train"


@dataclass(frozen=True)
class _Part:
    """A dataset of a mixture, under the name that messages call it by."""

    name: str
    dataset: Dataset
    quarantine: Quarantine | None


def read_data(data: DataConfig, storage: Storage) -> tuple[Dataset, Quarantine | None]:
    """Return the data that a configuration trains on, with what is left out of them.

    Raises:
        DatasetError: a dataset is missing or damaged, or the sources do not fit together.
    """
    try:
        reference = read_dataset(data.uri, storage)
    except DatasetError as error:
        if not data.sources:
            raise
        raise DatasetError(
            f"data.uri, by whose images samples are judged: {error}; or name a source, as in "
            f"data.uri={data.sources[0].uri}"
        ) from error
    return with_sources(data, reference, read_quarantine(data.uri, storage), storage)


def with_sources(
    data: DataConfig, reference: Dataset, quarantine: Quarantine | None, storage: Storage
) -> tuple[Dataset, Quarantine | None]:
    """Return the sources of a mixture as one dataset, with what is left out of them; without sources, the given ones.

    Its split "train" has the shards of all sources, one source after the other, and its other splits are those of the
    reference. Classes are one by their name: those of the reference come first, in its order.

    Args:
        reference: the dataset at `data.uri`, which judges.
        quarantine: of the reference.

    Raises:
        DatasetError: a source is missing, damaged or of another size, has no sample left, or has classes that cannot be
            told from those of another source.
    """
    if not data.sources:
        return reference, quarantine
    try:
        Schedule(by_stretch([source.weights for source in data.sources]))
    except ValueError as error:
        raise DatasetError(f"data.sources: {error}") from None
    parts = [_read_part(source.name, source.uri, data, storage) for source in data.sources]
    as_source = (part for part in parts if part.dataset.uri == reference.uri)
    judge = next(as_source, _Part("data.uri", reference, quarantine))
    classes = _joined_classes([judge, *parts])
    numbers = {name: number for number, name in enumerate(classes)}
    _check_judged(judge, parts)
    sources = [
        MixtureSource(
            configured.name,
            configured.uri,
            stream_digest(part.dataset, part.quarantine),
            configured.weights,
            tuple(numbers[name] for name in part.dataset.classes),
        )
        for configured, part in zip(data.sources, parts, strict=True)
    ]
    shards = [
        replace(shard, name=f"{source.name}:{shard.name}", source=source)
        for source, part in zip(sources, parts, strict=True)
        for shard in part.dataset.shards(TRAIN)
    ]
    content = [reference.digest, [[part.name, part.dataset.digest] for part in parts]]
    joined = replace(
        reference,
        splits={**reference.splits, TRAIN: tuple(shards)},
        classes=classes,
        digest=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        sources=tuple(sources),
        reference_digest=stream_digest(reference, quarantine),
    )
    return joined, _joined_quarantine(joined, quarantine, parts)


def parts_of(dataset: Dataset) -> list[Dataset]:
    """Return the datasets that the split "train" is of: those of a mixture, without their other splits, or this one."""
    if not dataset.sources:
        return [dataset]
    shards = dataset.shards(TRAIN)
    parts = []
    for source in dataset.sources:
        numbers = shards.of_source(source)
        parts.append(replace(dataset, uri=source.uri, splits={TRAIN: shards.take(numbers, shards.samples[numbers])}))
    return parts


def weight_in_words(weights: Mapping[Any, float]) -> str:
    """Return the weights of a source, by the sample of the stream from which each holds, in words.

    Examples:
        >>> weight_in_words({0: 3.0}), weight_in_words({"0": 0.9, "1000000": 0.5})
        ('3', '0.9, from sample 1,000,000 on 0.5')
    """
    in_order = sorted((int(first), weight) for first, weight in weights.items())
    return ", ".join(f"from sample {first:,} on {weight:g}" if first else f"{weight:g}" for first, weight in in_order)


def _read_part(name: str, uri: str, data: DataConfig, storage: Storage) -> _Part:
    """Return a source of a mixture.

    Raises:
        DatasetError: it is missing, damaged, of another size than the configuration's, or has no sample left.
    """
    try:
        part = _Part(name, read_dataset(uri, storage), read_quarantine(uri, storage))
        kept_shards(part.dataset, TRAIN, part.quarantine)
    except DatasetError as error:
        raise DatasetError(f"data.sources: source '{name}': {error}") from error
    for field in ("image_size", "channels"):
        there, wanted = (as_setting(getattr(each, field)) for each in (part.dataset, data))
        if there != wanted:
            raise DatasetError(
                f"data.sources: source '{name}': {uri} has {field} {there}, and data.{field} = {wanted} for all "
                f"sources: ingest it again with data.{field}={wanted}, or leave it out"
            )
    return part


def _joined_classes(parts: Sequence[_Part]) -> tuple[str, ...]:
    """Return the classes of all parts, each name once.

    Raises:
        DatasetError: two parts name classes differently that are likely to be the same ones.
    """
    found: dict[str, tuple[str, _Part]] = {}  # name without case and punctuation -> name, and who has it
    labelled = [part for part in parts if part.dataset.classes]
    for part in labelled:
        first = labelled[0]
        if _numbered(part) != _numbered(first):
            numbers, names = (part, first) if _numbered(part) else (first, part)
            raise DatasetError(
                f"data.sources: the classes of {_where(numbers)} are numbers, and those of {_where(names)} are names, "
                f"such as {names.dataset.classes[0]!r}, so nobody can say which are the same: name them, by "
                f"`ddpm index {numbers.dataset.uri} --classes NAME,NAME,...`"
            )
        for name in part.dataset.classes:
            there, other = found.setdefault(re.sub(r"[\W_]+", " ", name).strip().casefold() or name, (name, part))
            if name not in other.dataset.classes and there not in part.dataset.classes:
                raise DatasetError(
                    f"data.sources: {_where(other)} has a class {there!r} and {_where(part)} has {name!r}: a class has "
                    "to be spelled alike in all sources, and other classes have to differ in more than case and "
                    "punctuation"
                )
    return tuple(dict.fromkeys(name for part in labelled for name in part.dataset.classes))


def _check_judged(judge: _Part, parts: Sequence[_Part]) -> None:
    """Refuse a reference that cannot judge what is trained.

    Raises:
        DatasetError: it has a class that no source has, or none where a source has some.
    """
    trained = {name for part in parts for name in part.dataset.classes}
    unknown = [name for name in judge.dataset.classes if name not in trained]
    if unknown:
        raise DatasetError(
            f"{_where(judge)}, by which samples are judged, has the class {unknown[0]!r}, which no source of "
            "data.sources has: name one of the sources with data.uri, or add it to them"
        )
    if trained and not judge.dataset.classes:
        raise DatasetError(
            f"{_where(judge)}, by which samples are judged, has no labels, and other sources of data.sources have: "
            "name a source with labels with data.uri, or put it first"
        )


def _joined_quarantine(joined: Dataset, quarantine: Quarantine | None, parts: Sequence[_Part]) -> Quarantine | None:
    """Return what is left out of a mixture: from what its sources train, and from the other splits of its reference."""
    if quarantine is None and all(part.quarantine is None for part in parts):
        return None
    others = {name for split in joined.splits if split != TRAIN for name in joined.shards(split).names}
    excluded = [problem for problem in (quarantine.excluded if quarantine else ()) if problem.shard in others]
    for part in parts:
        names = set(part.dataset.shards(TRAIN).names)
        own = [problem for problem in (part.quarantine.excluded if part.quarantine else ()) if problem.shard in names]
        excluded += [replace(problem, shard=f"{part.name}:{problem.shard}") for problem in own]
    return Quarantine(joined.digest, tuple(excluded))


def _numbered(part: _Part) -> bool:
    return all(name.isdecimal() for name in part.dataset.classes)


def _where(part: _Part) -> str:
    return f"'{part.name}' ({part.dataset.uri})" if part.name != "data.uri" else f"data.uri = {part.dataset.uri}"
