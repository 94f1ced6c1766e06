"""The Ray cluster of a training: connecting to it, and whether it can hold the workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import tracking
from pipelines.config import ClusterConfig, Config
from pipelines.environment.limits import NodeLimits, limits_here
from pipelines.environment.loopback import bypass_proxies, is_loopback
from pipelines.remote.tasks import alive_nodes
from pipelines.storage import Storage
from pipelines.training.errors import TrainingError

LIMITS_S = 60.0
"""Seconds in which nodes say what they have of memory; a process starts on each for it."""


def connect_ray(config: Config) -> None:
    """Connect to the Ray cluster of the configuration, once per process.

    The job-level environment reaches every worker. Ray's dashboard shows it: it holds paths and endpoints, no secrets.

    Raises:
        TrainingError: no cluster answers.
    """
    # How often Ray Train's controller polls its workers: a failure is noticed that much later.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    group_start_s()
    if ray.is_initialized():
        return
    environment = {
        **Storage.of(config).environment(),
        **tracking.environment(),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning barriers ruin a step beside any busy process
        "OMP_NUM_THREADS": str(config.cluster.threads_per_worker),
        "RAY_TRAIN_V2_ENABLED": "1",
        # How many collectives NCCL remembers, for the log of a worker that hangs.
        "TORCH_NCCL_TRACE_BUFFER_SIZE": os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),
        # How long a restart waits for workers that may hang, in seconds.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": os.environ.get("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "10"),
    }
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    bypass_proxies(address or "127.0.0.1")
    if address and address != "auto" and "://" not in address:
        # Ray Train's helper that frees what a lost controller had reserved asks for the cluster of its machine, and
        # ends in an error where there are two: the next controller would then wait for ever for the same CPUs.
        environment["RAY_ADDRESS"] = address
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": environment},
            log_to_driver=False,
            logging_level="ERROR",
            namespace="ddpm",
        )
    except ConnectionError as error:
        raise TrainingError(f"no Ray cluster answers at {address}: check cluster.address or RAY_ADDRESS") from error


def group_start_s() -> float:
    """Return the seconds that Ray Train waits for the resources of a group of workers before it counts the nodes again.

    For Ray a node that was lost is there for 15 to 30 s more. A group that counts on it waits in vain, by Ray Train's
    own default for a minute.
    """
    return float(os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20"))


def per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """Return the resources that Ray reserves for a worker, by Ray's names."""
    gpus = {"GPU": float(cluster.gpus_per_worker)} if cluster.gpus_per_worker else {}
    return {"CPU": float(cluster.cpus_per_worker), **gpus}


def possible_workers(nodes: Sequence[Mapping[str, float]], worker: Mapping[str, float]) -> int:
    """Return how many workers fit on nodes with these resources; a worker does not span two nodes."""
    return sum(int(min(node.get(name, 0.0) / need for name, need in worker.items() if need)) for node in nodes)


def has_room_beside(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float]) -> bool:
    """Return whether the nodes can hold all workers and, on one node, a further task.

    Workers that start again, or an elastic run that grows, then find all that they need.

    Args:
        needs: what the other thing reserves, by Ray's names.
    """
    worker = per_worker(cluster)
    for i, node in enumerate(nodes):
        rest = {name: node.get(name, 0.0) - needs.get(name, 0.0) for name in node.keys() | needs.keys()}
        others = [*nodes[:i], *nodes[i + 1 :]]
        if min(rest.values()) >= 0 and possible_workers([rest, *others], worker) >= cluster.max_workers:
            return True
    return False


def is_free(needs: Mapping[str, float]) -> bool:
    """Return whether these resources, by Ray's names, are free on the cluster at the moment."""
    free = ray.available_resources()
    return all(free.get(name, 0.0) >= need for name, need in needs.items())


def shortage(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Return why the nodes cannot hold the smallest number of workers, as text; None where they can."""
    worker = per_worker(cluster)
    fits = possible_workers(nodes, worker)
    if fits >= cluster.min_workers:
        return None
    needs = " and ".join(f"{need:g} {name}" for name, need in worker.items())
    there = ", ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}" for name in worker)
    return (
        f"the Ray cluster is too small for {cluster.min_workers} workers: each needs {needs} on one node, "
        f"{len(nodes)} node{'s' * (len(nodes) != 1)} with {there} in all hold {fits}. "
        "Lower cluster.num_workers, cpus_per_worker or gpus_per_worker, or add nodes"
    )


def require_resources(config: Config, notice: Callable[[str], None] = lambda text: None) -> None:
    """Wait up to `cluster.patience_s` until the cluster can hold the workers.

    Raises:
        TrainingError: the nodes still cannot hold the workers.
    """
    deadline = time.monotonic() + config.cluster.patience_s
    noticed = False
    while (short := shortage(config.cluster, alive_nodes())) is not None:
        # The local stack has one node and will not grow: fail at once.
        if config.storage.local_stack or time.monotonic() > deadline:
            raise TrainingError(short)
        if not noticed:
            notice(f"waiting up to {config.cluster.patience_s:.0f} s: {short}")
        noticed = True
        time.sleep(1)


def require_memory(config: Config, notice: Callable[[str], None] = lambda text: None) -> None:
    """Refuse a training that surely does not fit the nodes; say so where it may not.

    Raises:
        ConfigError: names the place, what takes it, and the setting that helps.
    """
    if not config.cluster.check_memory:
        return
    # Here, not above: it imports what only ranks compute with.
    from pipelines.training.capacity import PLACES, placement_of, require_room

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None or is_loopback(address):
        limits, per_node = limits_here(), None
    else:
        worker = per_worker(config.cluster)
        nodes = {n["NodeID"]: possible_workers([n["Resources"]], worker) for n in ray.nodes() if n["Alive"]}
        limits, per_node = largest_limits(_limits_of([node for node, fit in nodes.items() if fit])), max(nodes.values())
    for found in require_room(config, placement_of(config, per_node), limits):
        if found.verdict == "tight":
            notice(f"the {PLACES[found.place]} may not be enough: about {found}; {found.remedy}")


def largest_limits(found: Sequence[NodeLimits]) -> NodeLimits:
    """Return the most that any of some nodes has, as far as it is known: what does not fit there fits nowhere."""

    def most(name: str) -> float | None:
        known = [getattr(limits, name) for limits in found]
        return None if None in known else max(known, default=None)

    return NodeLimits("the largest node", most("device"), most("node"), most("disk"), most("shared"))


def _limits_of(nodes: Sequence[str]) -> list[NodeLimits]:
    """Return what nodes say of their memory; nothing where one does not answer."""
    tasks = [
        ray.remote(num_cpus=0)(limits_here)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
        for node in nodes
    ]
    try:
        return ray.get(tasks, timeout=LIMITS_S)
    except RayError:
        return []
