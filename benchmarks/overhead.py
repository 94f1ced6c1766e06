"""Benchmark of the pipeline's overhead: Ray workers with S3, MLflow and checkpoints against a bare torch loop.

    python -m benchmarks.overhead [--scaling | --evaluation | --restarts] [--quick] [--json]

It starts its own local stack, unless --home names one. Runs alternate between a plain process with its images in memory
and the driver of `ddpm train`, with the same model, batch size and number of threads. `ratio` is the driver's images/s
over the plain process's, with one worker of one thread; `scaling` is that of two workers of one thread over one plain
process of two threads. `pair` is that of two workers over two plain processes of one thread at once, which is what the
cores give, and `pair_beside_stack` the same where the share of the cores that the stack computes on is left out.

There two workers share a batch. With `--scaling` each of them has a batch as large as that of one worker alone, on
digits and on images of 32x32 with a network for these.

With `--restarts` workers are killed in nine runs, to measure the time to the next step and which part of it our code
takes.

With `--evaluation` runs of one worker alternate with and without the scoring of their checkpoints while they train.
Measured are the CPU seconds of the worker and of the driver for each image, which tell more than the images/s where
other processes want the cores: `worker_cpu` and `driver_cpu` are what evaluation adds, as shares of the worker's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import Size, commit, make_parser, out_folder, publish, python_m, to_text
from pipelines.plan.calibration import FILE as CALIBRATION_FILE
from pipelines.plan.calibration import Calibration

if TYPE_CHECKING:
    from pipelines.presentation.progress import TrainingStatus
    from pipelines.storage import Storage

BATCH = 128
"""Images of a step of one worker."""
SETTINGS = ["+experiment=digits", "optim.decay=constant", "optim.precision=fp32", f"batch_size={BATCH}",
            "tracking.log_every=2000", "tracking.grid_every=1000000000", "tracking.grid_images=10", "sampler.steps=2",
            "checkpoint.publish_every=1000000000"]  # fmt: skip
CHECKPOINT_EVERY_S = 30


@dataclass(frozen=True)
class Case:
    """A network and the batches at which one and two workers train it.

    Attributes:
        name: by which results and the plain processes know it.
        size: of the images, which are square.
        alone: images of a step of one worker, and of a plain process.
        together: images of a step that two workers share.
        settings: of the network, where it is not that of digits.
    """

    name: str
    size: int
    alone: int
    together: int
    settings: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """What the configuration is composed of beside `SETTINGS`."""
        return [f"data.image_size={self.size}", f"data.uri={self.dataset}", *self.settings]

    @property
    def dataset(self) -> str:
        """Where its images are."""
        return f"s3://ddpm/datasets/digits-{self.size}"


DIGITS = Case("digits, the same batch for both", 8, BATCH, BATCH)
SCALING = (
    Case("digits, the same batch for each", 8, BATCH, 2 * BATCH),
    Case(
        "32x32, the same batch for each",
        32,
        64,
        128,
        ("model.channels=[32,64,64]", "model.attention=[false,true,false]", "model.head_dim=32"),
    ),
)
"""What `--scaling` measures."""
CASES = {case.name: case for case in (DIGITS, *SCALING)}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    parser = make_parser("overhead", __doc__, quick="shorter and fewer turns")
    parser.add_argument("--home", type=Path, help="folder of a stack that runs; default: one of its own")
    parser.add_argument("--scaling", action="store_true", help="two workers, each with a batch of its own")
    parser.add_argument("--evaluation", action="store_true", help="with and without evaluation while training goes on")
    parser.add_argument("--restarts", action="store_true", help="only the restarts of a worker")
    parser.add_argument("--bare", nargs=3, metavar=("CASE", "THREADS", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.bare:
        case, threads, seconds = options.bare
        print(json.dumps({"images_per_s": bare(CASES[case], int(threads), float(seconds))}))
        return
    ways = {"scaling": run_scaling, "evaluation": run_evaluation, "restarts": run_restarts}
    way = next((way for way in ways if getattr(options, way)), None)
    with _runs(options.home, SCALING if options.scaling else (DIGITS,), options.size) as bench:
        result = ways[way](bench, options.size) if way else run(bench, options.size)
    publish(result, f"overhead_{way}" if way else "overhead", options)
    if options.scaling:
        calibrate(result, out_folder(options, "pipelines/plan") / "calibration.json")


def bare(case: Case, threads: int, seconds: float) -> float:
    """Return the images/s of a bare training loop on tensors, the reference."""
    import torch
    from torch.nn.functional import mse_loss

    from ddpm.conditioning import Conditioning
    from ddpm.ema import EMA
    from ddpm.schedule import make_schedule
    from pipelines.config import compose, network_config

    torch.set_num_threads(threads)
    config = compose([*SETTINGS, *case.overrides])
    network = network_config(config).build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.optim.lr, fused=True)
    ema = EMA(network, config.optim.ema_half_life)
    alphas_cumprod = make_schedule("cosine").alphas_cumprod.float()
    images, labels = torch.rand(1438, 1, case.size, case.size) * 2 - 1, torch.randint(0, 10, (1438,))
    began, count = time.perf_counter(), -3  # three steps to warm up
    while count < 1 or time.perf_counter() - began < seconds:
        if count == 0:
            began = time.perf_counter()
        pick = torch.randint(0, len(images), (case.alone,))
        x_0, t = images[pick], torch.randint(0, len(alphas_cumprod), (case.alone,))
        eps = torch.randn_like(x_0)
        alpha = alphas_cumprod[t][:, None, None, None]
        x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * eps
        loss = mse_loss(network(x_t, t, Conditioning(label=labels[pick])), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(network, (count + 4) * case.alone, case.alone)
        loss.item()
        count += 1
    return count * case.alone / (time.perf_counter() - began)


@contextlib.contextmanager
def _runs(home: Path | None, cases: Sequence[Case], size: Size) -> Iterator[_Bench]:
    """Provide the benchmark's runs of some cases on a local stack."""
    from benchmarks.stacks import stack_of
    from pipelines import stack

    with tempfile.TemporaryDirectory(prefix="ddpm-overhead-") as folder, stack_of(home) as state:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        os.environ.update(stack.ray_environment(state.home))
        try:
            yield _Bench(state, cases, size)
        finally:
            import ray

            ray.shutdown()


