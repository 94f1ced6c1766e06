"""A checkpoint of a tiny network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ddpm.models.unet import UNet, UNetConfig
from pipelines.checkpoints import Checkpoint, CheckpointState, fetch_checkpoint, resumable_checkpoints
from pipelines.checkpoints.references import model_spec
from pipelines.config import compose
from pipelines.shards.index import ShardInfo, make_dataset
from pipelines.storage import Storage

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


def fetch_newest(storage: Storage, folder: str, target: Path) -> tuple[CheckpointState | None, set[str]]:
    """Download the newest whole checkpoint of a run, and return (its state, names of newer ones that are damaged)."""
    found = resumable_checkpoints(storage, folder)
    state, damaged = found.load_newest(lambda uri, _: fetch_checkpoint(storage, uri, target))
    return state, set(damaged)
