"""The Ray Serve application: replicas that hold a model each, and one front that answers HTTP and asks them.

Who loses a request where? A replica of a model that dies takes its requests with it, and Ray Serve does not ask another
one: the front does, because a picture is a function of its request, so that drawing it again changes nothing. Where the
front itself dies, its clients see a status of 500 or a closed connection, and have to ask again, as `client` does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random_exponential

from pipelines import tracking
from pipelines.checkpoints import lookup
from pipelines.config import Config, ServingConfig
from pipelines.inference.request import RequestError
from pipelines.serving.bodies import known_names
from pipelines.serving.follow import Follower
from pipelines.serving.http import make_app
from pipelines.serving.limits import Limits, RefusedRequest
from pipelines.serving.metrics import Metrics
from pipelines.serving.served import load

logger = logging.getLogger("ray.serve")
CONNECTIONS = 10_000
"""Requests that the front holds at a time; the limits of each model are far below."""
ASIDE = 16
"""Questions about itself that a replica answers while its queue is full."""
HEALTH_S = 5.0
"""How long a model may take to answer that it is there."""
SHUTDOWN_S = 60.0
"""How long a process that is to end finishes its requests."""


class ModelReplica:
    """A process that holds one model, of the version that its reference names now.

    Args:
        reference: MODEL; an alias is followed.
        config: the configuration, with every address filled in.
    """

    async def __init__(self, reference: str, config: Config) -> None:  # type: ignore[misc]
        self._reference = reference
        threads = config.cluster.threads_per_worker
        drawing = ThreadPoolExecutor(1, "draw", torch.set_num_threads, (threads,))
        # Those of MLflow's protocol wait in a thread each.
        self._callers = ThreadPoolExecutor(config.serving.max_queue, "invoke")

        def find() -> str:
            return lookup.find_registered(reference, config.tracking.uri).uri

        load_version = partial(load, config=config, executor=drawing)
        follows = reference.startswith("models:/") and "@" in reference
        version = await asyncio.to_thread(find) if follows else reference
        served = await asyncio.to_thread(load_version, version)
        self._follower = Follower(served, version, find, load_version, config.serving.follow_s, logger.warning)
        self._following = asyncio.get_running_loop().create_task(self._follower.run()) if follows else None

    async def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"answer": …} to a body of `/v1/images`, or {"status": …, "refused": why}."""
        try:
            return {"answer": await self._follower.current.ask(body)}
        except RequestError as error:
            return {"status": error.status if isinstance(error, RefusedRequest) else 422, "refused": str(error)}

    async def invoke(
        self, body: Mapping[str, Any], content_type: str
    ) -> tuple[tuple[str, int, str], int, list[dict[str, Any]]]:
        """Return the answer to `/invocations` (text, status, type), its number of pictures, and their batches."""
        return await self._follower.current.invoke(body, content_type, self._callers)

    async def describe(self) -> dict[str, Any]:
        """Return what the model is, and how it is followed."""
        served = self._follower.current
        following = None
        if self._following is not None:
            seen = self._follower
            following = {"every_s": seen.every_s, "moves": seen.moves, "trouble": seen.trouble}
        return {"id": self._reference, **served.describe(), "following": following}

    async def version(self) -> str:
        """Return the release of MLflow."""
        return tracking.version_of_mlflow()

    async def check_health(self) -> None:
        """Raise if the alias is no longer followed, which has Ray Serve replace this process."""
        if self._following is not None and self._following.done():
            raise RuntimeError(f"{self._reference} is no longer followed: {self._following}")


