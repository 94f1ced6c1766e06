"""A command as a RayJob of KubeRay 1.7 (ray.io/v1): a Ray cluster and the job that is submitted to it.

Fields: https://docs.ray.io/en/master/kuberay/references/api.html (KubeRay 1.7).
"""

from __future__ import annotations

import yaml

from pipelines.config import ConfigError, KubeRayLaunch
from pipelines.launch.command import ClusterCommand, require_reachable
from pipelines.launch.pods import (
    SIGNING_FOLDER,
    Plain,
    head_template,
    pod_limits,
    submitter_template,
    worker_template,
)
from pipelines.training.capacity import placement_of, require_room

RAY_VERSION = "2.60.0"
"""Ray version of the image: RAY_VERSION in infra/docker/Dockerfile."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"
IDLE_S = 120
"""Seconds after which the autoscaler removes an idle worker pod: longer than a restart of a training."""


def rayjob(command: ClusterCommand) -> Plain:
    """Return the RayJob of a command.

    Raises:
        ConfigError: settings are incompatible or missing.
    """
    launch = launch_of(command)
    require_reachable(command.config)
    if command.config.storage.root.startswith("s3://") and not (launch.s3_secret or launch.service_account):
        raise ConfigError(
            "the cluster has no access to the bucket: set launch.service_account=NAME, whose role has, or "
            "launch.s3_secret=NAME, a "
            "Secret whose key `credentials` is a file in the form of ~/.aws/credentials"
        )
    if launch.spot:
        command = command.on_spot()
    if launch.signing_secret:
        command = command.with_default("registry.signing_key", f"{SIGNING_FOLDER}/signing.pem")
    metadata: Plain = {
        "name": command.object_name,
        "namespace": launch.namespace,
        "labels": {"app.kubernetes.io/name": "ddpm-pipelines", "app.kubernetes.io/component": "job"},
        "annotations": {"ddpm-pipelines/run": command.name},
    }
    cluster = ray_cluster(command, launch)
    if launch.queue:
        metadata["labels"][QUEUE_LABEL] = launch.queue
        if cluster.get("enableInTreeAutoscaling"):
            metadata["annotations"][ELASTIC_ANNOTATION] = "true"
    spec: Plain = {
        # Default 0: KubeRay cannot distinguish a lost cluster from a wrong setting, and would start one cluster after
        # the other. Repeating is safe, because the same name resumes the same run or study.
        "backoffLimit": launch.backoff_limit,
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": launch.submitter_backoff_limit},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": launch.ttl_s,
        # One line, because the shell of the submitter reads it. No entrypointNumCpus: a command that reserves CPUs
        # cannot run on the head, which offers none. No runtimeEnvYAML: Ray's dashboard shows it.
        "entrypoint": command.shell(),
        "submitterPodTemplate": submitter_template(launch),
        "rayClusterSpec": cluster,
    }
    if launch.deadline_s is not None:
        spec["activeDeadlineSeconds"] = launch.deadline_s
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def ray_cluster(command: ClusterCommand, launch: KubeRayLaunch) -> Plain:
    """Return the cluster: a head, and groups of worker pods."""
    groups = worker_groups(command, launch)
    spec: Plain = {"rayVersion": RAY_VERSION}
    if launch.token:
        named = {"secretName": launch.token_secret} if launch.token_secret else {}
        spec["authOptions"] = {"mode": "token", **named}
    else:
        spec["authOptions"] = {"mode": "disabled"}
    if any(group["minReplicas"] < group["maxReplicas"] for group in groups):
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": IDLE_S}
    # The head offers no CPUs and GPUs, even if its node has some: no training runs there.
    start = {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"}
    spec["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "rayStartParams": start,
        "template": head_template(command, launch),
    }
    spec["workerGroupSpecs"] = groups
    return spec


def worker_groups(command: ClusterCommand, launch: KubeRayLaunch) -> list[Plain]:
    """Return the groups of worker pods: one, or with spot nodes an on-demand and a spot group.

    KubeRay submits the command once the `replicas`, the smallest number that can train, are running.

    Raises:
        ConfigError: the workers do not divide evenly into pods.
    """
    cluster = command.config.cluster
    fewest, most = pods("min", cluster.min_workers, launch), pods("max", cluster.max_workers, launch)
    kind = "gpu" if cluster.gpus_per_worker else "cpu"
    if not launch.spot:
        return [_group(kind, fewest, most, worker_template(command, launch, spot=False))]
    stay = pods("launch.on_demand", launch.on_demand, launch)
    if stay > fewest:
        raise ConfigError(
            f"launch.on_demand = {launch.on_demand} exceeds the smallest number of workers, {cluster.min_workers}: "
            "raise cluster.num_workers or lower it"
        )
    groups = [_group(kind, stay, stay, worker_template(command, launch, spot=False))] if stay else []
    return [*groups, _group("spot", fewest - stay, most - stay, worker_template(command, launch, spot=True))]


def pods(what: str, workers: int, launch: KubeRayLaunch) -> int:
    """Return the number of pods for these workers."""
    if workers % launch.workers_per_node:
        name = "cluster.num_workers" if what in ("min", "max") else what
        raise ConfigError(
            f"{name}: {workers} workers do not divide into pods of launch.workers_per_node = {launch.workers_per_node}"
        )
    return workers // launch.workers_per_node


def launch_of(command: ClusterCommand) -> KubeRayLaunch:
    """Return the settings of the launch."""
    assert isinstance(command.config.launch, KubeRayLaunch)
    return command.config.launch


def require_memory(command: ClusterCommand) -> None:
    """Refuse a training that surely does not fit the pods of its workers.

    Raises:
        ConfigError: names the place, what takes it, and the setting that helps.
    """
    if command.verb in ("train", "flow"):
        launch = launch_of(command)
        require_room(command.config, placement_of(command.config, launch.workers_per_node), pod_limits(launch))


def manifest(command: ClusterCommand) -> str:
    """Return the YAML that `kubectl apply` takes."""
    return dump(rayjob(command))


def dump(plain: object) -> str:
    """Return a value as YAML, with its keys in the order of the code and no anchors."""
    return yaml.dump(plain, Dumper=_Plain, sort_keys=False, width=120)


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _group(name: str, fewest: int, most: int, template: Plain) -> Plain:
    return {
        "groupName": name,
        "replicas": fewest,
        "minReplicas": fewest,
        "maxReplicas": most,
        "rayStartParams": {},  # CPUs and GPUs are those of the limits
        "template": template,
    }
