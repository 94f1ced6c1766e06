"""The files of `infra/kuberay` and `infra/aws`: output of `ddpm launch` for a few commands, as a starting point.

`python -m pipelines.launch.committed infra` writes them (`make infra`). They are a kustomize base and overlays; an
overlay is the difference between two rendered RayJobs as a JSON patch (RFC 6902).
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.config import compose
from pipelines.launch import aws
from pipelines.launch.command import parse_command
from pipelines.launch.kuberay import dump, rayjob

IMAGE = f"ghcr.io/OWNER/ddpm-pipelines:{version('ddpm-pipelines')}"
RUN = ["train", "+experiment=digits", "name=digits"]
ADDRESSES = ["storage=s3", "tracking.uri=http://mlflow.mlflow.svc:5000"]
CPUS = [
    f"launch.image={IMAGE}-cpu",
    "launch.s3_secret=ddpm-s3",
    "launch.memory_gib=4",
    "launch.shm_gib=1",
    "storage.root=s3://ddpm",
    "storage.endpoint_url=http://seaweedfs-s3.storage.svc:8333",
    "data.cache_gib=10",
]
GPUS = [
    f"launch.image={IMAGE}-cuda",
    f"launch.head_image={IMAGE}-cpu",
    "launch.memory_gib=24",
    "launch.shm_gib=8",
    "cluster=gpu",
    "data.cache_gib=50",
]
OVERLAYS = {
    "cpu": ["cluster.num_workers=[1,4]"],
    "gpu": [*GPUS, "cluster.num_workers=2"],
    "spot": [
        *GPUS,
        "cluster.num_workers=[2,8]",
        "launch.on_demand=1",
        "launch.spot=karpenter.sh/capacity-type:spot",
    ],
    "kueue": [*GPUS, "cluster.num_workers=2", "launch.queue=ddpm"],
    "token": ["launch.token_secret=ddpm-ray-token"],
}
"""Overlay -> its settings in addition to the base, which has two CPU workers."""
EC2 = [
    f"launch.image={IMAGE}-cuda",
    f"launch.head_image={IMAGE}-cpu",
    "cluster=gpu",
    "cluster.num_workers=2",
    "data.cache_gib=50",
    "storage.root=s3://REPLACE-WITH-YOUR-BUCKET",
    "tracking.uri=http://mlflow.example.internal:5000",
]
HEADER = (
    "# Written by `make infra` from the code that `ddpm launch` renders with: change pipelines/launch, not this file.\n"
)


def files() -> dict[str, str]:
    """Return the files by their paths below `infra/`."""
    base = rendered([])
    found = {
        "kuberay/base/kustomization.yaml": HEADER + dump(_kustomization(resources=["rayjob.yaml"])),
        "kuberay/base/rayjob.yaml": HEADER + dump(base),
    }
    target = {"group": "ray.io", "version": "v1", "kind": "RayJob"}
    for name, settings in OVERLAYS.items():
        patches = [{"path": "patch.yaml", "target": target}]
        folder = f"kuberay/overlays/{name}"
        found[f"{folder}/kustomization.yaml"] = HEADER + dump(_kustomization(resources=["../../base"], patches=patches))
        found[f"{folder}/patch.yaml"] = HEADER + dump(difference(base, rendered(settings)))
    words = [*RUN, *ADDRESSES[:1], *EC2]
    made = aws.files(parse_command(words, compose(["launch=aws", *words[1:]])))
    return found | {f"aws/{name}": (HEADER if name.endswith(".yaml") else "") + text for name, text in made.items()}


def rendered(settings: list[str]) -> dict[str, Any]:
    """Return the RayJob of the base with more settings; the last value of a field counts."""
    chosen = {word.partition("=")[0]: word for word in [*RUN[1:], *ADDRESSES, *CPUS, *settings]}
    words = [RUN[0], *chosen.values()]
    return rayjob(parse_command(words, compose(["launch=kuberay", *words[1:]])))


def difference(one: Any, other: Any, path: str = "") -> list[dict[str, Any]]:
    """Return the operations of a JSON patch (RFC 6902) that turn one plain value into another."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in [*one, *(key for key in other if key not in one)]:
            there = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in other:
                found.append({"op": "remove", "path": there})
            elif key not in one:
                found.append({"op": "add", "path": there, "value": other[key]})
            else:
                found += difference(one[key], other[key], there)
        return found
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [op for i, pair in enumerate(zip(one, other, strict=True)) for op in difference(*pair, f"{path}/{i}")]
    return [] if one == other else [{"op": "replace", "path": path, "value": other}]


def write(infra: Path) -> None:
    """Write the files below a folder."""
    for name, text in files().items():
        path = infra / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _kustomization(**fields: Any) -> dict[str, Any]:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **fields}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