class Front:
    """The process that answers HTTP: it admits requests, hands each to a replica of its model, and asks again.

    Args:
        models: reference -> handle of its replicas, the default one first.
        limits: of a request.
        token_digest: of the bearer token; None for none.
        patience_s: how long a request is asked again while replicas die.
    """

    def __init__(self, models: dict[str, Any], limits: Limits, token_digest: str | None, patience_s: float) -> None:
        self._models, self._names = models, known_names(list(models))
        self._limits, self._token_digest, self._patience_s = limits, token_digest, patience_s
        self._open: Counter[str] = Counter(dict.fromkeys(models, 0))
        self._metrics = Metrics(lambda: self._open)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application that Ray Serve answers HTTP with."""
        return make_app(self, self._limits, self._token_digest, self._metrics)

    async def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a body of `/v1/images`.

        Raises:
            RequestError: the model cannot do what is asked, or may not.
        """
        reference = self._find(body.get("model"))
        with self._admitted(reference):
            found = await self._call(reference, "ask", dict(body))
        if "refused" in found:
            raise RefusedRequest(found["status"], found["refused"])
        answer: dict[str, Any] = found["answer"]
        self._metrics.drawn(reference, len(answer["images"]), [answer["batch"]])
        return answer

    async def invoke(self, body: Mapping[str, Any], content_type: str, model: str | None) -> tuple[str, int, str]:
        """Return (text, status, type) of the answer to `/invocations`."""
        reference = self._find(model)
        with self._admitted(reference):
            answer, images, batches = await self._call(reference, "invoke", dict(body), content_type)
        self._metrics.drawn(reference, images, batches)
        return answer

    async def models(self) -> list[dict[str, Any]]:
        """Return what is served."""
        return list(await asyncio.gather(*(self._call(reference, "describe") for reference in self._models)))

    async def silent(self) -> list[str]:
        """Return the models that do not answer now."""
        asked = {reference: asyncio.create_task(self._call(reference, "version")) for reference in self._models}
        _, late = await asyncio.wait(asked.values(), timeout=HEALTH_S)
        for task in late:
            task.cancel()
        return [name for name, task in asked.items() if task in late or task.exception() is not None]

    async def version(self) -> str:
        """Return the release of MLflow."""
        return str(await self._call(next(iter(self._models)), "version"))

    def _find(self, name: Any) -> str:
        """Return the reference that a request's name of a model stands for.

        Raises:
            RefusedRequest: there is no such model.
        """
        if name is None:
            return next(iter(self._models))
        found = self._names.get(name) if isinstance(name, str) else None
        if found is None:
            raise RefusedRequest(404, f"there is no model {name!r}; served are: {', '.join(self._names)}")
        return found

    @contextmanager
    def _admitted(self, reference: str) -> Iterator[None]:
        if self._open[reference] >= self._limits.max_queue:
            raise RefusedRequest(
                429, f"{self._limits.max_queue} requests wait already, which is the most: ask again later"
            )
        self._open[reference] += 1
        try:
            yield
        finally:
            self._open[reference] -= 1

    async def _call(self, reference: str, method: str, *arguments: Any) -> Any:
        """Return what a replica answers; where it dies meanwhile, ask another."""

        def count(_: RetryCallState) -> None:
            self._metrics.retried(reference)

        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type((RayActorError, DeploymentUnavailableError)),
                stop=stop_after_delay(self._patience_s),
                wait=wait_random_exponential(multiplier=0.1, max=2),
                before_sleep=count,
                reraise=True,
            ):
                with attempt:
                    return await getattr(self._models[reference], method).remote(*arguments)
        except (RayActorError, DeploymentUnavailableError) as error:
            raise RefusedRequest(503, f"no process that holds {reference} stays alive: ask again later") from error


async def ask_front(front: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the front of an application answers to a body.

    Args:
        front: its handle.

    Raises:
        RequestError: the request is refused; as it was raised, without what Ray puts around it.
    """
    try:
        answer: dict[str, Any] = await front.ask.remote(dict(body))
        return answer
    except RayTaskError as error:
        if isinstance(error.cause, RequestError):
            raise error.cause from None
        raise


def build(served: Sequence[str], config: Config, token_digest: str | None) -> Any:
    """Return the application of some models.

    Args:
        served: MODEL references, the default one first.
        token_digest: of the bearer token; None for none.
    """
    serving = config.serving
    replica = serve.deployment(
        ModelReplica,
        max_ongoing_requests=serving.max_queue + ASIDE,
        ray_actor_options={"num_cpus": serving.cpus_per_replica, "num_gpus": serving.gpus_per_replica},
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=2,
        **scale(serving),
    )
    handles = {
        reference: replica.options(name=f"model-{i}").bind(reference, config) for i, reference in enumerate(served)
    }
    front = serve.deployment(
        serve.ingress()(Front),
        max_ongoing_requests=CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return front.bind(handles, Limits.of(serving), token_digest, serving.patience_s)


def scale(serving: ServingConfig) -> dict[str, Any]:
    """Return Ray Serve's options for the number of replicas."""
    if serving.min_replicas == serving.max_replicas:
        return {"num_replicas": serving.min_replicas}
    scaling = {"min_replicas": serving.min_replicas, "max_replicas": serving.max_replicas}
    # Two batches for each replica, of requests for one picture, before another one is started.
    return {
        "autoscaling_config": {**scaling, "target_ongoing_requests": min(2 * serving.batch_size, serving.max_queue)}
    }
