"""RayJobs of commands, as the tests look at them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from pipelines.config import compose
from pipelines.launch import ClusterCommand, overrides_of, parse_command
from pipelines.launch.kuberay import rayjob

TRAIN = ["train", "+experiment=digits", "name=first", "storage=s3", "storage.root=s3://bucket/team"]
TRAIN += ["tracking.uri=http://mlflow.mlflow.svc:5000"]
KUBERAY = ["launch.image=registry/ddpm:1-cuda", "launch.s3_secret=keys"]
GPU = ["cluster=gpu", "cluster.num_workers=2"]
SPOT = "launch.spot=karpenter.sh/capacity-type:spot"


@cache
def command(target: str, *words: str) -> ClusterCommand:
    """The command of these words for a target."""
    return parse_command(words, compose([f"launch={target}", *overrides_of(words)]))


def job(*more: str) -> dict[str, Any]:
    """The RayJob of a training with more settings."""
    return rayjob(command("kuberay", *TRAIN, *KUBERAY, *more))


def leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a nested one that holds no others, by its path; items of a list by their `name`, else number."""
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from leaves(child, f"{path}/{key}")
    elif isinstance(node, list) and node:
        for i, child in enumerate(node):
            name = child.get("name", child.get("groupName", i)) if isinstance(child, dict) else i
            yield from leaves(child, f"{path}/{name}")
    else:
        yield path, node


def templates(rendered: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates of a RayJob by what they are for."""
    cluster = rendered["spec"]["rayClusterSpec"]
    found = {"submitter": rendered["spec"]["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    return found | {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}


def container(template: dict[str, Any]) -> dict[str, Any]:
    """The only container of a pod template."""
    (only,) = template["spec"]["containers"]
    return only


def variables(template: dict[str, Any]) -> dict[str, str]:
    """The variables of the container of a pod template."""
    return {item["name"]: item["value"] for item in container(template).get("env", [])}