def run_evaluation(bench: _Bench, size: Size) -> dict[str, Any]:
    """Return the measurements with and without evaluation while training goes on, by turns."""
    seconds, turns = size.of((120.0, 5), (20.0, 2), (1.0, 1))
    with contextlib.closing(bench.reusable_workers()) as workers:
        rate = _bare(1, seconds / 2)
        # The evaluator of the dataset is trained now, and the worker starts.
        bench.watched(workers, "warm-up", 40 * BATCH, evaluate=True)
        images = max(40, int(seconds * rate / BATCH)) * BATCH
        rows = []
        for i in range(turns):
            rows.append(bench.watched(workers, f"without-{i}", images, evaluate=False))
            rows.append(bench.watched(workers, f"with-{i}", images, evaluate=True))
    without, scored = rows[::2], rows[1::2]
    base = _median(without, "worker_cpu_s_per_1000")
    added = _median(scored, "driver_cpu_s_per_1000") - _median(without, "driver_cpu_s_per_1000")
    return {
        "benchmark": "overhead_evaluation",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "machine": f"CPU ({platform.machine()}), {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} at the end",
        "batch": BATCH,
        "images_per_turn": images,
        "worker_cpu": round(_median(scored, "worker_cpu_s_per_1000") / base - 1, 4),
        "driver_cpu": round(added / base, 4),
        "driver_cpu_s_per_evaluation": round(added * images / 1_000 / max(_median(scored, "scored"), 1), 4),
        "images_per_s_ratio": round(_median(scored, "images_per_s") / _median(without, "images_per_s"), 4),
        "without": without,
        "with": scored,
    }


