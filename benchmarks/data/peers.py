"""The streams of other projects over the same images: WebDataset, MosaicML Streaming, litData and Megatron Energon.

Each is used as its documentation says. All decode with the function of this project, and batches reach the consumer as
bytes; only `WebDatasetReadme` decodes as WebDataset's README does. Each shuffles with its own method, with a buffer of
1,000 samples where it has a buffer.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.data.systems import BATCH, BATCHES, BUFFER, URI, ReadSetup, System, collate, decode
from pipelines.shards.index import read_dataset
from pipelines.storage import Storage, join


class WebDatasetStream:
    """WebDataset's pipeline with a shuffle buffer of 1,000 samples, and boto3 for S3.

    It cannot resume: what has been seen is read again and skipped, before it is decoded.
    """

    package: ClassVar[str] = "webdataset"
    module: ClassVar[str] = "webdataset"

    @staticmethod
    def write(tars: Path, folder: Path) -> None:
        """Write nothing: the tars are read as they are."""
        import webdataset  # noqa: F401  that it is there

    def __init__(self, setup: ReadSetup, state: int | None = None) -> None:
        import webdataset

        webdataset.gopen_schemes["s3"] = lambda url, *_, **__: _opened(setup.storage, url)
        urls = [join(URI, shard.name) for shard in read_dataset(URI, setup.storage).shards("train")]
        raw = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        if state:
            raw = raw.slice(state, 10**12)
        self.seen = state or 0
        batches = self.decoded(raw.shuffle(BUFFER))
        self.loader = (
            webdataset.WebLoader(batches, batch_size=None, num_workers=setup.workers) if setup.workers else batches
        )

    def decoded(self, raw: Any) -> Any:
        """Return batches of raw samples."""
        return raw.map(lambda sample: decode(sample["png"], sample["cls"])).batched(BATCH, collation_fn=collate)

    def batches(self) -> BATCHES:
        for images, labels in self.loader:
            self.seen += len(images)
            yield images, labels

    def state(self) -> int:
        return self.seen


class WebDatasetReadme(WebDatasetStream):
    """The same with the decoder of WebDataset's README, which makes float32 in [0, 1]."""

    def decoded(self, raw: Any) -> Any:
        return raw.decode("torchrgb").to_tuple("png", "cls").batched(BATCH)


@lru_cache(maxsize=2)
def _s3_client(storage: Storage, process: int) -> Any:
    """Return the client of a process: a forked loader worker must not share its parent's connections."""
    from pipelines.storage.s3 import S3Client

    return S3Client(storage)


def _opened(storage: Storage, url: str) -> io.BufferedReader:
    """Return the bytes of a tar, from one GET request."""
    from pipelines.storage.s3 import split_s3

    bucket, key = split_s3(url)
    with _s3_client(storage, os.getpid()).calls(url, "read") as client:
        body = client.get_object(Bucket=bucket, Key=key)["Body"]

    class Raw(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            data = body.read(len(buffer))
            buffer[: len(data)] = data
            return len(data)

    return io.BufferedReader(Raw(), 1 << 20)


class MosaicStream:
    """MosaicML's `StreamingDataLoader` over MDS shards of the same samples, with its own shuffle."""

    package: ClassVar[str] = "mosaicml-streaming"
    module: ClassVar[str] = "streaming"

    @staticmethod
    def write(tars: Path, folder: Path) -> None:
        """Write the samples of tars in its format."""
        from streaming import MDSWriter

        size = 1 << 22  # bytes of a shard: a thousand samples
        with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}, size_limit=size) as writer:
            for image, label in samples_of(tars):
                writer.write({"image": image, "label": label})

    def __init__(self, setup: ReadSetup, state: Any = None) -> None:
        from streaming import StreamingDataLoader, StreamingDataset

        os.environ["S3_ENDPOINT_URL"] = setup.storage.endpoint_url or ""
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = setup.storage.credentials_file or ""

        class Decoded(StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                sample = super().__getitem__(at)
                return decode(sample["image"], sample["label"])

        data = Decoded(remote=f"{URI}-mosaicml", local=str(setup.cache), shuffle=True, batch_size=BATCH)
        self.loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=setup.workers, collate_fn=collate)
        if state is not None:
            self.loader.load_state_dict(state)

    def batches(self) -> BATCHES:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()


