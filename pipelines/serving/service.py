"""A server from the side of the command that runs it: started on a Ray cluster, watched, and ended in order."""

from __future__ import annotations

import io
import logging
import socket
import time
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from pipelines.config import Config, ConfigError
from pipelines.environment.loopback import bypass_proxies, is_loopback
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Notice
from pipelines.remote.tasks import alive_nodes
from pipelines.serving.application import build
from pipelines.training.resources import possible_workers

POLL_S = 0.5
PAGE = "page"
"""The path of the page, and the end of the name of its application."""


class ServingError(PipelineError):
    """Models cannot be served: says why, and what to do."""


@dataclass
class ModelService:
    """An application of models on Ray Serve.

    Attributes:
        served: MODEL references, the default one first.
        config: the configuration, with every address filled in; this process is connected to its Ray.
        say: called with what happens, in words.
    """

    served: Sequence[str]
    config: Config
    say: Notice
    url: str = ""
    _started: list[str] = field(default_factory=list)
    _brought_serve: bool = False
    _versions: dict[str, str | None] = field(default_factory=dict)

    def start(self, token_digest: str | None, *, replace: bool = False) -> None:
        """Start the application, and wait until every model is loaded.

        Args:
            token_digest: of the bearer token that requests need; None for none.
            replace: take the place of an application of that name, instead of refusing.

        Raises:
            ConfigError: the address or name is taken.
            ServingError: a model cannot be loaded.
        """
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its progress is said in words here
        serving = self.config.serving
        self._await_room()
        port = self._start_serve()
        running = serve.status().applications
        if serving.name in running and not replace:
            raise ConfigError(
                f"serving.name = {serving.name}: an application of that name runs on this Ray cluster already: choose "
                "another serving.name and serving.prefix, or take its place with --replace"
            )
        host = "127.0.0.1" if serving.host == "0.0.0.0" else serving.host
        self.url = f"http://{host}:{port}{serving.prefix.rstrip('/')}"
        bypass_proxies(self.url)
        self._run(serving.name, build(self.served, self.config, token_digest), serving.prefix)

    def add_page(self, page: Any) -> str:
        """Start a page as an application of its own, and return its address.

        Args:
            page: an application of Ray Serve that answers HTTP.
        """
        serving = self.config.serving
        self._run(f"{serving.name}-{PAGE}", page, f"{serving.prefix.rstrip('/')}/{PAGE}")
        return f"{self.url}/{PAGE}"

    @property
    def front(self) -> Any:
        """The handle of the front, whose `ask` takes a body and returns an answer."""
        return serve.get_app_handle(self.config.serving.name)

    def models(self) -> list[dict[str, Any]]:
        """Return what is served."""
        found: list[dict[str, Any]] = self.front.models.remote().result(timeout_s=60)
        return found

    def watch(self) -> None:
        """Say what changes, until Ctrl-C.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            ServingError: the application is gone.
        """
        before = "RUNNING"
        while True:
            time.sleep(self.config.serving.follow_s)
            found = serve.status().applications.get(self.config.serving.name)
            if found is None:
                raise ServingError(f"somebody else has ended the application {self.config.serving.name}")
            if found.status != before:
                self.say(f"{found.status.lower()}: {found.message}" if found.message else found.status.lower())
            before = found.status
            if found.status == "RUNNING":
                self._say_moves()

    def stop(self) -> None:
        """End what was started, and leave the cluster: requests that were admitted are answered first."""
        # Ray prints to stdout that the controller which is ended here does not answer any more.
        with redirect_stdout(io.StringIO()):
            for name in reversed(self._started):
                serve.delete(name)
            if self._brought_serve and not serve.status().applications:
                serve.shutdown()
            ray.shutdown()

    def _say_moves(self) -> None:
        """Say which version is served, where that has changed."""
        try:
            now = {model["id"]: model["uri"] for model in self.models()}
        except (RayServeException, TimeoutError, RuntimeError):
            return  # the status will say more
        for reference, version in now.items():
            if self._versions.get(reference, version) != version:
                self.say(f"{reference} is {version} now")
        self._versions = now

    def _await_room(self) -> None:
        """Wait until the cluster can hold the replicas, as long as a training would.

        Raises:
            ServingError: it cannot.
        """
        serving = self.config.serving
        gpus = {"GPU": serving.gpus_per_replica} if serving.gpus_per_replica else {}
        needs = {"CPU": serving.cpus_per_replica, **gpus}
        wanted = serving.min_replicas * len(self.served)
        deadline, said = time.monotonic() + self.config.cluster.patience_s, False
        while any(needs.values()) and possible_workers(alive_nodes(), needs) < wanted:
            each = " and ".join(f"{need:g} {name}" for name, need in needs.items())
            why = f"the Ray cluster is too small for {wanted} replicas of {each} each"
            if time.monotonic() > deadline:
                raise ServingError(f"{why}: lower serving.replicas or serving.cpus_per_replica, or add nodes")
            if not said:
                self.say(f"{why}: waiting for nodes")
            said = True
            time.sleep(1)

    def _start_serve(self) -> int:
        """Start Ray Serve where it does not run, and return the port on which it answers.

        Raises:
            ConfigError: the port is taken, or Ray Serve runs with another one.
        """
        serving = self.config.serving
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is not None:
            there = client.http_config
            if there.host != serving.host or serving.port not in (0, there.port):
                raise ConfigError(
                    f"Ray Serve runs on this cluster already, at {there.host}:{there.port}: use serving.host="
                    f"{there.host} serving.port={there.port}, with serving.name and serving.prefix of your own"
                )
            return int(there.port)
        port = serving.port or free_port(serving.host)
        address = self.config.cluster.address or ""
        if is_loopback(address) and not is_free(serving.host, port):
            raise ConfigError(f"serving.port = {port}: something else listens on {serving.host}:{port}; choose another")
        serve.start(
            proxy_location="HeadOnly" if is_loopback(serving.host) else "EveryNode",
            http_options={"host": serving.host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        self._brought_serve = True
        return port

    def _run(self, name: str, application: Any, prefix: str) -> None:
        """Start an application and wait until it runs.

        Raises:
            ServingError: it does not.
        """
        self._started.append(name)
        target = serve.RunTarget(application, name, prefix)
        serve.run_many([target], wait_for_applications_running=False)
        said = ""
        while True:
            found = serve.status().applications[name]
            if found.status == "RUNNING":
                return
            if found.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                parts = [found.message, *(part.message for part in found.deployments.values())]
                raise ServingError("\n".join(dict.fromkeys(filter(None, parts))))
            waiting = next((part.message for part in found.deployments.values() if part.message), "")
            if waiting and waiting != said:
                self.say(waiting)
                said = waiting
            time.sleep(POLL_S)


def free_port(host: str) -> int:
    """Return a port of an interface that nothing listens on."""
    with closing(socket.create_server((host, 0))) as listener:
        return int(listener.getsockname()[1])


def is_free(host: str, port: int) -> bool:
    """Return whether nothing listens on a port of an interface."""
    try:
        with closing(socket.create_server((host, port))):
            return True
    except OSError:
        return False
