"""Pod templates of a Ray cluster on Kubernetes, as plain values that `yaml` dumps: head, workers, submitter."""

from __future__ import annotations

import math
import re
from typing import Any

from pipelines.config import Config, KubeRayLaunch
from pipelines.environment.limits import SMALLEST, NodeLimits
from pipelines.launch.command import ClusterCommand

Plain = dict[str, Any]

USER = 1000
"""User and group of the image, see infra/docker/Dockerfile."""
SECRET_FOLDER = "/var/run/secrets/ddpm/s3"
SIGNING_FOLDER = "/var/run/secrets/ddpm/signing"
CACHE_FOLDER = "/var/cache/ddpm"
SPARE_CPUS = 2
"""Additional cores of a worker pod, for Ray's own processes and an evaluation during training."""
GIB = 2**30
CACHE_MARGIN = 10
"""Factor of a volume for shards over `data.cache_gib`, for partial downloads and compiled networks."""


def head_template(command: ClusterCommand, launch: KubeRayLaunch) -> Plain:
    """Return the pod of the head: the cluster's services and the driver, no training."""
    resources = {"cpu": f"{launch.head_cpus:g}", "memory": gib(launch.head_memory_gib)}
    container = {
        "name": "ray-head",
        "image": launch.head_image or launch.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [
            {"name": "gcs-server", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "client", "containerPort": 10001},
        ],
        **_environment(command, launch, command.stop_variables),
        "volumeMounts": [
            *_secret_mount("s3", SECRET_FOLDER, launch.s3_secret),
            *_secret_mount("signing", SIGNING_FOLDER, launch.signing_secret),
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
        "resources": {
            "requests": resources,
            "limits": dict(resources),
        },  # limits, because KubeRay passes the limits to Ray
        "securityContext": _container_security(),
    }
    volumes = [
        *_secret_volume("s3", launch.s3_secret),
        *_secret_volume("signing", launch.signing_secret),
        _memory("shm", launch.head_memory_gib / 4),
    ]
    return {"spec": {**_pod(launch), "containers": [container], "volumes": volumes}}


def worker_template(command: ClusterCommand, launch: KubeRayLaunch, *, spot: bool) -> Plain:
    """Return the pod of `launch.workers_per_node` workers; one pod is one Ray node.

    Args:
        spot: whether it runs on spot nodes.
    """
    config = command.config
    folder = config.data.cache_dir or CACHE_FOLDER
    resources = worker_resources(config, launch)
    container = {
        "name": "ray-worker",
        "image": launch.image,
        "imagePullPolicy": "IfNotPresent",
        **_environment(command, launch, {"XDG_CACHE_HOME": folder}),
        "volumeMounts": [
            *_secret_mount("s3", SECRET_FOLDER, launch.s3_secret),
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "cache", "mountPath": folder},
        ],
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": _container_security(),
    }
    spec = {
        **_pod(launch, spot=spot),
        "automountServiceAccountToken": False,  # a role for S3 uses its own token
        "containers": [container],
        "volumes": [
            *_secret_volume("s3", launch.s3_secret),
            # Shared by object store, NCCL and data loading; its use counts against the memory limit.
            _memory("shm", launch.shm_gib * launch.workers_per_node),
            _cache(config, launch),
        ],
    }
    if spot:
        container["lifecycle"] = {"preStop": _drain(launch.spot_notice_s)}
        spec["terminationGracePeriodSeconds"] = launch.spot_notice_s + 5
    selector, tolerations = _placement(config, launch, spot=spot)
    if selector:
        spec["nodeSelector"] = selector
    if tolerations:
        spec["tolerations"] = tolerations
    return {"spec": spec}


def submitter_template(launch: KubeRayLaunch) -> Plain:
    """Return the pod that runs `ray job submit`, so that `kubectl logs` on it follows the command."""
    container = {
        "name": "ray-job-submitter",  # no command: KubeRay writes it
        "image": launch.head_image or launch.image,
        "imagePullPolicy": "IfNotPresent",
        "resources": {
            "requests": {"cpu": "200m", "memory": "512Mi"},
            "limits": {"cpu": "1", "memory": "1Gi"},
        },
        "securityContext": _container_security(),
    }
    return {"spec": {**_pod(launch), "automountServiceAccountToken": False, "containers": [container]}}


def worker_resources(config: Config, launch: KubeRayLaunch) -> dict[str, str]:
    """Return the resource requests of a worker pod, which are also the resources that Ray offers there."""
    cluster, per_node = config.cluster, launch.workers_per_node
    found = {
        "cpu": str(math.ceil(cluster.cpus_per_worker * per_node) + SPARE_CPUS),
        "memory": gib(launch.memory_gib * per_node),
        "ephemeral-storage": gib(launch.disk_gib + (0 if launch.cache_class else cache_gib(config))),
    }
    if cluster.gpus_per_worker:
        found["nvidia.com/gpu"] = str(cluster.gpus_per_worker * per_node)
    return found


