"""The front of a server, with stand-ins for Ray Serve's handles."""

from __future__ import annotations

import asyncio
from types import MappingProxyType

import pytest
from ray.exceptions import RayActorError

from pipelines.config import ConfigError, compose
from pipelines.serving.application import Front, build, scale
from pipelines.serving.bodies import known_names
from pipelines.serving.limits import Limits, RefusedRequest

CHAMPION, OTHER = "models:/digits@champion", "models:/shapes/3"


class Handle:
    """Answers as the replicas of a model do; the first `deaths` of them die."""

    def __init__(self, name: str, deaths: int = 0) -> None:
        self.name, self.deaths, self.go = name, deaths, asyncio.Event()
        self.go.set()
        self.ask = self.version = self

    async def remote(self, body=MappingProxyType({})):
        await self.go.wait()
        if self.deaths:
            self.deaths -= 1
            raise RayActorError
        if body.get("labels") == ["x"]:
            return {"status": 422, "refused": "no class 'x'"}
        batch = {"first": True, "pictures": 1, "waited_s": 0.0}
        return {"answer": {"images": [""], "batch": batch, "by": self.name}}


def front(*handles: Handle, patience_s: float = 20, **limits: int) -> Front:
    config = compose([f"serving.{name}={value}" for name, value in limits.items()]).serving
    return Front({handle.name: handle for handle in handles}, Limits.of(config), None, patience_s)


def test_a_model_is_asked_by_every_name_that_is_its_own():
    assert known_names([CHAMPION, OTHER, "/models/a", "runs:/12"]) == {
        **dict.fromkeys((CHAMPION, "digits@champion", "digits", "champion"), CHAMPION),
        **dict.fromkeys((OTHER, "shapes/3", "shapes"), OTHER),
        "/models/a": "/models/a",
        "runs:/12": "runs:/12",
    }
    both = known_names([CHAMPION, "models:/digits@candidate"])
    assert "digits" not in both
    assert both["candidate"] == "models:/digits@candidate"


def test_the_first_model_is_the_default_and_an_unknown_one_is_named_with_those_there_are():
    async def scenario():
        both = front(Handle(CHAMPION), Handle(OTHER))
        assert (await both.ask({}))["by"] == CHAMPION
        assert (await both.ask({"model": "shapes"}))["by"] == OTHER
        with pytest.raises(RefusedRequest, match="no model 'x'; served are: models:/digits@champion") as refused:
            await both.ask({"model": "x"})
        assert refused.value.status == 404

    asyncio.run(scenario())


def test_a_request_outlives_the_death_of_replicas_but_not_for_ever():
    async def scenario():
        dying = front(Handle(CHAMPION, deaths=3))
        assert (await dying.ask({}))["by"] == CHAMPION
        assert b'ddpm_serve_retries_total{model="models:/digits@champion"} 3.0' in dying._metrics.text()
        dead = front(Handle(CHAMPION, deaths=10_000), patience_s=0.3)
        with pytest.raises(
            RefusedRequest, match="no process that holds models:/digits@champion stays alive"
        ) as refused:
            await dead.ask({})
        assert refused.value.status == 503

    asyncio.run(scenario())


def test_a_model_is_silent_while_its_replicas_do_not_answer(monkeypatch):
    monkeypatch.setattr("pipelines.serving.application.HEALTH_S", 0.1)

    async def scenario():
        stuck = Handle(CHAMPION)
        both = front(stuck, Handle(OTHER))
        assert await both.silent() == []
        stuck.go.clear()
        assert await both.silent() == [CHAMPION]
        assert await front(Handle(CHAMPION, deaths=10_000)).silent() == [CHAMPION]

    asyncio.run(scenario())


def test_a_refusal_of_a_replica_is_passed_on():
    async def scenario():
        with pytest.raises(RefusedRequest, match="no class 'x'") as refused:
            await front(Handle(CHAMPION)).ask({"labels": ["x"]})
        assert refused.value.status == 422

    asyncio.run(scenario())


def test_more_requests_than_the_queue_holds_are_told_to_come_again():
    async def scenario():
        busy = Handle(CHAMPION)
        busy.go.clear()
        full = front(busy, Handle(OTHER), max_queue=3)
        admitted = [asyncio.create_task(full.ask({})) for _ in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(RefusedRequest, match="3 requests wait already, which is the most") as refused:
            await full.ask({})
        assert refused.value.status == 429
        assert b'ddpm_serve_queue{model="models:/digits@champion"} 3.0' in full._metrics.text()
        assert (await full.ask({"model": "shapes"}))["by"] == OTHER  # another model's queue is its own
        admitted[0].cancel()
        await asyncio.sleep(0.01)
        again = asyncio.create_task(full.ask({}))
        busy.go.set()
        assert len(await asyncio.gather(*admitted[1:], again)) == 3
        assert b'ddpm_serve_queue{model="models:/digits@champion"} 0.0' in full._metrics.text()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "replicas, expected",
    [
        ("3", {"num_replicas": 3}),
        (
            "[1,8]",
            {"autoscaling_config": {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 128}},
        ),
    ],
)
def test_replicas_are_a_number_or_a_range(replicas, expected):
    config = compose([f"serving.replicas={replicas}", "serving.gpus_per_replica=0.5"])
    assert scale(config.serving) == expected
    build([CHAMPION, OTHER], config, None)  # Ray Serve accepts it


def test_a_range_that_begins_after_its_end_is_refused():
    with pytest.raises(ConfigError, match=r"replicas must be \[min, max\] with min <= max, got \[3, 2\]"):
        compose(["serving.replicas=[3,2]"])
