import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm.models.unet import UNet, UNetConfig
from pipelines.checkpoints import (
    Checkpoint,
    ModelError,
    best_published,
    check_resumable,
    complete_checkpoints,
    fetch_first,
    list_published,
    load_checkpoint,
    publish,
    reconstruct_average,
    record_published,
    record_scores,
    save_checkpoint,
)
from pipelines.config import compose
from pipelines.references import model_spec, resolve
from pipelines.shards.index import ShardInfo, make_dataset
from pipelines.storage import Storage
from tests.pipelines.training.loop.ranks import MemoryTracker

CONFIG = compose(["+experiment=digits"])
DATASET = make_dataset(
    "file:///data",
    splits={"train": (ShardInfo("train-000000.tar", 5, 10, "ab"),), "test": (ShardInfo("t.tar", 5, 10, "cd"),)},
    classes=tuple("0123456789"),
    channels=1,
    image_size=8,
    mean=(0.0,),
    std=(1.0,),
)


SMALL = UNetConfig(
    in_channels=1,
    out_channels=1,
    channels=(8,),
    layers_per_block=1,
    attention=(False,),
    head_dim=8,
    norm_groups=4,
    num_classes=10,
)


def a_checkpoint(images_seen: int, *, power: bool = False) -> Checkpoint:
    """Of a tiny network whose weights are a function of the images seen."""
    torch.manual_seed(images_seen)
    weights = UNet(SMALL).state_dict()
    tensors = {f"{kind}{name}": torch.randn_like(t) for kind in ("network.", "ema.") for name, t in weights.items()}
    tensors |= {"optimizer.step.conv_in.weight": torch.tensor(3.0), "timesteps.counts": torch.arange(4)}
    if power:
        tensors |= {
            f"power.{i}.{name}": torch.full_like(t, images_seen * 1.0) for i in (0, 1) for name, t in weights.items()
        }
    spec = replace(model_spec(CONFIG, DATASET, {}), network=SMALL)
    return Checkpoint(spec, tensors, images_seen=images_seen, identity=CONFIG.identity(), optimizer_steps=1, skipped=2)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "c", a_checkpoint(128))
    return tmp_path / "c"


def test_a_checkpoint_brings_back_every_bit(tmp_path):
    checkpoint = a_checkpoint(128, power=True)
    state = save_checkpoint(tmp_path / "c", checkpoint)
    loaded, tensors = load_checkpoint(tmp_path / "c")
    assert loaded == replace(state, identity=json.loads(json.dumps(state.identity)))
    assert (loaded.images_seen, loaded.optimizer_steps, loaded.skipped) == (128, 1, 2)
    assert tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(tensors[k], v) for k, v in checkpoint.tensors.items())


def test_a_checkpoint_is_a_model_folder(folder):
    model = resolve(str(folder), tracking_uri=None, storage=Storage()).model
    assert model.spec.classes == DATASET.classes
    assert model.spec.sampling.guidance.scale == CONFIG.guidance.scale


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "model.json"])
def test_a_flipped_bit_or_a_missing_file_is_found(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"{name} is missing or damaged"):
        load_checkpoint(folder)
    path.unlink()
    with pytest.raises(ModelError, match=f"{name} is missing or damaged"):
        load_checkpoint(folder)


def test_a_folder_without_its_last_file_is_incomplete(folder):
    (folder / "state.json").unlink()
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        load_checkpoint(folder)


def test_a_state_of_another_release_or_of_no_sense_is_refused(folder):
    path = folder / "state.json"
    plain = json.loads(path.read_text())
    for damaged in ("[]", "", "{}", json.dumps({**plain, "checkpoint_version": 99}), json.dumps({**plain, "x": 1})):
        path.write_text(damaged)
        with pytest.raises(ModelError, match=r"damaged|checkpoint version"):
            load_checkpoint(folder)


def newest(runs, folder):
    return fetch_first(Storage(), [uri for uri, _ in complete_checkpoints(Storage(), f"file://{runs}")], folder)


