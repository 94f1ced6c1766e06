"""The noise seeds of a study: functions of its name, so that no two studies select and confirm on the same noise."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Container, Iterable
from dataclasses import dataclass

from pipelines.config import Config


@dataclass(frozen=True)
class NoiseSeeds:
    """The noise seeds of a study: one for all its trials, and another for each confirmation.

    A study that takes its first trials from another one would otherwise be given again the noise on which these have
    been chosen.

    Attributes:
        study: name of the study.
        evaluation: the seeds of `ddpm evaluate`, which no study uses.
    """

    study: str
    evaluation: range

    @classmethod
    def of(cls, config: Config, study: str) -> NoiseSeeds:
        """Return the seeds of the study of this name."""
        asked = config.evaluation
        return cls(study, range(asked.seed, asked.seed + asked.seeds))

    @property
    def trials(self) -> int:
        """The seed of all trials, which are compared on the same noise."""
        return _hashed(f"trials|{self.study}", self.evaluation)

    def confirmation(self, trials: Iterable[str]) -> int:
        """Return the seed of the confirmation after these trials: another one when the study has gone on."""
        ended = ",".join(sorted(trials))
        return _hashed(f"confirmation|{self.study}|{ended}", {*self.evaluation, self.trials})


def _hashed(text: str, taken: Container[int]) -> int:
    """Return a number below 2^48 that is a function of a text, and not one of those that are taken."""
    for attempt in itertools.count():
        seed = int.from_bytes(hashlib.sha256(f"{text}|{attempt}".encode()).digest()[:6])
        if seed not in taken:
            return seed
    raise AssertionError