class LitDataStream:
    """litData's `StreamingDataLoader` over its own chunks of the same samples, with its own shuffle."""

    package: ClassVar[str] = "litdata"
    module: ClassVar[str] = "litdata"

    @staticmethod
    def write(tars: Path, folder: Path) -> None:
        """Write the samples of tars in its format."""
        from litdata.streaming import Cache

        cache = Cache(str(folder), chunk_size=BUFFER)
        for number, (image, label) in enumerate(samples_of(tars)):
            cache[number] = {"image": image, "label": label}
        cache.done()
        cache.merge()

    def __init__(self, setup: ReadSetup, state: Any = None) -> None:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming.downloader import _OBSTORE_CLIENT_OPTIONS

        key, secret = setup.credentials()
        _OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # the server has no https, and no argument says so
        data = StreamingDataset(
            f"{URI}-litdata",
            cache_dir=str(setup.cache),
            shuffle=True,
            max_cache_size="25GB",
            item_shuffle_window="full",
            storage_options={
                "endpoint_url": setup.storage.endpoint_url,
                "aws_access_key_id": key,
                "aws_secret_access_key": secret,
                "region_name": setup.storage.region,
            },
            transform=lambda sample: decode(sample["image"], sample["label"]),
        )
        self.loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=setup.workers, collate_fn=collate)
        if state is not None:
            self.loader.load_state_dict(state)

    def batches(self) -> BATCHES:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()


class EnergonStream:
    """Megatron Energon's savable loader over the same tars, with its own index and a shuffle buffer of 1,000 samples.

    Shards are read whole, for that is faster here than pieces of them, and kept in memory and not on the disk, because
    Multi-Storage Client's cache makes it slower.
    """

    package: ClassVar[str] = "megatron-energon"
    module: ClassVar[str] = "megatron.energon"

    @staticmethod
    def write(tars: Path, folder: Path) -> None:
        """Write tars with its metadata."""
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

        names = sorted(path.name for path in tars.iterdir())
        folder.mkdir()
        for name in names:
            os.link(tars / name, folder / name)
        WebdatasetPreparator.prepare_dataset(EPath(str(folder)), names, split_parts_ratio=[("train", 1.0)], workers=1)
        described = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (folder / ".nv-meta" / "dataset.yaml").write_text(described)

    def __init__(self, setup: ReadSetup, state: Any = None) -> None:
        self._configure(setup)
        from megatron import energon

        @energon.stateless
        def cook(raw: dict[str, Any]) -> dict[str, Any]:
            return energon.basic_sample_keys(raw) | {"sample": decode(raw["png"], raw["cls"])}

        class Encoder(energon.DefaultTaskEncoder):
            decoder = None
            cookers = (energon.Cooker(cook),)

            def batch(self, samples: Any) -> Any:
                return collate([sample["sample"] for sample in samples])

            def encode_batch(self, batch: Any) -> Any:
                return batch

        data = energon.get_train_dataset(
            f"msc://benchmark/{URI.partition('//')[2].partition('/')[2]}-energon",
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=setup.workers),
            batch_size=BATCH,
            shuffle_buffer_size=BUFFER,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
        )
        self.loader = energon.get_savable_loader(data)
        if state is not None:
            self.loader.restore_state_rank(state)

    @staticmethod
    def _configure(setup: ReadSetup) -> None:
        """Tell its client of object stores where the S3 server is."""
        key, secret = setup.credentials()
        storage = {"endpoint_url": setup.storage.endpoint_url, "region_name": setup.storage.region}
        profile = {
            "storage_provider": {"type": "s3", "options": {"base_path": URI.split("/")[2], **storage}},
            "credentials_provider": {"type": "S3Credentials", "options": {"access_key": key, "secret_key": secret}},
        }
        setup.cache.mkdir(parents=True, exist_ok=True)
        file = setup.cache / "client.json"
        file.write_text(json.dumps({"profiles": {"benchmark": profile}}))
        os.environ["MSC_CONFIG"] = str(file)

    def batches(self) -> BATCHES:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.save_state_rank()


def samples_of(tars: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the image and the label of each sample of tars, in their order."""
    import webdataset

    for sample in webdataset.WebDataset([str(path) for path in sorted(tars.iterdir())], shardshuffle=False):
        yield sample["png"], int(sample["cls"])


PEERS: dict[str, type[System]] = {
    "webdataset": WebDatasetStream,
    "webdataset_readme": WebDatasetReadme,
    "mosaicml": MosaicStream,
    "litdata": LitDataStream,
    "energon": EnergonStream,
}
