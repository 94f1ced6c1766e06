"""The same pictures as every kind of source, and a bucket that is a folder."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.environment.scratch import scratch_folder
from pipelines.shards.ingest.report import BadImage
from pipelines.shards.ingest.sources import Source, open_source
from pipelines.shards.ingest.tables import ImageRow, read_rows
from pipelines.storage import Storage

CLASSES = ("cat", "dog", "owl")


@dataclass(frozen=True)
class Bucket(Storage):
    """Answers s3://bucket/ from a folder, and counts nothing as local that is not."""

    root: str = ""

    def _there(self, uri: str) -> str:
        return uri.replace("s3://bucket", f"file://{self.root}", 1)

    def read(self, uri, start=0, stop=None, **patience):
        return super().read(self._there(uri), start, stop, **patience)

    def fetch(self, uri, start, stop, sink, **patience):
        return super().fetch(self._there(uri), start, stop, sink, **patience)

    def write(self, uri, data, **patience):
        super().write(self._there(uri), data, **patience)

    def upload(self, path, uri, **patience):
        super().upload(path, self._there(uri), **patience)

    def download(self, uri, path, **patience):
        super().download(self._there(uri), path, **patience)

    def delete(self, uri, **patience):
        super().delete(self._there(uri), **patience)

    def scan(self, uri, **patience):
        for e in super().scan(self._there(uri), **patience):
            yield replace(e, uri=e.uri.replace(f"file://{self.root}", "s3://bucket", 1))


def opened(source: str, storage: Storage, test_fraction: float = 0.1) -> Source:
    """A source, whose manifest is in a folder that lasts as long as the process."""
    return open_source(source, storage, f"file://{tempfile.mkdtemp(dir=scratch_folder())}", test_fraction)


def parse_table(name: str, data: bytes) -> SimpleNamespace:
    """The rows of a table, and those that cannot be used."""
    found = list(read_rows(name, io.BytesIO(data), set()))
    rows, bad = ([each for each in found if isinstance(each, kind)] for kind in (ImageRow, BadImage))
    return SimpleNamespace(rows=rows, bad=bad)


def picture(seed: int, size: tuple[int, int] = (12, 10), kind: str = "png", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def pictures(per_class: int = 12) -> dict[str, bytes]:
    """Files of three classes by path."""
    kinds = ("png", "jpeg", "webp")
    return {
        f"{name}/{i:02d}.{kinds[i % 3].replace('jpeg', 'jpg')}": picture(100 * c + i, (12 + i, 10), kinds[i % 3])
        for c, name in enumerate(CLASSES)
        for i in range(per_class)
    }


def write_files(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def write_zip(path: Path, files: dict[str, bytes | str], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def every_kind(root: Path, files: dict[str, bytes]) -> dict[str, str]:
    """The same labelled pictures as each kind of source, by a name for the kind."""
    labelled = [{"file_name": name, "label": name.partition("/")[0]} for name in files]
    table = "path,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in labelled)
    described = {**files, "metadata.jsonl": jsonl(labelled)}
    rows = pa.table({column: [row[column] for row in labelled] for column in ("file_name", "label")})
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    sources = {
        "class folders": write_files(root / "folders", files),
        "imagefolder": write_files(root / "imagefolder", described),
        "imagefolder, csv": write_files(root / "imagefolder-csv", {**files, "metadata.csv": table}),
        "imagefolder, parquet": write_files(root / "columns", {**files, "metadata.parquet": buffer.getvalue()}),
        "parquet": write_files(root / "rows", {**files, "list.parquet": buffer.getvalue()}) / "list.parquet",
        "zip": write_zip(root / "plain.zip", files),
        "zip, stored, with a top folder": write_zip(
            root / "top.zip", {f"photos/{name}": data for name, data in files.items()}, zipfile.ZIP_STORED
        ),
        "zip of an imagefolder": write_zip(root / "described.zip", described),
        "csv": write_files(root / "table", {**files, "list.csv": table}) / "list.csv",
        "jsonl": write_files(root / "lines", {**files, "list.jsonl": jsonl(labelled)}) / "list.jsonl",
    }
    stored = {f"s3, {kind}": f"s3://bucket/{path.relative_to(root)}" for kind, path in sources.items()}
    return {kind: str(path) for kind, path in sources.items()} | stored