def pod_limits(launch: KubeRayLaunch) -> NodeLimits:
    """Return what a worker pod has; the memory of its GPUs is known where the label of the nodes names it."""
    named = re.search(r"(\d+)GB", launch.gpu_product or "")
    workers, shared = launch.workers_per_node, launch.shm_gib * launch.workers_per_node * GIB
    settings = {"node": "launch.memory_gib", "disk": "launch.disk_gib", "shared": "launch.shm_gib"}
    # A card of 80 GB has a little less than 80 GiB.
    device = None if named is None else int(named[1]) * GIB
    memory, disk = launch.memory_gib * workers * GIB, launch.disk_gib * GIB
    return NodeLimits("a pod", device, memory, disk, shared if shared >= SMALLEST else None, settings)


def cache_gib(config: Config) -> int:
    """Return the size of the volume for shards in GiB."""
    return math.ceil(config.data.cache_gib + config.data.cache_gib / CACHE_MARGIN)


def gib(size: float) -> str:
    """Return a size in GiB as a quantity of Kubernetes."""
    return f"{size:.0f}Gi" if size == int(size) else f"{math.ceil(size * 1024)}Mi"


def _pod(launch: KubeRayLaunch, *, spot: bool = False) -> Plain:
    """Return the common part of all pods; a container that ends is not restarted in place, without the cluster's state.

    Args:
        spot: whether it runs on spot nodes; other pods are kept off them, even if the nodes have no taint.
    """
    spec: Plain = {"restartPolicy": "Never"}
    if launch.service_account:
        spec["serviceAccountName"] = launch.service_account
    if launch.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": launch.image_pull_secret}]
    # fsGroup lets the user read the mounted Secret and write to the cache.
    spec["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if launch.spot and not spot:
        spec["affinity"] = {"nodeAffinity": _without(*_label(launch.spot))}
    return spec


def _container_security() -> Plain:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _environment(command: ClusterCommand, launch: KubeRayLaunch, more: dict[str, str]) -> Plain:
    """Return `env` and `envFrom`: addresses by value, MLflow's login by its Secret, S3's keys by the path of a file.

    Variables of the container reach every process of the Ray node.
    """
    named = command.environment() | more
    if launch.s3_secret:
        named["AWS_SHARED_CREDENTIALS_FILE"] = f"{SECRET_FOLDER}/credentials"
    return {
        "env": [{"name": name, "value": value} for name, value in named.items()],
        "envFrom": [{"secretRef": {"name": launch.mlflow_secret, "optional": True}}],
    }


def _secret_mount(name: str, folder: str, secret: str | None) -> list[Plain]:
    return [{"name": name, "mountPath": folder, "readOnly": True}] if secret else []


def _secret_volume(name: str, secret: str | None) -> list[Plain]:
    # 0440: the group, which is the user's by fsGroup, reads.
    return [{"name": name, "secret": {"secretName": secret, "defaultMode": 0o440}}] if secret else []


def _memory(name: str, size_gib: float) -> Plain:
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": gib(size_gib)}}


def _cache(config: Config, launch: KubeRayLaunch) -> Plain:
    """Return the volume for shards: on the node's disk, or a separate one that is deleted with the pod."""
    size = gib(cache_gib(config))
    if launch.cache_class is None:
        return {"name": "cache", "emptyDir": {"sizeLimit": size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": launch.cache_class,
        "resources": {"requests": {"storage": size}},
    }
    return {"name": "cache", "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _placement(config: Config, launch: KubeRayLaunch, *, spot: bool) -> tuple[dict[str, str], list[Plain]]:
    selector: dict[str, str] = {}
    tolerations: list[Plain] = []
    if config.cluster.gpus_per_worker:  # the usual taint of GPU nodes
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
        if launch.gpu_product:
            selector["nvidia.com/gpu.product"] = launch.gpu_product
    if launch.zone:
        selector["topology.kubernetes.io/zone"] = launch.zone
    if spot and launch.spot:
        key, value = _label(launch.spot)
        selector[key] = value
        tolerations.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    return selector, tolerations


def _label(text: str) -> tuple[str, str]:
    """Return key and value of a label of nodes, written KEY:VALUE."""
    key, _, value = text.partition(":")
    return key, value


def _without(key: str, value: str) -> Plain:
    """Return the affinity of a pod for nodes without a label, or with another value of it."""
    term = {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}


def _drain(notice_s: int) -> Plain:
    """Return the preStop hook of a pod: it tells Ray that the node will go, so that the training writes a checkpoint.

    If the cluster is gone already, it does not wait.
    """
    drain = (
        "ray drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message='the pod is being ended' "
        f"--deadline-remaining-seconds={notice_s} && sleep {notice_s}"
    )
    return {"exec": {"command": ["/bin/sh", "-c", drain]}}
