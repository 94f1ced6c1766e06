"""Overwrite samples in the shards of a dataset (`ddpm forget --erase`).

The record of what is to be done is written first, under a name that only one erasure of a dataset can take. Whoever
finds it and the dataset as it was before does what is missing, so that an erasure may be interrupted anywhere, and
several may run at once.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
from PIL import Image

from pipelines.presentation.progress import Notice
from pipelines.shards.columns import member_column, member_rows
from pipelines.shards.erased import (
    ErasedSample,
    Erasure,
    ImageFile,
    Overwritten,
    erased_samples,
    erasures,
    pixels_digest,
    with_digests,
)
from pipelines.shards.index import Dataset, DatasetError, ShardIndex, ShardInfo, read_dataset
from pipelines.shards.members import IMAGE_MEMBERS, FlawError, decode_pixels, npy_header
from pipelines.shards.quarantine import Quarantine, parse_quarantine, store_quarantine
from pipelines.signing import Authority, SignatureError, Trust, seal, unseal
from pipelines.storage import ConflictError, Storage, join, layout

_FORMATS = ("PNG", "WEBP", "JPEG")


def erase(
    uri: str,
    samples: Iterable[tuple[str, int, str]],
    storage: Storage,
    authority: Authority,
    *,
    at: str,
    notice: Notice,
) -> list[ErasedSample]:
    """Overwrite samples of a dataset; those of them that are erased already are left as they are.

    Each is in quarantine before this is called, so that no reader meets its blank.

    Args:
        samples: (name of the shard, index, key) of each.
        at: when it was asked for.
        notice: called with what is done, in words.

    Returns:
        Those that this call has erased.

    Raises:
        DatasetError: a shard is not as it is recorded.
        StorageError: the store does not answer; the same call does the rest.
    """
    while True:
        dataset = finish_erasure(uri, storage, authority.trust, notice)
        done = erased_samples(dataset, storage)
        todo = sorted({each for each in samples if each[:2] not in done})
        if not todo:
            return []
        plan = _plan(dataset, todo, storage, at)
        place = layout.erasure_file(plan.before)
        try:
            storage.write_if(join(uri, place), seal(asdict(plan), place, authority.signer), None)
        except ConflictError:  # somebody else erases from the same dataset: that first
            continue
        finish_erasure(uri, storage, authority.trust, notice)
        return list(plan.samples)


def finish_erasure(uri: str, storage: Storage, trust: Trust, notice: Notice) -> Dataset:
    """Do what is missing of an erasure that was begun; return the dataset as it is then.

    Raises:
        DatasetError: a shard is not as it is recorded, or nobody who is trusted has signed what is to be erased.
    """
    dataset = read_dataset(uri, storage)
    place = layout.erasure_file(dataset.digest)
    content = storage.find(join(uri, place))
    if content is None:
        _settle_quarantine(dataset, storage, trust)
        return dataset
    try:
        erasure = Erasure.of_plain(unseal(content, place, trust))
    except (SignatureError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{join(uri, place)} says what is to be erased, and cannot be believed ({error}): delete it, and give the "
            "call again, or trust its signer (registry.trusted_keys)"
        ) from error
    shards = {shard.name: shard for split in dataset.splits for shard in dataset.shards(split)}
    for name in erasure.shards:
        notice(f"{uri}: {name} is written without them")
        _overwrite(shards[name], erasure, uri, storage)
    for folder in (layout.FEATURES, layout.FINGERPRINTS):  # small copies of the images, made anew when they are needed
        storage.delete_folder(join(uri, folder))
    after = with_digests(dataset, {name: sha256 for name, (_, sha256) in erasure.shards.items()})
    _update(join(uri, layout.DATASET), lambda stored: _replaced(stored, dataset, after), storage)
    return finish_erasure(uri, storage, trust, notice)


def _settle_quarantine(now: Dataset, storage: Storage, trust: Trust) -> None:
    """Let the quarantine be of the dataset as it is now, where it is of the one before an erasure."""
    earlier = {each.before for each in erasures(now.uri, storage, trust) if each.after == now.digest}

    def change(stored: bytes | None) -> bytes:
        moved = _moved(stored, earlier, now)
        if moved is None:
            raise _UnchangedError
        store_quarantine(moved, now.uri, storage, only_copy=True)
        return moved.to_json().encode()

    _update(join(now.uri, layout.QUARANTINE), change, storage)


def _moved(stored: bytes | None, earlier: set[str], now: Dataset) -> Quarantine | None:
    """Return a quarantine of a dataset that was there earlier as one of the dataset now; None where it is of none."""
    if stored is None:
        return None
    found = parse_quarantine(stored, now.uri, layout.QUARANTINE)
    return replace(found, dataset_digest=now.digest) if found.dataset_digest in earlier else None


def _replaced(stored: bytes | None, before: Dataset, after: Dataset) -> bytes:
    """Return `dataset.json` as it is to be; one that somebody else has written meanwhile stays."""
    if stored is None or json.loads(stored)["digest"] != before.digest:
        raise _UnchangedError
    return after.to_json().encode()


class _UnchangedError(Exception):
    """What is stored stays."""


def _update(uri: str, change: Callable[[bytes | None], bytes], storage: Storage) -> None:
    try:
        storage.update(uri, change)
    except _UnchangedError:
        return


def _overwrite(shard: ShardInfo, erasure: Erasure, uri: str, storage: Storage) -> None:
    """Write the blanks of an erasure into a shard, and their checksums into its sidecar."""
    own = [each for each in erasure.overwritten if each.shard == shard.name]
    address, after = shard.address(uri), erasure.shards[shard.name][1]

    def blank(stored: bytes | None) -> bytes:
        data = _blanked(stored or b"", own)
        if data == stored:
            raise _UnchangedError
        if hashlib.sha256(data).hexdigest() != after:
            raise DatasetError(
                f"{address} is not as it was when the erasure was begun: look at it with `ddpm check {uri}`"
            )
        return data

    def sums(stored: bytes | None) -> bytes:
        index = ShardIndex.from_json(stored or b"")
        columns = dict(index.columns)
        for each in own:
            name, i = each.member
            rows = np.array(member_rows(columns[name]), dtype=np.int64).reshape(-1, 3)
            rows[i, 2] = each.crc32
            columns[name] = member_column(rows)
        text = ShardIndex(index.keys, columns).to_json().encode()
        if text == stored:
            raise _UnchangedError
        return text

    _update(address, blank, storage)
    _update(layout.index_name(address), sums, storage)


def _plan(dataset: Dataset, samples: Sequence[tuple[str, int, str]], storage: Storage, at: str) -> Erasure:
    """Return what is to be done, with the digests that come of it.

    Raises:
        DatasetError: a shard or its sidecar is not as it is recorded.
    """
    shards = {shard.name: shard for split in dataset.splits for shard in dataset.shards(split)}
    digests: dict[str, tuple[str, str]] = {}
    overwritten: list[Overwritten] = []
    blanked: list[ErasedSample] = []
    for name in sorted({shard for shard, _, _ in samples}):
        address = shards[name].address(dataset.uri)
        data = storage.read(address)
        if hashlib.sha256(data).hexdigest() != shards[name].sha256:
            raise DatasetError(
                f"{address} has other bytes than were indexed, so nothing is erased in it: `ddpm check {dataset.uri}` "
                f"says what is wrong, and `ddpm index {dataset.uri} --replace` describes it as it is"
            )
        index = ShardIndex.from_json(storage.read(layout.index_name(address)))
        own: list[Overwritten] = []
        for _, i, key in (each for each in samples if each[0] == name):
            found = list(_blanks(name, index, i, data))
            own += found
            image = next((each for extension in IMAGE_MEMBERS for each in found if each.member[0] == extension), None)
            if image is not None:
                there = data[image.offset : image.offset + image.size]
                pixels = _pixels(image.member[0], there, dataset)
                blanked.append(ErasedSample(name, i, key, ImageFile.of(there), ImageFile.of(image.data()), pixels))
        digests[name] = shards[name].sha256, hashlib.sha256(_blanked(data, own)).hexdigest()
        overwritten += own
    after = with_digests(dataset, {name: sha256 for name, (_, sha256) in digests.items()})
    return Erasure(dataset.digest, after.digest, digests, tuple(blanked), tuple(overwritten), at)


def _pixels(extension: str, data: bytes, dataset: Dataset) -> str:
    try:
        return pixels_digest(decode_pixels({extension: data}, dataset.image_size, dataset.channels)).hex()
    except FlawError:
        return ""


def _blanks(shard: str, index: ShardIndex, i: int, data: bytes) -> Iterator[Overwritten]:
    """Yield what takes the place of the members of a sample; its class stays."""
    for extension, member in index.members(i).items():
        if extension == "cls" or not member.size:
            continue
        there = data[member.offset : member.offset + member.size]
        begin, fill = _blank(extension, there)
        blank = begin.ljust(member.size, bytes([fill]))
        text = base64.b64encode(begin).decode()
        yield Overwritten(shard, member.offset, member.size, text, fill, (extension, i), zlib.crc32(blank))


def _blank(extension: str, data: bytes) -> tuple[bytes, int]:
    """Return what takes the place of a member: its beginning, and the byte that fills the rest."""
    if extension in ("npy", "emb.npy"):
        return npy_header(data), 0
    if extension == "txt":
        return b"", ord(" ")
    if extension == "json" and len(data) > 1:
        return b"{}", ord(" ")
    if extension not in IMAGE_MEMBERS:
        return b"", 0
    return next((image for image in _blank_images(data) if len(image) <= len(data)), b""), 0


def _blank_images(data: bytes) -> Iterable[bytes]:
    """Return black images of the size of an image, the one in its own format first; none where it cannot be read.

    Decoders tell formats by their first bytes, not by the name, so that another format does as well.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            own, blank = str(image.format), Image.new("L" if image.mode in ("1", "L", "LA") else "RGB", image.size)
    except (OSError, ValueError, SyntaxError):
        return
    for form in sorted(_FORMATS, key=lambda form: form != own):
        file = io.BytesIO()
        blank.save(file, form, **({"lossless": True} if form == "WEBP" else {"optimize": True}))
        yield file.getvalue()


def _blanked(data: bytes, overwritten: Iterable[Overwritten]) -> bytes:
    copy = bytearray(data)
    for each in overwritten:
        if each.offset + each.size <= len(copy):
            copy[each.offset : each.offset + each.size] = each.data()
    return bytes(copy)
