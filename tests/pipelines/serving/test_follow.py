"""Following an alias: what is served while it moves, and when it cannot be followed."""

import asyncio
import threading

import pytest

from pipelines.presentation.errors import PipelineError
from pipelines.serving.follow import Follower


class Registry:
    """An alias, and loads that can be held up or fail."""

    def __init__(self) -> None:
        self.at: str | Exception = "v1"
        self.loads: list[str] = []
        self.go = threading.Event()
        self.go.set()

    def find(self) -> str:
        if isinstance(self.at, Exception):
            raise self.at
        return self.at

    def load(self, version: str) -> str:
        assert self.go.wait(5)
        self.loads.append(version)
        if version == "broken":
            raise PipelineError("broken draws something that is not a number")
        return f"model of {version}"


@pytest.fixture
def registry():
    return Registry()


def follower(registry, said, every_s=0.01):
    return Follower("model of v1", "v1", registry.find, registry.load, every_s, said.append)


def test_the_version_at_the_alias_takes_the_place_once_it_is_loaded(registry):
    said: list[str] = []

    async def scenario():
        following = follower(registry, said)
        await following.look()
        assert registry.loads == []
        registry.at = "v2"
        registry.go.clear()
        look = asyncio.create_task(following.look())
        await asyncio.sleep(0.05)
        assert following.current == "model of v1"  # served until the new one is there
        registry.go.set()
        await look
        assert (following.current, following.version, following.moves) == ("model of v2", "v2", 1)
        await following.look()
        registry.at = "v1"
        await following.look()
        assert following.current == "model of v1"

    asyncio.run(scenario())
    assert registry.loads == ["v2", "v1"]
    assert said == [
        "the alias has moved to v2: loading it",
        "v2 has taken the place of v1",
        "the alias has moved to v1: loading it",
        "v1 has taken the place of v2",
    ]


@pytest.mark.parametrize("at", ["broken", PipelineError("no answer"), ConnectionError("refused")])
def test_what_cannot_be_loaded_or_found_changes_nothing_and_is_said_once(registry, at):
    said: list[str] = []

    async def scenario():
        following = follower(registry, said)
        registry.at = at
        for _ in range(3):
            await following.look()
        assert following.current == "model of v1"
        assert following.trouble
        registry.at = "v2"
        await following.look()
        assert (following.current, following.trouble) == ("model of v2", "")

    asyncio.run(scenario())
    assert sum(line.startswith("still serving v1: ") for line in said) == 1


def test_a_version_that_cannot_be_loaded_is_tried_again_ever_more_seldom(registry):
    async def scenario():
        following = follower(registry, [])
        registry.at = "broken"
        for _ in range(20):
            await following.look()
        assert len(registry.loads) == 4  # at looks 1, 4, 9 and 18
        registry.at = "v2"
        await following.look()
        assert following.version == "v2"

    asyncio.run(scenario())


def test_it_looks_again_and_again(registry):
    async def scenario():
        following = follower(registry, [])
        task = asyncio.create_task(following.run())
        for version in ("v2", "v3"):
            registry.at = version
            for _ in range(200):
                await asyncio.sleep(0.01)
                if following.version == version:
                    break
            assert following.current == f"model of {version}"
        assert not task.done()
        task.cancel()

    asyncio.run(scenario())
