"""Benchmark of Optuna's search, as used in studies, against random search, by replay of a recorded table.

    python -m benchmarks.search --record MODEL    evaluate every setting of a grid once (on the local stack; minutes)
    python -m benchmarks.search [--quick] [--json]

The table has the Frechet distance and the number of network evaluations for every combination of some guidance and
sampler settings of one model. A replay takes one setting after another from a searcher and returns its results from the
table, without sampling or training; 20 replays with different seeds are made. As in a guidance study, the objectives
are a low distance and few evaluations.

| figure | meaning |
|---|---|
| `distance` | lowest distance after the given numbers of trials |
| `hypervolume` | share of the hypervolume of the table's Pareto front, on logarithmic axes, after those trials |
| `trials_to` | number of trials until a given share is reached |
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
import torch

from benchmarks.results import ROOT, commit, make_parser, publish, rounded, to_text
from ddpm.quality import FeatureMoments, frechet_distance
from pipelines.config import compose
from pipelines.search.space import Params, apply
from pipelines.search.study import trial_name
from pipelines.search.study_config import StudyConfig
from pipelines.search.tune_trials import past_of, sampler

TABLE = ROOT / "benchmarks" / "results" / "guidance_table.json"
SPACE: dict[str, Any] = {
    "guidance.scale": {"choice": [1.0, 1.5, 2.0, 3.0, 4.0]},
    "guidance.interval.1": {"choice": [0.6, 1.0]},
    "guidance.rescale": {"choice": [0.0, 0.7]},
    "sampler.kind": {"choice": ["ddim", "dpm_solver", "heun"]},
    "sampler.steps": {"choice": [4, 8, 12, 20]},
    "sampler.eta": {"choice": [0.0, 1.0], "when": {"sampler.kind": "ddim"}},
}
SAMPLES = 160
TRIALS, REPLAYS, RANDOM_TRIALS = 40, 20, 10
AFTER = (10, 20, 40)
SHARE = 0.9


def main(arguments: list[str] | None = None) -> None:
    """Record the table, or replay it and publish the result."""
    parser = make_parser("search", __doc__, quick="5 replays")
    parser.add_argument("--record", metavar="MODEL", help="judge the whole grid for this model first")
    options = parser.parse_args(arguments)
    if options.record:
        record(options.record)
    publish(run(options.size.of(REPLAYS, 5, 1)), "search", options)


def study_of(trials: int = TRIALS) -> StudyConfig:
    """Return the study's search space and settings."""
    plain = {"kind": "guidance", "trials": trials, "random_trials": RANDOM_TRIALS, "samples": SAMPLES, "space": SPACE}
    return StudyConfig.model_validate(plain)


def settings() -> Iterator[dict[str, Any]]:
    """Yield every combination of the search space."""
    for values in itertools.product(*(parameter["choice"] for parameter in SPACE.values())):
        params = dict(zip(SPACE, values, strict=True))
        if params["sampler.kind"] != "ddim" and params.pop("sampler.eta"):
            continue
        yield params


# --- the table ----------------------------------------------------------------------------------------------


def record(reference: str) -> None:
    """Evaluate every setting on the local stack and write the table."""
    from pipelines.stack.connect import connect

    # Before ray is imported, because it reads the address of the local head from the environment.
    config = connect(compose(["+experiment=digits"]), os.environ, ["s3", "mlflow", "ray"])

    import ray

    from pipelines.checkpoints import references
    from pipelines.config import sampling
    from pipelines.evaluation.evaluators import open_evaluator
    from pipelines.evaluation.real import open_real
    from pipelines.search.guidance_search import base_of
    from pipelines.search.judge import TrialSubject, asked_for
    from pipelines.shards.index import read_dataset
    from pipelines.storage import Storage
    from pipelines.training.resources import connect_ray

    storage = Storage.of(config)
    model = references.resolve(reference, tracking_uri=config.tracking.uri, storage=storage).model
    dataset = read_dataset(model.spec.lineage["dataset_uri"], storage)
    connect_ray(config)
    evaluator = open_evaluator(config, dataset, say)
    real = open_real(dataset, evaluator, config, notice=say)
    base = base_of(config, model.spec.sampling)

    class Judge:
        def __init__(self, subject: TrialSubject) -> None:
            torch.set_num_threads(1)
            self.subject = subject

        def judge(self, params: Params) -> dict[str, Any]:
            chosen = sampling(apply(base, params))
            drawn = self.subject.draw(chosen, torch.arange(SAMPLES), base.evaluation.seed)
            distance = frechet_distance(self.subject.reference.moments, FeatureMoments.of(drawn.features))
            return {"params": params, "frechet_distance": distance, "evaluations": drawn.evaluations}

    shared = ray.put(TrialSubject.of(model, evaluator, real, {}, asked_for(real, None, SAMPLES, base.evaluation.seed)))
    actor: Any = ray.remote(num_cpus=1)(Judge)
    pool = ray.util.ActorPool([actor.remote(shared) for _ in range(int(ray.cluster_resources()["CPU"]))])
    began, rows, wanted = time.monotonic(), [], list(settings())
    for row in pool.map(lambda judge, params: judge.judge.remote(params), wanted):
        rows.append(row)
        if len(rows) % 20 == 0:
            say(f"{len(rows)} of {len(wanted)} settings, {time.monotonic() - began:.0f} s")
    table = {
        "commit": commit(),
        "model": {key: model.spec.lineage.get(key) for key in ("run", "images_seen", "dataset_digest")},
        "default": asdict(model.spec.sampling),
        "samples": SAMPLES,
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
    }
    TABLE.write_text(to_text(rounded(table)))


