"""Small datasets of bright bars: with classes, which are the bars' directions, and without."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.config import compose
from pipelines.shards.index import read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.pipelines.evaluation.evaluators.bars import bars


def write(folder, name, labelled):
    images, labels = bars(60)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / name / (f"class-{label}" if labelled else ".") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image[0])).save(path)
    if not labelled:
        lines = [json.dumps({"file_name": f"{i:03d}.png"}) for i in range(60)]
        (folder / name / "metadata.jsonl").write_text("\n".join(lines))
    uri = f"file://{folder}/{name}-dataset"
    return ingest(
        str(folder / name), uri, Storage(), image_size=8, channels=1, shard_samples=16, test_fraction=0.2
    ).dataset


@pytest.fixture(scope="session")
def _stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluators")
    return {labelled: write(folder, "labelled" if labelled else "unlabelled", labelled) for labelled in (True, False)}


def copy(dataset, folder):
    shutil.copytree(dataset.uri.removeprefix("file://"), folder)
    return read_dataset(f"file://{folder}", Storage())


@pytest.fixture
def labelled(_stored, tmp_path):
    return copy(_stored[True], tmp_path / "labelled-dataset")


@pytest.fixture
def unlabelled(_stored, tmp_path):
    return copy(_stored[False], tmp_path / "unlabelled-dataset")


@pytest.fixture
def config(tmp_path, home):  # whose key signs evaluators
    """Return a function from overrides to a configuration."""

    def make(*overrides):
        places = ["storage=file", f"storage.root=file://{tmp_path}", f"data.cache_dir={tmp_path}/cache"]
        return compose(["+experiment=digits", *places, *overrides])

    return make
