"""Foreign tars on a real S3: indexed by ranged reads, checked, one shard damaged, and left out."""

from __future__ import annotations

import io

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines.storage import Storage
from tests.integration.conftest import Shell

pytestmark = pytest.mark.integration


def shard(folder, part):
    path = folder / f"part-{part}.tar"
    rng = np.random.default_rng(part)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(40):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture, "png")
            writer.write({"__key__": f"{part}/{i:03d}", "png": picture.getvalue(), "cls": str(i % 4).encode()})
    return path


def test_foreign_tars_on_s3_are_indexed_checked_and_quarantined(shell: Shell, s3: Storage, tmp_path):
    uri = "s3://ddpm/datasets/foreign"
    paths = [shard(tmp_path, part) for part in range(6)]
    for path in paths:
        s3.upload(path, f"{uri}/{path.name}")
    indexed = shell.ok("index", uri, "--split", "test=part-5*", "--split", "train=part-*", "--json").answer
    assert indexed["samples"] == {"train": 200, "test": 40}
    assert shell.ok("check", uri, "--json").answer["clean"] is True

    data = bytearray(paths[2].read_bytes())
    data[len(data) // 2] ^= 4
    s3.write(f"{uri}/part-2.tar", bytes(data))
    s3.delete(f"{uri}/part-4.tar")
    done = shell("check", uri, "--quarantine", "--json")
    assert done.code == 1
    whole = {(p["shard"], p["kind"]) for p in done.answer["problems"] if p["sample"] is None}
    assert {("part-2.tar", "bytes"), ("part-4.tar", "missing")} <= whole
    assert done.answer["quarantine"]["excluded"] == 2
    assert s3.exists(f"{uri}/quarantine.json")