def test_a_kill_at_any_byte_leaves_the_older_checkpoint_to_go_on_from(tmp_path):
    runs, order = tmp_path / "runs", ["model.json", "model.safetensors", "training.safetensors", "state.json"]
    save_checkpoint(runs / "old", a_checkpoint(100))
    save_checkpoint(tmp_path / "whole", a_checkpoint(200))
    written = [(name, (tmp_path / "whole" / name).read_bytes()) for name in order]
    assert {name for name, _ in written} == {p.name for p in (tmp_path / "whole").iterdir()}
    for number, (name, data) in enumerate(written):
        cuts = {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1} | (
            {*range(0, len(data), 97)} if name == "state.json" else set()
        )
        for cut in cuts:
            shutil.rmtree(runs / "new", ignore_errors=True)
            (runs / "new").mkdir()
            for done, content in written[:number]:
                (runs / "new" / done).write_bytes(content)
            (runs / "new" / name).write_bytes(data[:cut])
            state = newest(runs, tmp_path / "fetched")
            assert state.images_seen == 100, (name, cut)
            with pytest.raises(ModelError):
                load_checkpoint(runs / "new")
    shutil.copytree(tmp_path / "whole", runs / "new", dirs_exist_ok=True)
    assert newest(runs, tmp_path / "fetched").images_seen == 200


def test_what_the_store_cut_or_changed_afterwards_is_passed_over_as_well(tmp_path):
    for images in (100, 200, 300):
        save_checkpoint(tmp_path / "runs" / str(images), a_checkpoint(images))
    cut = tmp_path / "runs" / "300" / "training.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert [s.images_seen for _, s in complete_checkpoints(Storage(), f"file://{tmp_path}/runs")] == [200, 100]
    changed = tmp_path / "runs" / "200" / "model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    assert newest(tmp_path / "runs", tmp_path / "fetched").images_seen == 100
    shutil.rmtree(tmp_path / "runs" / "100")
    with pytest.raises(
        ModelError, match=r"no checkpoint of the run is whole:\n  .*200: model.safetensors is missing or dam"
    ):
        newest(tmp_path / "runs", tmp_path / "fetched")
    assert fetch_first(Storage(), [], tmp_path / "fetched") is None


def published(tmp_path, tracker, *images):
    for seen in images:
        state = save_checkpoint(tmp_path / "saved" / str(seen), a_checkpoint(seen, power=True))
        source, target = f"file://{tmp_path}/saved/{seen}", f"file://{tmp_path}/published/{seen}"
        record_published(tracker, publish(Storage(), source, target, state))


def test_published_checkpoints_are_whole_copies_and_the_best_is_found_by_a_score(tmp_path):
    tracker = MemoryTracker()
    published(tmp_path, tracker, 100, 200, 300)
    for seen, distance in [(100, 5.0), (200, 3.0), (300, 4.0)]:
        record_scores(tracker, seen, {"frechet_distance": distance})
    record_scores(tracker, 100, {"accuracy": 0.9})
    assert [p.images_seen for p in list_published(tracker)] == [100, 200, 300]
    best = best_published(tracker, "frechet_distance", lowest=True)
    assert best.images_seen == 200
    assert load_checkpoint(Path(best.uri.removeprefix("file://")))[0].images_seen == 200
    assert best_published(tracker, "frechet_distance", lowest=False).images_seen == 100
    assert list_published(tracker)[0].scores == {"frechet_distance": 5.0, "accuracy": 0.9}
    with pytest.raises(ModelError, match="there are: accuracy, frechet_distance"):
        best_published(tracker, "fid", lowest=True)
    with pytest.raises(ModelError, match="no published checkpoint at 7"):
        record_scores(tracker, 7, {})


def test_an_average_of_another_width_is_made_from_published_snapshots(tmp_path, monkeypatch):
    tracker = MemoryTracker()
    with pytest.raises(ModelError, match=r"train with optim\.power_ema"):
        reconstruct_average(tracker, Storage(), 0.1)
    monkeypatch.setattr(f"{__name__}.CONFIG", compose(["+experiment=digits", "optim.power_ema=[0.05,0.1]"]))
    published(tmp_path, tracker, 100, 200)
    tracked = reconstruct_average(tracker, Storage(), 0.1, 100)  # one of the snapshots itself
    assert all(torch.equal(t, torch.full_like(t, 100.0)) for t in tracked.values())
    between = reconstruct_average(tracker, Storage(), 0.07)
    assert between.keys() == UNet(SMALL).state_dict().keys()
    with pytest.raises(ModelError, match="the target stands at 500"):
        reconstruct_average(tracker, Storage(), 0.1, 500)


def test_other_settings_or_data_are_refused_by_name(folder):
    state = load_checkpoint(folder)[0]
    check_resumable(state, CONFIG, DATASET)
    check_resumable(state, compose(["+experiment=digits", "cluster.num_workers=1"]), DATASET)
    with pytest.raises(ModelError, match=r"optim\.lr: 0\.002 before, 0\.5 now"):
        check_resumable(state, compose(["+experiment=digits", "optim.lr=0.5"]), DATASET)
    with pytest.raises(ModelError, match="dataset digest"):
        check_resumable(state, CONFIG, replace(DATASET, digest="other"))