# --- the replay ---------------------------------------------------------------------------------------------


def run(replays: int) -> dict[str, Any]:
    """Return the results of the replays of both searchers."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = json.loads(TABLE.read_text())
    known = {trial_name(row["params"]): row for row in table["rows"]}
    whole = hypervolume(list(known.values()), table["rows"])
    systems: dict[str, list[dict[str, Any]]] = {"optuna": [], "random": []}
    for seed in range(replays):
        found = {"optuna": replay(known, sampler(seed, RANDOM_TRIALS)), "random": replay(known, random(seed))}
        for name, tried in found.items():
            systems[name].append(judged(tried, table["rows"], whole))
        say(f"replay {seed + 1} of {replays}")
    result: dict[str, Any] = {
        "benchmark": "search",
        "quick": replays != REPLAYS,
        "commit": commit(),
        "machine": f"CPU ({platform.machine()})",
        "optuna": optuna.__version__,
        "table": {"commit": table["commit"], "rows": len(known), "samples": table["samples"]}
        | {"best_distance": min(row["frechet_distance"] for row in known.values())},
        "trials": TRIALS,
        "replays": replays,
    }
    medians: dict[str, dict[str, Any]] = {}
    for name, runs in systems.items():
        medians[name] = {
            **{f"distance_{n}": statistics.median(r["distance"][n] for r in runs) for n in AFTER},
            **{f"hypervolume_{n}": statistics.median(r["hypervolume"][n] for r in runs) for n in AFTER},
            "trials_to": statistics.median(r["trials_to"] for r in runs),
        }
    ahead = [
        a["hypervolume"][TRIALS] > b["hypervolume"][TRIALS]
        for a, b in zip(systems["optuna"], systems["random"], strict=True)
    ]
    speedup = medians["random"]["trials_to"] / medians["optuna"]["trials_to"]
    return result | {"systems": medians, "speedup_random": round(speedup, 3), "ahead": f"{sum(ahead)} of {replays}"}


def random(seed: int) -> Any:
    """Return a random searcher."""
    return optuna.samplers.RandomSampler(seed=seed)


def replay(known: Mapping[str, dict[str, Any]], searcher: Any) -> list[dict[str, Any]]:
    """Return the table's rows in the order in which a searcher selects them."""
    study, base = study_of(), compose(["+experiment=digits"])
    past = past_of(study, [])
    past.sampler = searcher
    tried = []
    for _ in range(TRIALS):
        trial = past.ask()
        row = known[trial_name(study.suggest(trial, base))]
        past.tell(trial, [row[objective] for objective in study.objectives])
        tried.append(row)
    return tried


def judged(tried: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], whole: float) -> dict[str, Any]:
    """Return the figures of a replay, after increasing numbers of trials."""
    shares = [hypervolume(tried[:n], rows) / whole for n in range(1, len(tried) + 1)]
    return {
        "distance": {n: min(row["frechet_distance"] for row in tried[:n]) for n in AFTER},
        "hypervolume": {n: shares[n - 1] for n in AFTER},
        # If it was not reached, one more than all trials: the exact value does not matter for a median.
        "trials_to": next((n for n, share in enumerate(shares, 1) if share >= SHARE), len(tried) + 1),
    }


def hypervolume(some: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> float:
    """Return the area that settings dominate, up to the table's worst distance and cost, on logarithmic axes."""
    worst = [max(math.log(row[name]) for row in rows) for name in ("frechet_distance", "evaluations")]
    points = sorted((math.log(row["evaluations"]), math.log(row["frechet_distance"])) for row in some)
    area, height = 0.0, worst[0]
    for cost, distance in points:
        if distance < height:
            area += (worst[1] - cost) * (height - distance)
            height = distance
    return area


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
