import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm.models.unet import UNet
from pipelines.checkpoints import (
    ModelError,
    Published,
    best_published,
    fetch_published,
    list_published,
    load_checkpoint,
    publish,
    published_spec,
    reconstruct_average,
    record_published,
    record_scores,
    save_checkpoint,
)
from pipelines.config import compose
from pipelines.storage import Storage
from tests.pipelines.checkpoints import tiny
from tests.pipelines.checkpoints.tiny import SMALL, a_checkpoint
from tests.pipelines.training.loop.ranks import MemoryTracker


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


def overwritten(one: Published, name: str) -> None:
    """Put other bytes in the place of a file of a published checkpoint."""
    path = Path(one.uri.removeprefix("file://"), name)
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "power_ema.safetensors"])
def test_a_file_that_was_changed_after_publishing_is_not_loaded(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tiny, "CONFIG", compose(["+experiment=digits", "optim.power_ema=[0.05,0.1]"]))
    tracker = MemoryTracker()
    published(tmp_path, tracker, 100)
    (one,) = list_published(tracker)
    (tmp_path / "there").mkdir()
    fetch_published(one, Storage(), tmp_path / "there", name)
    overwritten(one, name)
    with pytest.raises(ModelError, match=rf"{name} is not the file that was published"):
        fetch_published(one, Storage(), tmp_path / "there", name)
    if name == "model.json":
        with pytest.raises(ModelError, match="is not the file that was published"):
            published_spec(one, Storage())
    if name.startswith("power"):
        with pytest.raises(ModelError, match="is not the file that was published"):
            reconstruct_average(tracker, Storage(), 0.1, 100)


def test_a_state_that_was_changed_with_a_file_is_not_that_of_the_record_in_mlflow(tmp_path):
    tracker = MemoryTracker()
    published(tmp_path, tracker, 100)
    (one,) = list_published(tracker)
    folder = Path(one.uri.removeprefix("file://"))
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    overwritten(one, "model.safetensors")
    after = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "state.json").write_text((folder / "state.json").read_text().replace(before, after))
    with pytest.raises(ModelError, match=r"state\.json names other files than the record in MLflow"):
        fetch_published(one, Storage(), tmp_path, "model.safetensors")


def test_a_record_is_known_by_its_files_whatever_became_of_them():
    first = Published("file:///a", 100, "d")

    def has(other: Published) -> bool:
        return first.mark in other.record()[0]

    assert has(first)
    assert has(replace(first, scores={"eval/kid": 0.1}))
    assert has(replace(first, deleted=True))
    assert not has(replace(first, uri="file:///ab"))


class Replaced(MemoryTracker):
    """A tracker whose artifact is cut short at the first reading, as while MLflow replaces it."""

    def read_text(self, name):
        text, self.read_text = super().read_text(name), super().read_text
        return text[:40]


def test_a_record_that_is_being_replaced_is_read_again():
    tracker, published = Replaced(), Published("file:///p", 100, "digest", {"eval/x": 1.0})
    tracker.text(*published.record())
    assert Published.read(tracker, published.name) == published


def test_an_average_of_another_width_is_made_from_published_snapshots(tmp_path, monkeypatch):
    tracker = MemoryTracker()
    with pytest.raises(ModelError, match=r"train with optim\.power_ema"):
        reconstruct_average(tracker, Storage(), 0.1)
    monkeypatch.setattr(tiny, "CONFIG", compose(["+experiment=digits", "optim.power_ema=[0.05,0.1]"]))
    published(tmp_path, tracker, 100, 200)
    tracked = reconstruct_average(tracker, Storage(), 0.1, 100)  # one of the snapshots itself
    assert all(torch.equal(t, torch.full_like(t, 100.0)) for t in tracked.values())
    between = reconstruct_average(tracker, Storage(), 0.07)
    assert between.keys() == UNet(SMALL).state_dict().keys()
    with pytest.raises(ModelError, match="the target is at 500"):
        reconstruct_average(tracker, Storage(), 0.1, 500)
