"""Lists of choices by name: those of this package, and those that other packages add by entry points."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Choices(Mapping[str, T], Generic[T]):
    """Name -> choice, such as "ddim" -> `DDIM`.

    Another package adds a choice by an entry point in the group of the list, for example in its pyproject.toml
        [project.entry-points."ddpm.samplers"]
        mine = "my_package:MySampler"
    Entry points are read once, at the first access.

    Args:
        kind: name of one choice in messages, such as "sampler".
        group: entry-point group for the choices of other packages, such as "ddpm.samplers".
        choices: the choices of this package.

    Examples:
        >>> shapes = Choices("shape", "example.shapes", {"circle": complex, "square": float})
        >>> list(shapes), shapes.name_of(1.5)
        (['circle', 'square'], 'square')
        >>> shapes.find("squares")
        Traceback (most recent call last):
            ...
        ValueError: unknown shape 'squares'; allowed: circle, square. Did you mean 'square'?
    """

    def __init__(self, kind: str, group: str, choices: Mapping[str, T]) -> None:
        self.kind, self.group = kind, group
        self._own = dict(choices)
        self._all: dict[str, T] | None = None

    def __getitem__(self, name: str) -> T:
        """Return the choice with this name.

        Raises:
            KeyError: the name is unknown; the message lists the known ones.
        """
        try:
            return self._choices()[name]
        except KeyError:
            raise KeyError(self.unknown(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices())

    def __len__(self) -> int:
        return len(self._choices())

    def find(self, name: str) -> T:
        """Return the choice with a name given by a user.

        Raises:
            ValueError: the name is unknown; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in self._choices():
            raise ValueError(self.unknown(name))
        return self._choices()[name]

    def unknown(self, name: str) -> str:
        """Return the error message for an unknown name."""
        close = difflib.get_close_matches(str(name), list(self), n=1, cutoff=0.5)
        return f"unknown {self.kind} {name!r}; allowed: {', '.join(self)}." + (
            f" Did you mean '{close[0]}'?" if close else ""
        )

    def name_of(self, choice: object) -> str:
        """Return the name of a choice, given the choice or an instance of it.

        Raises:
            ValueError: the choice is not in the list.
        """
        cls = choice if isinstance(choice, type) else type(choice)
        for name, there in self._choices().items():
            if there is cls:
                return name
        raise ValueError(f"{cls.__qualname__} is no {self.kind} of the list; there are: {', '.join(self)}")

    def _choices(self) -> dict[str, T]:
        if self._all is None:
            found = dict(self._own)
            for entry in _entry_points().select(group=self.group):
                if entry.name in self._own:
                    raise ValueError(f"the entry point {entry.name!r} in {self.group} is named like a built-in choice")
                found[entry.name] = entry.load()
            self._all = found
        return self._all


@cache
def _entry_points() -> EntryPoints:
    """Return the entry points of all installed packages; to look through them takes 10 ms, and there are many lists."""
    return cast("EntryPoints", entry_points())  # what Python 3.11 returns has `select`, too
