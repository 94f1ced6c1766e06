"""The choices of one kind by name: what this package brings, and what other packages add by an entry point."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> choice, such as "ddim" -> `DDIM`.

    Another package adds a choice by an entry point in the registry's group, for example in its pyproject.toml
        [project.entry-points."ddpm.samplers"]
        mine = "my_package:MySampler"
    Entry points are read once, when the registry is first looked into.

    Args:
        kind: what the choices are, in the singular, for messages: "sampler".
        group: the entry-point group by which other packages add choices: "ddpm.samplers".
        choices: those of this package.
    """

    def __init__(self, kind: str, group: str, choices: Mapping[str, T]) -> None:
        self.kind, self.group = kind, group
        self._own = dict(choices)
        self._all: dict[str, T] | None = None

    def __getitem__(self, name: str) -> T:
        """The choice of a name.

        Raises:
            KeyError: there is none; says which there are.
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
        """The choice of a name that a user gave.

        Raises:
            ValueError: there is none; says which there are.
        """
        if name not in self._choices():
            raise ValueError(self.unknown(name))
        return self._choices()[name]

    def unknown(self, name: str) -> str:
        """The message for a name that is not here."""
        close = difflib.get_close_matches(name, list(self), n=1, cutoff=0.5)
        return f"unknown {self.kind} {name!r}; allowed: {', '.join(self)}." + (
            f" Did you mean '{close[0]}'?" if close else ""
        )

    def name_of(self, choice: object) -> str:
        """The name of a choice, given itself or an instance of it.

        Raises:
            ValueError: it is not registered.
        """
        cls = choice if isinstance(choice, type) else type(choice)
        for name, there in self._choices().items():
            if there is cls:
                return name
        raise ValueError(f"{cls.__qualname__} is not registered as a {self.kind}; there are: {', '.join(self)}")

    def _choices(self) -> dict[str, T]:
        if self._all is None:
            found = dict(self._own)
            for entry in entry_points(group=self.group):
                if entry.name in self._own:
                    raise ValueError(f"the entry point {entry.name!r} in {self.group} is named like a built-in choice")
                found[entry.name] = entry.load()
            self._all = found
        return self._all
