"""Following an alias: when it moves, the version that it points to now takes the place of the one that is served.

The new version is loaded and has drawn a picture before it is swapped in; a request keeps the version with which it
began. So nothing is lost while an alias moves: no process ends, no request changes hands, and a version that cannot be
loaded changes nothing. A rolling update of Ray Serve would stop processes, need room for more of them, and a driver
that notices the change; this needs the memory of a second model while the two overlap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Notice

T = TypeVar("T")
LONGEST_PAUSE = 64
"""Looks after which a version that could not be loaded is tried again, at most."""


@dataclass
class Follower(Generic[T]):
    """The version that an alias names, kept up to date.

    Attributes:
        current: what is served now.
        version: address of its version.
        find: returns the address of the version that the alias points to now.
        load: returns what serves a version, ready to draw.
        every_s: seconds between two looks.
        say: called with what happened, in words.
        trouble: why the last look did not end well; empty where it did.
        moves: how often another version took the place.
    """

    current: T
    version: str
    find: Callable[[], str]
    load: Callable[[str], T]
    every_s: float
    say: Notice
    trouble: str = ""
    moves: int = 0
    _failed: str = ""
    _tries: int = 0
    _pause: int = 0

    async def run(self) -> None:
        """Look again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(self.every_s)
            await self.look()

    async def look(self) -> None:
        """Swap in the version that the alias points to now, where it is another one; what goes wrong is said once."""
        there = self.version
        try:
            there = await asyncio.to_thread(self.find)
            if there == self._failed and self._pause > 0:
                self._pause -= 1
                return
            if there != self.version:
                await self._swap(there)
            self._failed, self._tries, self.trouble = "", 0, ""
        except (PipelineError, ValueError, OSError, RuntimeError) as error:
            if there != self.version:
                self._failed, self._tries = there, self._tries + 1 if there == self._failed else 1
                self._pause = min(2**self._tries, LONGEST_PAUSE)
            if str(error) != self.trouble:
                self.say(f"still serving {self.version}: {error}")
            self.trouble = str(error)

    async def _swap(self, there: str) -> None:
        self.say(f"the alias has moved to {there}: loading it")
        loaded = await asyncio.to_thread(self.load, there)
        before, self.current, self.version = self.version, loaded, there
        self.moves += 1
        self.say(f"{there} has taken the place of {before}")
