"""A second node of a local Ray cluster, as `ray.cluster_utils.Cluster` adds one: python node.py GCS_ADDRESS CPUS.

`ray start` refuses a second machine where the stack's loopback setting is on, so the node is made as Ray's own tests
make theirs. It has an address of its own on the loopback interface, and lives as long as this process.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.integration.workers import STARTER, address, start_server

os.environ.update(start_server(address()))  # before Ray is imported, which reads its settings then

from ray._private.node import Node
from ray._private.parameter import RayParams

parameters = RayParams(
    gcs_address=sys.argv[1],
    node_ip_address="127.0.0.2",
    num_cpus=int(sys.argv[2]),
    object_store_memory=128 * 2**20,
    include_log_monitor=False,
    node_manager_port=0,
    min_worker_port=0,
    max_worker_port=0,
    dashboard_agent_listen_port=None,
    setup_worker_path=STARTER,
)
Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=False)
print("there", flush=True)
signal.pause()
