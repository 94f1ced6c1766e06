"""Benchmark of the overhead of a trial in a training study: this project against Ray's documented way.

    python -m benchmarks.trials [--quick] [--json]

Both run on the local stack, with as many concurrent trials as cores; each trial is a Ray Train run of one worker with
little work. The usual way, from Ray's documentation, is a function that fits a `TorchTrainer` with
`TuneReportCallback`; its work is one second of sleep with three reports. Ours is `ddpm search training` on digits, with
three rungs that are evaluated and reported.

| figure | meaning |
|---|---|
| `overhead_s` | seconds of core time per additional trial minus its work, from the difference between 8 and 2 trials |
| `trial_seconds` | medians over our complete trials: see `pipelines.search.training_trial` |
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
import uuid
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.results import Size, commit, make_parser, publish
from pipelines.config import Config, compose
from pipelines.stack.connect import connect

WORK_S, REPORTS = 1.0, 3
TRIALS = 2, 8
"""Numbers of trials; costs per study, such as loading the evaluator, cancel in their difference."""


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    options = make_parser("trials", __doc__, quick="one turn, fewer trials").parse_args(arguments)
    publish(run(options.size), "trials", options)


def run(size: Size) -> dict[str, Any]:
    """Return the measurements of both, with runs alternating."""
    turns, (few, many) = size.of((3, TRIALS), (1, (1, 3)), (1, (0, 1)))
    length = size.of(["images=1536"], ["images=1536"], ["images=32", "batch_size=8"])
    overrides = [
        "+experiment=digits", "cluster.num_workers=1", "sampler.steps=2", "guidance=none",
        "model.channels=[32]", "model.attention=[true]", "model.layers_per_block=1", *length,
    ]  # fmt: skip
    config = connect(compose(overrides), os.environ, ["s3", "mlflow", "ray"])

    import ray

    from pipelines.cli.terminal import Terminal
    from pipelines.flow import Site
    from pipelines.flow.ingest import Ingest
    from pipelines.flow.walk import walk
    from pipelines.storage import Storage
    from pipelines.training.resources import connect_ray

    storage = Storage.of(config)
    walk([Ingest(config)], Site(storage, {}, Terminal()))
    connect_ray(config)
    at_a_time = int(ray.cluster_resources()["CPU"])
    if size is not Size.SMOKE:
        ours(1, config)  # trains the evaluator, which later studies reuse
    overhead: dict[str, list[float]] = {"ours": [], "usual": []}
    parts: list[dict[str, float]] = []
    for turn in range(turns):
        (less, _), (more, spent) = (both(trials, at_a_time, config) for trials in (few, many))
        for name, seconds in overhead.items():
            seconds.append((more[name] - less[name]) / (many - few))
        parts.append(spent)
        say(f"turn {turn + 1} of {turns}: " + ", ".join(f"{name} {v[-1]:.1f} s" for name, v in overhead.items()))
    median = {name: statistics.median(values) for name, values in overhead.items()}
    return {
        "benchmark": "trials",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "machine": f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "ray": ray.__version__,
        "trials": [few, many],
        "at_a_time": at_a_time,
        "overhead_s": {name: round(seconds, 2) for name, seconds in median.items()},
        "trial_seconds": {part: round(statistics.median(p[part] for p in parts), 2) for part in parts[0]},
        "speedup_usual": round(median["usual"] / median["ours"], 3),
        "turns": overhead,
    }


def both(trials: int, at_a_time: int, config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """Run a study each way; return the seconds of core time without their work, and medians by part of our trials.

    Args:
        trials: of each study; 0, from which the least of everything counts, runs none.
    """
    if not trials:
        return {"usual": 0.0, "ours": 0.0}, {}
    began = time.monotonic()
    usual(trials, at_a_time, config)
    between = time.monotonic()
    work, spent = ours(trials, config)
    usual_s, ours_s = ((between - began) * at_a_time, (time.monotonic() - between) * at_a_time)
    return {"usual": usual_s - trials * WORK_S, "ours": ours_s - work}, spent


def ours(trials: int, config: Config) -> tuple[float, dict[str, float]]:
    """Run a study; return the seconds of training and evaluation of all trials, and medians by part of a trial."""
    from pipelines.presentation.progress import no_stage_notice
    from pipelines.search.study import StudyStore
    from pipelines.search.study_config import StudyConfig
    from pipelines.search.training_search import TrainingSearch
    from pipelines.search.training_trial import trial_sessions

    space = {"optim.lr": {"log": [5e-4, 5e-3]}}
    plain: dict[str, Any] = {
        "kind": "training",
        "trials": trials,
        "random_trials": trials,
        "samples": 32,
        "rungs": REPORTS,
    }
    plain |= {"confirm": 1, "confirm_samples": 64}  # the same work, and little, for any number of trials
    study = StudyConfig.model_validate({**plain, "space": space, "bits_per_dim_images": 4, "reduction": 2})
    name = f"benchmark-{uuid.uuid4().hex[:8]}"
    search = TrainingSearch(config, name, study, no_stage_notice, {})
    _, answer = search.run(resume=False, after=[], on_change=lambda observer: None)
    store, work = StudyStore.of(config, name), 0.0
    for record in store.records():  # trials stopped by ASHA did less work
        for session in trial_sessions(record, config, name):
            work += sum(attempt.seconds[kind] for attempt in session.attempts for kind in ("step", "data", "grid"))
    return work, answer["trial_seconds"]


def usual(trials: int, at_a_time: int, config: Config) -> None:
    """Run a study with Ray Tune over Ray Train, as in Ray's documentation."""
    import tempfile

    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    def worker(settings: dict[str, Any]) -> None:
        import tempfile
        import time

        import ray.train
        import torch
        from ray.train import Checkpoint

        for step in range(REPORTS):
            time.sleep(WORK_S / REPORTS)
            with tempfile.TemporaryDirectory() as folder:
                torch.save({"step": step}, os.path.join(folder, "state.pt"))
                ray.train.report({"loss": settings["lr"]}, checkpoint=Checkpoint.from_directory(folder))

    with tempfile.TemporaryDirectory() as storage:

        def trial(settings: dict[str, Any]) -> None:
            TorchTrainer(
                worker,
                train_loop_config=settings,
                scaling_config=ScalingConfig(num_workers=1),
                run_config=RunConfig(
                    name=tune.get_context().get_trial_id(), storage_path=storage, callbacks=[TuneReportCallback()]
                ),
            ).fit()

        found = tune.Tuner(
            tune.with_resources(trial, {"cpu": 0, "memory": 1 << 20}),  # its workers have their own resources
            param_space={"lr": tune.loguniform(1e-4, 1e-2)},
            tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=at_a_time),
            run_config=tune.RunConfig(storage_path=storage, name="usual", verbose=0),
        ).fit()
        assert not found.errors, found.errors


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
