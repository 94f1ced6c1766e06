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
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import commit, make_parser, publish
from pipelines import stack
from pipelines.config import Config, compose
from pipelines.connect import fill
from pipelines.search.study import StudyStore, pareto_front
from pipelines.storage import join

STUDIES = {
    "guidance": "guidance --model models:/digits@champion --study measured +experiment=digits",
    "training": "training --study measured-training +experiment=digits objective.prediction=eps images=25600 "
    "cluster.num_workers=1 guidance=none sampler=dpm_solver sampler.steps=10",
}
"""What follows `ddpm search`, by the kind of the study."""
QUICK = ["search.trials=3", "search.confirm=1", "search.confirm_samples=64"]
SMOKE = ["search.trials=1", "search.confirm=1", "search.confirm_samples=64", "search.samples=8", "search.rungs=1"]
"""What else follows, where less is measured."""


def main(arguments: list[str] | None = None) -> None:
    """Run both studies, which must not be there yet, and keep what they found."""
    options = make_parser("studies", __doc__, quick="three trials of each").parse_args(arguments)
    ddpm = Path(sys.executable).with_name("ddpm")
    for command in STUDIES.values():
        subprocess.run([str(ddpm), "search", *command.split(), *options.size.of([], QUICK, SMOKE)], check=True)
    config = fill(compose(["+experiment=digits"]), {}, stack.read_state())
    found = {kind: read(config, kind, command.split("--study ")[1].split()[0]) for kind, command in STUDIES.items()}
    machine = f"CPU ({platform.machine()}), {os.cpu_count()} cores"
    publish({"benchmark": "studies", "commit": commit(), "machine": machine, "studies": found}, "studies", options)


def read(config: Config, kind: str, name: str) -> dict[str, Any]:
    """Return the trials of a study in the order in which they began, and what its confirmation found."""
    store = StudyStore.of(config, name)
    records, study = store.records(), store.study()
    first, last = min(r.began for r in records), max(r.began + r.seconds for r in records)
    return {
        "command": f"ddpm search {STUDIES[kind]}",
        "wall_s": round(last - first, 1),
        "pareto_front": [record.trial for record in pareto_front(records, study.objectives)],
        "trials": [
            {"trial": r.trial, "params": r.params, "state": r.state, "scores": r.scores, "reports": len(r.history)}
            for r in records
        ],
        "confirmation": json.loads(store.storage.read(join(store.uri, "confirmation.json"))),
    }


if __name__ == "__main__":
    main()
