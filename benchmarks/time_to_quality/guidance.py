"""Which guidance scale models of `ddpm flow` draw best with: the same trainings, drawn with several.

    python -m benchmarks.time_to_quality.guidance [--json] [--budget SECONDS] [--seeds N] [--data NAME,…]

Trains as the benchmark beside it does, or takes the trainings that it has kept in the same work folder, and draws as
many samples of each class as there are in the data, for every scale from the same noise. The same classifier judges
them. Data sets are measured each within itself: the published file keeps those that are not named.
"""

from __future__ import annotations

import itertools
import json

from benchmarks.results import out_folder, publish
from benchmarks.time_to_quality.run import conditions, data_set, parse, work_of

SCALES = (1.0, 1.5, 2.0, 3.0)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and publish the result."""
    options = parse(arguments, "time_to_quality.guidance", __doc__, "mnist,cifar10")
    work = work_of(options)
    path = out_folder(options, "benchmarks/results") / "guidance_scales.json"
    data = json.loads(path.read_text())["data"] if path.exists() else {}
    for name in options.data.split(","):
        found = data_set(options, name, work)
        rows = [
            found.at_scale(scale, options.budget, seed)
            for seed, scale in itertools.product(range(options.seeds), options.size.of(SCALES, SCALES, SCALES[:1]))
        ]
        judge = {"floor": found.judge.floor, "accuracy": found.judge.accuracy}
        data[name] = conditions(options.samples) | {"budget_s": options.budget, "judge": judge, "rows": rows}
    publish({"benchmark": "guidance_scales", "data": data}, "guidance_scales", options)


if __name__ == "__main__":
    main()