def run(bench: _Bench, size: Size) -> dict[str, Any]:
    """Return the measurements of both, by turns."""
    seconds, turns = size.of((90.0, 5), (6.0, 1), (0.5, 1))
    first = _bare(1, seconds)
    one = [bench.turn(DIGITS, 1, seconds, first, f"one-{i}") for i in range(turns)]
    two = [bench.turn(DIGITS, 2, seconds, first, f"two-{i}") for i in range(max(1, turns // 2))]
    return {
        **_about("overhead", size),
        "seconds_per_turn": seconds,
        "ratio": _median(one, "ratio"),
        "scaling": _median(two, "ratio"),
        "pair": _median(two, "pair_ratio"),
        "pair_beside_stack": _median(two, "pair_ratio_beside_stack"),
        "stack_cpu": {"one_worker": _median(one, "stack_cpu"), "two_workers": _median(two, "stack_cpu")},
        "missing": {part: _median(one, part) for part in ("data", "checkpoint", "step")},
        "one_worker": one,
        "two_workers": two,
    }


def run_scaling(bench: _Bench, size: Size) -> dict[str, Any]:
    """Return the measurements of two workers, by turns with plain processes."""
    seconds, turns = size.of((45.0, 2), (15.0, 1), (0.5, 1))
    cases = {}
    for number, case in enumerate(SCALING):
        first = _bare(1, seconds / 2, case)
        rows = [bench.turn(case, 2, seconds, first, f"two-{number}-{i}") for i in range(turns)]
        cases[case.name] = {
            "batch_alone": case.alone,
            "batch_together": case.together,
            "threads": _median(rows, "ratio"),
            "pair": _median(rows, "pair_ratio"),
            "pair_beside_stack": _median(rows, "pair_ratio_beside_stack"),
            "stack_cpu": _median(rows, "stack_cpu"),
            "turns": rows,
        }
    return {**_about("overhead_scaling", size), "seconds_per_turn": seconds, "cases": cases}


def calibrate(result: dict[str, Any], path: Path) -> None:
    """Write the speed of workers that share a machine, where steps are long, into the constants of plans."""
    plain = json.loads(CALIBRATION_FILE.read_text())
    speed = round(result["cases"][SCALING[-1].name]["pair"], 2)
    plain["workers"] |= {"date": date.today().isoformat(), "machine": result["machine"], "shared_speed": speed}
    Calibration.model_validate(plain)
    path.write_text(to_text(plain))


def run_restarts(bench: _Bench, size: Size) -> dict[str, Any]:
    """Return what it takes to start a killed worker again, in a number of runs."""
    rate = _bare(1, size.of(20, 20, 0.5))
    bench.train("warm-up", 1, 10 * BATCH, 10 * BATCH)
    restarts = [bench.restart(rate, f"restart-{i}") for i in range(size.of(9, 1, 1))]
    return {
        **_about("overhead_restarts", size),
        "bare_images_per_s": round(rate, 1),
        "restart_ray_s": _median(restarts, "ray_s"),
        "restart_ours_s": _median(restarts, "ours_s"),
        "restarts": restarts,
    }


def _about(name: str, size: Size) -> dict[str, Any]:
    """Return what a result says of itself: of which benchmark, commit and machine it is."""
    machine = f"CPU ({platform.machine()}), {os.cpu_count()} cores"
    return {"benchmark": name, "quick": size is not Size.FULL, "commit": commit(), "machine": machine, "batch": BATCH}


def _median(rows: list[dict[str, float]], key: str) -> float:
    return round(statistics.median(row[key] for row in rows), 4)


def _bare(threads: int, seconds: float, case: Case = DIGITS, processes: int = 1) -> float:
    """Return the images/s of bare loops in processes of their own, all at once."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [*python_m("benchmarks.overhead"), "--bare", case.name, str(threads), str(seconds)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    said = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return sum(float(json.loads(text.splitlines()[-1])["images_per_s"]) for text in said)


def _enlarged_digits(folder: Path, size: int, storage: Storage) -> str:
    """Write the digits at another size into class folders, and return the folder above."""
    from PIL import Image

    from pipelines.environment.scratch import temporary_folder
    from pipelines.shards.ingest.sources import open_source

    with temporary_folder("digits") as listed:
        for number, image in enumerate(open_source("digits", storage, f"file://{listed}").images):
            below = folder / str(image.label)
            below.mkdir(exist_ok=True)
            Image.open(io.BytesIO(image.read(storage))).resize((size, size)).save(below / f"{number:04}.png")
    return str(folder)


class _Bench:
    """Training runs on a local stack."""

    def __init__(self, state: Any, cases: Sequence[Case], size: Size) -> None:
        from pipelines.config import compose
        from pipelines.shards.ingest.write import ingest
        from pipelines.stack.connect import fill
        from pipelines.storage import Storage

        self.state, self.size = state, size
        self.fill = lambda overrides: fill(compose([*SETTINGS, *overrides]), {}, state)
        self.storage = Storage.of(self.fill([]))
        for uri, side in {case.dataset: case.size for case in cases}.items():
            with tempfile.TemporaryDirectory(prefix="ddpm-digits-") as folder:
                source = "digits" if side == 8 else _enlarged_digits(Path(folder), side, self.storage)
                ingest(source, uri, self.storage, image_size=side, channels=1, shard_samples=1000)

    def reusable_workers(self) -> Any:
        """Return a worker that trains one run after another."""
        # Ray reads the stack's token when it is imported.
        from pipelines.training.ray_train.reusable_workers import ReusableWorkers

        return ReusableWorkers("overhead")

    def train(
        self,
        name: str,
        workers: int,
        images: int,
        every: int,
        watch: Callable[[TrainingStatus], None] = lambda status: None,
        case: Case = DIGITS,
    ) -> Any:
        """Return the result of a training through the driver."""
        from pipelines.training import driver
        from pipelines.training.prepare import prepare_run

        batch = case.alone if workers == 1 else case.together
        config = self.fill([*case.overrides, f"name={name}", f"images={images}", f"batch_size={batch}",
                            f"cluster.num_workers={workers}", f"checkpoint.every={every}"])  # fmt: skip
        return driver.train(prepare_run(config, {}), watch)

    def turn(self, case: Case, workers: int, seconds: float, rate: float, name: str) -> dict[str, float]:
        """Return the ratio of a run through Ray to the mean of bare runs before and after, and where time is lost.

        `stack_cpu` is the share of all cores that processes other than the workers computed on meanwhile.
        """
        from pipelines.training.ledger import read_sessions

        batch = case.alone if workers == 1 else case.together
        images = max(10, int(seconds * rate * workers / batch)) * batch
        seen: list[tuple[float, float]] = []  # time, CPU seconds of the stack and the driver

        def watch(status: TrainingStatus) -> None:
            if status.images_seen > 0 and (not seen or time.time() - seen[-1][0] > 5):
                seen.append((time.time(), _stack_cpu(self.state.home)))

        def bare_rates() -> tuple[float, float]:
            pair = _bare(1, seconds / 2, case, workers) if workers > 1 else 0.0
            return _bare(workers, seconds / 2, case), pair

        before = bare_rates()
        self.train(name, workers, images, max(batch, int(CHECKPOINT_EVERY_S * rate * workers)), watch, case)
        after = before if self.size is Size.SMOKE else bare_rates()
        (attempt,) = read_sessions(self.storage, f"s3://ddpm/runs/{name}")[-1].attempts
        spent = {kind: attempt.seconds[kind] for kind in ("step", "data", "checkpoint")}
        ours = images / sum(spent.values())
        theirs, pair = ((one + other) / 2 for one, other in zip(before, after, strict=True))
        # Shares of the time; of the steps, only what exceeds the bare loop's time for the same images.
        missing = {kind: seconds / sum(spent.values()) for kind, seconds in spent.items()}
        missing["step"] -= ours / theirs
        (began, at_first), (ended, at_last) = seen[0], seen[-1]
        stack_cpu = (at_last - at_first) / max(ended - began, 1e-9) / (os.cpu_count() or 1)
        found = {"bare": theirs, "ray": ours, "ratio": ours / theirs, "stack_cpu": stack_cpu, **missing}
        if pair:
            beside = ours / pair / (1 - stack_cpu)
            found |= {"pair": pair, "pair_ratio": ours / pair, "pair_ratio_beside_stack": beside}
        return found

    def watched(self, workers: Any, name: str, images: int, *, evaluate: bool) -> dict[str, float]:
        """Return what a run of one worker takes for 1,000 images, from its first steps to its last.

        Args:
            workers: the reusable worker of all turns.
            evaluate: whether the four checkpoints that it publishes are scored.
        """
        from pipelines.training import driver
        from pipelines.training.prepare import prepare_run

        every = images // 4
        found: list[Any] = []
        seen: list[tuple[float, float, float, float]] = []  # images, time, CPU seconds of the worker and of the driver

        def sample(status: TrainingStatus) -> None:
            if status.images_seen > 0:
                found[:] = found or _workers(self.state.home)
                used = found[0].cpu_times()
                seen.append((status.images_seen, time.time(), used.user + used.system, time.process_time()))

        scored = every if evaluate else "null"
        config = self.fill([*DIGITS.overrides, f"name={name}", f"images={images}", "cluster.num_workers=1",
                            f"checkpoint.every={every}", f"checkpoint.publish_every={every}",
                            f"evaluation.every={scored}"])  # fmt: skip
        result = driver.train(prepare_run(config, {}), sample, workers=workers.provide)
        first, last = seen[0], seen[-1]
        thousands = max(last[0] - first[0], 1) / 1_000
        return {
            "worker_cpu_s_per_1000": (last[2] - first[2]) / thousands,
            "driver_cpu_s_per_1000": (last[3] - first[3]) / thousands,
            "images_per_s": 1_000 * thousands / max(last[1] - first[1], 1e-9),
            "scored": float(len(result.tracker.metric("eval/frechet_distance"))),
        }

    def restart(self, rate: float, name: str) -> dict[str, float]:
        """Return the seconds from a worker's SIGKILL to the next finished step, before and after our code starts."""
        import ray

        from pipelines.training.ray_train.monitor import monitor_name

        images = int(120 * rate) // BATCH * BATCH
        every = max(BATCH, int(5 * rate))
        thread = threading.Thread(target=self.train, args=(name, 1, images, every), daemon=True)
        thread.start()
        monitor = None
        while monitor is None:
            with contextlib.suppress(ValueError, ray.exceptions.RaySystemError):
                monitor = ray.get_actor(monitor_name(f"s3://ddpm/runs/{name}"), namespace="ddpm-runs")
            time.sleep(0.2)
        while not (attempts := ray.get(monitor.snapshot.remote())[0]) or attempts[0].images_seen < 2 * every:
            time.sleep(0.2)
        (worker,) = _workers(self.state.home)
        killed = time.time()
        worker.kill()
        while len(attempts := ray.get(monitor.snapshot.remote())[0]) < 2:
            time.sleep(0.02)
        again = attempts[1]
        monitor.request_stop.remote()
        thread.join()
        return {"ray_s": again.began - killed, "ours_s": again.ended - again.began, **dict(again.seconds)}


def _stack_cpu(home: Path) -> float:
    """Return the CPU seconds of this process and of the stack's, without those of Ray Train's workers."""
    import psutil

    from pipelines import stack

    processes = [psutil.Process()]
    for service in stack.status(home):
        if service.pid is not None:
            root = psutil.Process(service.pid)
            processes += [root, *root.children(recursive=True)]
    used = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not _is_worker(process):
                times = process.cpu_times()
                used += times.user + times.system
    return used


def _workers(home: Path) -> list[Any]:
    """Return the processes of Ray Train's workers in the stack's Ray."""
    import psutil

    from pipelines import stack

    (root,) = [status.pid for status in stack.status(home) if status.name == "ray"]
    return [p for p in psutil.Process(root).children(recursive=True) if _is_worker(p)]


def _is_worker(process: Any) -> bool:
    return str(process.name()).startswith("ray::RayTrain")


if __name__ == "__main__":
    main()
