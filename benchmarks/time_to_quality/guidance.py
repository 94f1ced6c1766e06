"""Which guidance scale models of `ddpm flow` draw best with: the same trainings, drawn with several.

    python -m benchmarks.time_to_quality.guidance [--json] [--budget SECONDS] [--seeds N] [--data NAME,…]

Trains as the benchmark beside it does, or takes the trainings that it has kept in the same work folder, and draws as
many samples of each class as there are in the data, for every scale from the same noise. The same classifier judges
them. Data sets are measured each within itself: the published file keeps those that are not named.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from benchmarks.results import ROOT, publish
from benchmarks.time_to_quality.pictures import DATA_SETS
from benchmarks.time_to_quality.run import DataSet, conditions

SCALES = (1.0, 1.5, 2.0, 3.0)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and publish the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_quality.guidance", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--work", type=Path, default=ROOT / ".ddpm" / "time_to_quality", help="keeps all parts")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of a training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="mnist,cifar10", help="names of data sets")
    parser.add_argument("--samples", type=int, default=1_000, help="with every scale")
    parser.add_argument("--json", action="store_true", help="print the result as the last line (always done)")
    options = parser.parse_args(arguments)
    work = options.work.resolve() / f"{options.budget:.0f}s"
    work.mkdir(parents=True, exist_ok=True)
    path = ROOT / "benchmarks" / "results" / "guidance_scales.json"
    data = json.loads(path.read_text())["data"] if path.exists() else {}
    for name in options.data.split(","):
        found = DataSet(DATA_SETS[name](options.work.resolve()), work, options.samples)
        rows = [
            found.at_scale(scale, options.budget, seed)
            for seed, scale in itertools.product(range(options.seeds), SCALES)
        ]
        judge = {"floor": found.judge.floor, "accuracy": found.judge.accuracy}
        data[name] = conditions(options.samples) | {"budget_s": options.budget, "judge": judge, "rows": rows}
    publish({"benchmark": "guidance_scales", "data": data}, "guidance_scales", False)


if __name__ == "__main__":
    main()
