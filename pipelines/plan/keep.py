"""Stored plans, with which a repeated command resumes, and plans as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import yaml

from pipelines.config import Config
from pipelines.plan.budget import format_duration
from pipelines.plan.facts import MachineFacts, Plan, PlanLine, SourceFacts
from pipelines.storage import Storage, join, layout


@dataclass(frozen=True)
class StoredPlan:
    """A plan with the facts that it was made from.

    Attributes:
        key: digest of the user's command.
        plan: proposed plan.
        source, machine: facts that it was made from.
        config: complete configuration, as plain values.
    """

    key: str
    plan: Plan
    source: SourceFacts
    machine: MachineFacts
    config: Mapping[str, Any]

    def to_json(self) -> bytes:
        """Return the text that is stored."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> StoredPlan | None:
        """Return a stored plan; None if it is damaged or of another release."""
        try:
            plain = json.loads(text)
            plan = plain["plan"]
            lines = tuple(PlanLine(**line) for line in plan.pop("lines"))
            warnings = tuple(plan.pop("warnings"))
            return cls(
                plain["key"],
                Plan(**plan, lines=lines, warnings=warnings),
                SourceFacts.from_plain(plain["source"]),
                MachineFacts.from_plain(plain["machine"]),
                plain["config"],
            )
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class PlanBook:
    """The stored plans of a storage root, by the name of their run.

    Attributes:
        storage: storage of the plans.
        root: address of the storage root.
    """

    storage: Storage
    root: str

    def find(self, name: str, key: str) -> StoredPlan | None:
        """Return the plan of an earlier, equal command; None if there is none.

        Args:
            name: name of the run that a new plan would have.
            key: key of the command, see `command_key`.
        """
        for entry in self.storage.list(join(self.root, layout.PLANS)):
            if entry.uri.rsplit("/", 1)[-1].startswith(name):
                found = self._read(entry.uri)
                if found is not None and found.key == key:
                    return found
        return None

    def free_name(self, name: str) -> str:
        """Return the name, with a number appended if the plan of another command has it."""
        taken = {entry.uri.rsplit("/", 1)[-1] for entry in self.storage.list(join(self.root, layout.PLANS))}
        number, found = 1, name
        while f"{found}.json" in taken:
            number += 1
            found = f"{name}-{number}"
        return found

    def model_of(self, source: str, name: str) -> str:
        """Return the first of name, name-2, … that is the model of plans of this source, or of no plan.

        Args:
            source: absolute address of the source.
        """
        sources: dict[str, set[str]] = {}
        for entry in self.storage.list(join(self.root, layout.PLANS)):
            plan = self._read(entry.uri)
            if plan is not None:
                sources.setdefault(str(plan.config["registry"]["model"]), set()).add(plan.source.source)
        numbered = (name if number == 1 else f"{name}-{number}" for number in count(1))
        return next(model for model in numbered if source in sources.get(model, {source}))

    def add(self, plan: StoredPlan) -> None:
        """Store a plan under the name of its run."""
        self.storage.write(layout.plan_file(self.root, plan.config["name"]), plan.to_json())

    def _read(self, uri: str) -> StoredPlan | None:
        text = self.storage.find(uri)
        return None if text is None else StoredPlan.from_json(text)


def command_key(source_digest: str, budget_s: float, settings: Mapping[str, Any]) -> str:
    """Return the digest of a user's command: the source and its content, the budget, and the user's settings."""
    content = [source_digest, budget_s, sorted((key, repr(value)) for key, value in settings.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def to_yaml(plan: Plan, config: Config) -> str:
    """Return a plan as a complete configuration in YAML, with its reasons as comments.

    It is for `ddpm flow --config FILE` and `ddpm train --config FILE`; addresses of a local stack are left out.
    """
    reasons = [f"# {line.title}: {line.value}. {line.reason[:1].upper()}{line.reason[1:]}." for line in plan.lines]
    times = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in plan.seconds.items())
    heading = [f"# A plan for {format_duration(plan.budget_s)}, of `ddpm plan`: {times}."]
    body = yaml.safe_dump(config.portable().model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return "\n".join([*heading, *reasons, body])
