"""Commands of this program on clusters: a RayJob of KubeRay, a cluster on EC2, a job on any Ray cluster.

A launch uses the same `Config` as the command itself: `command` has the command and its name, `kuberay` and `aws`
render the files of the cluster, `kubectl` and `ray_jobs` start, follow and stop it.
"""

from pipelines.launch.command import (
    VERBS,
    ClusterCommand,
    LaunchError,
    overrides_of,
    parse_command,
    require_reachable,
    with_addresses,
)

__all__ = [
    "VERBS",
    "ClusterCommand",
    "LaunchError",
    "overrides_of",
    "parse_command",
    "require_reachable",
    "with_addresses",
]
