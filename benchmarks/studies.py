"""The two studies of docs/search.md, of models that predict eps: every trial, and the confirmation.

The model of the first is registered before, as the page says.

The studies must not be there yet: a study is not run twice under one name.

    python -m benchmarks.studies          # 8 minutes on two cores beside the local stack; studies.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

from benchmarks.results import commit, ddpm, make_parser, publish
from pipelines import stack
from pipelines.config import Config, compose
from pipelines.search.study import StudyStore, pareto_front
from pipelines.stack.connect import fill
from pipelines.storage import join

STUDIES = {
    "guidance": "guidance --model models:/digits@champion --study measured +experiment=digits",
    "training": "training --study measured-training +experiment=digits objective.prediction=eps images=25600 "
    "cluster.num_workers=1 guidance=none sampler=dpm_solver sampler.steps=10",
}
"""What follows `ddpm search`, by the kind of the study."""
CONFIRMED = ["search.confirm=1", "search.confirm_samples=64"]
QUICK = {
    "guidance": ["search.trials=3", "search.samples=128", *CONFIRMED],
    "training": ["search.trials=3", "search.samples=128", "images=5120", *CONFIRMED],
}
ONE_AT_A_TIME = ["search.trials=2", "search.concurrent=1", "search.samples=8", "search.rungs=1", *CONFIRMED]
SMOKE = {
    # Trials that cannot win: a winner becomes a version of the model.
    "guidance": ["search.space.sampler.steps.int=[1,1]", *ONE_AT_A_TIME],
    "training": ["images=32", "batch_size=16", "search.bits_per_dim_images=2", "model.channels=[32]",
                 "model.attention=[true]", "model.layers_per_block=1", *ONE_AT_A_TIME],
}  # fmt: skip
"""What else follows, where less is measured."""


def main(arguments: list[str] | None = None) -> None:
    """Run both studies, which must not be there yet, and keep what they found."""
    options = make_parser("studies", __doc__, quick="three trials of each, short trainings").parse_args(arguments)
    commands = {kind: command.split() for kind, command in STUDIES.items()}
    for kind, less in options.size.of({}, QUICK, SMOKE).items():
        commands[kind] += less
        commands[kind][commands[kind].index("--study") + 1] += f"-{options.size.value}"
    for command in commands.values():
        subprocess.run([*ddpm(), "search", *command], check=True)
    config = fill(compose(["+experiment=digits"]), {}, stack.read_state())
    found = {kind: read(config, command) for kind, command in commands.items()}
    machine = f"CPU ({platform.machine()}), {os.cpu_count()} cores"
    publish({"benchmark": "studies", "commit": commit(), "machine": machine, "studies": found}, "studies", options)


def read(config: Config, command: Sequence[str]) -> dict[str, Any]:
    """Return the trials of a study in the order in which they began, and what its confirmation found.

    Args:
        command: what follows `ddpm search`.
    """
    store = StudyStore.of(config, command[command.index("--study") + 1])
    records, study = store.records(), store.study()
    first, last = min(r.began for r in records), max(r.began + r.seconds for r in records)
    return {
        "command": f"ddpm search {' '.join(command)}",
        "wall_s": round(last - first, 1),
        "pareto_front": [record.trial for record in pareto_front(records, study.objectives)],
        "trials": [{"trial": r.trial, "params": r.params, "state": r.state, "scores": r.scores} for r in records],
        "confirmation": json.loads(store.storage.read(join(store.uri, "confirmation.json"))),
    }


if __name__ == "__main__":
    main()
