"""Speed of a machine for the networks that a plan chooses from: real training steps, for a few seconds in total."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import torch

from ddpm.image_size import ImageSize, as_setting, height_width
from pipelines.config import Config, compose, override_value
from pipelines.environment.cgroups import whole_cores
from pipelines.evaluation.devices import one_thread
from pipelines.evaluation.evaluators.classifier import BATCH as JUDGE_BATCH
from pipelines.evaluation.evaluators.classifier import reduced_size, train_classifier
from pipelines.evaluation.evaluators.contrastive import train_contrastive
from pipelines.plan.choose import PIECE, choose, drawing_precision, methods, uses_captions
from pipelines.plan.facts import MachineFacts, SourceFacts, Speed, UserOverrides
from pipelines.plan.networks import Candidate, candidates
from pipelines.training.loop.hardware import resolve_precision
from pipelines.training.loop.speed import MeasuredSpeed, measure_drawing, measure_speed, measure_training

logger = logging.getLogger(__name__)
SECONDS = 0.3
"""Seconds for which steps and evaluations of a candidate are repeated."""
LONGER_SHARE, LONGER_S = 1 / 400, (0.3, 1.5)
"""Share of the budget for measuring the chosen candidate's drawing and its evaluator, and its bounds in seconds."""
FEWER = 8
"""Factor by which steps have fewer images in the measurement that separates the time of a step from that of images."""
JUDGE_STEPS = 2
JUDGE_PIECE = 32
"""Images of a measured step of the contrastive network, a quarter of those of its training."""
LEAST_SHARE = 0.5
"""A candidate is not measured, nor any larger one of its size, if in the whole budget it would see less than this share
of the images that it needs, even at the speed of the next smaller one."""


@dataclass(frozen=True)
class MachineMeasurement:
    """The measurements of one process; the fields are those of `MachineFacts`."""

    speeds: dict[str, Speed]
    judge_step_s: dict[str, float]
    precision: str
    together: float
    looking_s: float


@dataclass(frozen=True)
class Measurement:
    """A measurement of all candidates in one process; picklable, for a Ray task.

    Attributes:
        source: facts about the source.
        settings: what the user has set.
        budget_s: whole budget in seconds; candidates that need more are not measured.
        workers: number of workers of the training.
    """

    source: SourceFacts
    settings: Mapping[str, Any]
    budget_s: float
    workers: int

    def __call__(self) -> MachineMeasurement:
        """Measure, and return the results."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with one_thread():
                return self._measured(device)
        finally:
            if device.type == "cuda":  # memory that this process kept would be missing to the worker of this GPU
                gc.collect()
                torch.cuda.empty_cache()

    def _measured(self, device: torch.device) -> MachineMeasurement:
        began = time.monotonic()
        speeds: dict[str, Speed] = {}
        judge: dict[str, float] = {}
        precision = ""
        user, by_size = UserOverrides(self.settings), _by_size(candidates(self.source, UserOverrides(self.settings)))
        for size, of_size in by_size.items():
            if judge and not any(key.endswith(f"@{[*judge][-1]}") for key in speeds):
                break  # the size below was too slow already
            smaller: Speed | None = None
            for candidate in of_size:
                if smaller is not None and not self._reaches(candidate, smaller):
                    break  # a larger network is no faster
                piece = PIECE[device.type] if candidate.pixels <= 32**2 or device.type == "cuda" else PIECE["cpu"] // 4
                config = trial_config(candidate, self.source, user, piece, device)
                precision = resolve_precision(config.optim, device)
                try:
                    with others_busy(device, precision):
                        found = measure_speed(config, device, SECONDS)
                        step_s = _step_seconds(config, found, device)
                except torch.OutOfMemoryError:
                    logger.warning("%s does not fit the memory of the device", candidate.key)
                    break
                speeds[candidate.key] = smaller = Speed(
                    found.train, found.draw, found.evaluate, found.parameters, piece, step_s
                )
            judge[as_setting(size)] = judge_step_seconds(config, len(self.source.class_counts), device)
            if self._hopeless(speeds, of_size[0]):
                break
        together = 1.0 if device.type == "cuda" else speed_together(whole_cores(), precision)
        return MachineMeasurement(speeds, judge, precision, together, time.monotonic() - began)

    def _reaches(self, candidate: Candidate, speed: Speed) -> bool:
        """Return whether at this speed a candidate would see enough images in the whole budget to be worth
        measuring."""
        return self.budget_s * speed.train * self.workers >= LEAST_SHARE * candidate.needed

    def _hopeless(self, speeds: Mapping[str, Speed], narrowest: Candidate) -> bool:
        """Return whether larger images are out of reach, because even the narrowest network hardly reaches these."""
        found = speeds.get(narrowest.key)
        return found is None or self.budget_s * found.train * self.workers < 2 * narrowest.needed


@dataclass(frozen=True)
class MeasuredLonger:
    """Longer measurements for the chosen candidate.

    Attributes:
        draw: see `Speed`.
        judge_step_s: seconds of a training step of the evaluator, alone on the machine.
        took_s: seconds of the measurement.
    """

    draw: float
    judge_step_s: float
    took_s: float


@dataclass(frozen=True)
class LongerMeasurement:
    """A longer measurement of drawing and evaluator training on CPU cores; picklable, for a Ray task.

    Attributes:
        source: facts about the source.
        settings: what the user has set.
        candidate: chosen candidate.
        piece: images per network batch.
        seconds: seconds for which each is repeated.
    """

    source: SourceFacts
    settings: Mapping[str, Any]
    candidate: Candidate
    piece: int
    seconds: float

    def __call__(self) -> MeasuredLonger:
        """Measure, and return the results."""
        began, device = time.monotonic(), torch.device("cpu")
        config = trial_config(self.candidate, self.source, UserOverrides(self.settings), self.piece, device)
        with one_thread():
            with others_busy(device, resolve_precision(config.optim, device)):
                draw = measure_drawing(config, device, self.seconds)
            judge_step_s = judge_step_seconds(config, len(self.source.class_counts), device, self.seconds)
        return MeasuredLonger(draw, judge_step_s, time.monotonic() - began)


def measure(
    source: SourceFacts,
    settings: Mapping[str, Any],
    budget_s: float,
    *,
    nodes: Sequence[Mapping[str, float]] | None = None,
    run: Callable[[Measurement, int], Any] | None = None,
    where: str = "this machine",
    start_s: float = 0.0,
) -> MachineFacts:
    """Return the facts about a machine, measured with images like those of a source.

    Args:
        source: facts about the source.
        settings: what the user has set, by field or group.
        budget_s: whole budget in seconds.
        nodes: resources of the nodes of a Ray cluster; None for this machine.
        run: runs a measurement on the cluster with a number of GPUs; None to run it in this process.
        where: description of the machine.
        start_s: seconds until the services answer.
    """
    if nodes is None:
        cores, gpus = whole_cores(), torch.cuda.device_count()
    else:
        cores = sum(int(node.get("CPU", 0)) for node in nodes)
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    cores = max(cores, 1)
    measurement = Measurement(source, settings, budget_s, gpus or cores)
    found = measurement() if run is None else run(measurement, min(gpus, 1))
    return MachineFacts(where, cores, gpus, start_s=start_s, **vars(found))


def measure_longer(
    source: SourceFacts,
    settings: Mapping[str, Any],
    budget_s: float,
    machine: MachineFacts,
    *,
    compared: bool,
    run: Callable[[Any, int], Any] | None = None,
) -> MachineFacts:
    """Return the facts of a machine with evaluation speeds from a longer measurement on its CPU cores.

    A fraction of a second suffices to compare candidates. But cores are faster for a moment than for minutes, by more
    than the reserve of a plan. A training corrects its own length (`Config.training_s`); nothing corrects the other
    stages. So drawing with the chosen network and training of the evaluator are measured for longer, and the speeds of
    the other candidates are scaled by the same factors. Speeds of GPUs are kept.

    Args:
        compared: as for `choose`.

    Raises:
        ConfigError: nothing can be chosen.

        The other arguments are those of `measure`.
    """
    if machine.gpus:
        return machine
    basis = choose(source, machine, budget_s, UserOverrides(settings), compared)
    least, most = LONGER_S
    seconds = min(most, max(least, LONGER_SHARE * budget_s))
    measurement = LongerMeasurement(source, settings, basis.candidate, basis.speed.piece, seconds)
    found: MeasuredLonger = measurement() if run is None else run(measurement, 0)
    judging = machine.judge_step_s[as_setting(basis.candidate.size)] / found.judge_step_s
    changed = machine.times(1.0, found.draw / basis.speed.draw, judging)
    return replace(changed, looking_s=machine.looking_s + found.took_s)


def _step_seconds(config: Config, found: MeasuredSpeed, device: torch.device) -> float:
    """Return the seconds of a step that do not depend on its number of images, such as the optimizer's update.

    On a GPU a small step takes hardly less time than a large one. On a CPU the update of Muon takes as long for a few
    images as for many.

    Args:
        config: configuration of the measured steps.
        found: measured speed.
        device: device of the measurement.
    """
    few = max(1, config.batch_size // FEWER)
    small = few / measure_training(config.model_copy(update={"batch_size": few}), device, SECONDS / 3)
    large = config.batch_size / found.train
    per_image = max(0.0, (large - small) / (config.batch_size - few))
    return max(0.0, large - config.batch_size * per_image)


def trial_config(
    candidate: Candidate, source: SourceFacts, user: UserOverrides, batch: int, device: torch.device
) -> Config:
    """Return the configuration of a candidate for its measurement on a device."""
    classes = len(source.class_counts)
    settings: dict[str, Any] = {
        "name": "measured",
        "data": "folder",
        "data.source": source.source,
        "data.num_classes": classes,
        "data.image_size": candidate.size,
        "data.channels": 1 if source.grey else 3,
        "model.class_conditional": classes > 1,
        **(methods(user) if candidate.recipe is None else candidate.recipe.settings),
        **candidate.settings,
    }
    if uses_captions(source, user):
        settings["model.text_dim"] = source.encoder_width
    given = {key: value for key, value in user.settings.items() if key.partition(".")[0] in _DECIDING}
    settings = {key: value for key, value in settings.items() if not user.sets(key)} | given
    settings |= {"batch_size": batch, "data.lanes": 1, "cluster.num_workers": 1, "micro_batch_size": None}
    config = compose([f"{key}={override_value(settings[key])}" for key in sorted(settings, key=lambda key: "." in key)])
    drawn_in = drawing_precision(resolve_precision(config.optim, device), user)
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"precision": drawn_in})})


_DECIDING = ("data", "model", "objective", "schedule", "optim")
"""Groups of the configuration that determine the time of a step."""


def judge_step_seconds(config: Config, classes: int, device: torch.device, seconds: float = 0.0) -> float:
    """Return the seconds in which the training of an evaluator processes `JUDGE_BATCH` images of this size.

    Args:
        seconds: seconds for which steps are repeated; at least `JUDGE_STEPS` steps are run.
    """
    sides = height_width(reduced_size(config.data.image_size))
    count = JUDGE_BATCH if classes > 1 else JUDGE_PIECE
    images = torch.zeros(count, config.data.channels, *sides, dtype=torch.uint8)

    def train(passes: int) -> None:
        if classes > 1:
            labels = torch.arange(count) % classes
            train_classifier(images, labels, classes, seed=0, passes=passes, device=device)
        else:
            train_contrastive(images, seed=0, passes=passes, device=device)

    def seconds_of_one(steps: int) -> float:
        began = time.perf_counter()
        train(steps)
        return (time.perf_counter() - began) / steps

    train(1)
    per_step = seconds_of_one(JUDGE_STEPS)
    more = int(seconds / per_step)
    return (seconds_of_one(more) if more > JUDGE_STEPS else per_step) * JUDGE_BATCH / count


def speed_together(cores: int, precision: str) -> float:
    """Return the speed of a core while all cores compute, relative to a single busy core, at most 1.

    The cores of a virtual machine may be two threads of one physical core, which is not visible inside it.
    """
    if cores < 2:
        return 1.0
    convolutions = Convolutions(precision)

    with ThreadPoolExecutor(cores) as threads:

        def rate(processes: int) -> float:
            until = time.perf_counter() + SECONDS
            return sum(threads.map(convolutions.count, [lambda: time.perf_counter() < until] * processes)) / processes

        rate(cores)  # starts the threads
        turns = [(rate(1), rate(cores)) for _ in range(3)]
    return min(1.0, statistics.median(every / max(one, 1) for one, every in turns))


@contextmanager
def others_busy(device: torch.device, precision: str) -> Iterator[None]:
    """Keep all cores but one busy, like the other workers of a training on CPU cores."""
    others = whole_cores() - 1 if device.type == "cpu" else 0
    if others < 1:
        yield
        return
    convolutions, ended = Convolutions(precision), Event()
    with ThreadPoolExecutor(others) as threads:
        for _ in range(others):
            threads.submit(convolutions.count, lambda: not ended.is_set())
        try:
            yield
        finally:
            ended.set()


class Convolutions:
    """Load for CPU cores: convolutions, the main part of training steps, which release the GIL.

    Args:
        precision: precision of the convolutions.
    """

    def __init__(self, precision: str) -> None:
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        self.images, self.kernel = torch.randn(4, 64, 16, 16, dtype=kind), torch.randn(64, 64, 3, 3, dtype=kind)

    def count(self, go_on: Callable[[], bool]) -> int:
        """Return the number of convolutions that one thread computes until `go_on` returns False."""
        torch.set_num_threads(1)  # OpenMP keeps it for each thread
        done = 0
        with torch.no_grad():
            while go_on():
                torch.nn.functional.conv2d(self.images, self.kernel, padding=1)
                done += 1
        return done


def _by_size(found: Sequence[Candidate]) -> dict[ImageSize, list[Candidate]]:
    """Return the candidates of each size, in order."""
    sizes: dict[ImageSize, list[Candidate]] = {}
    for candidate in found:
        sizes.setdefault(candidate.size, []).append(candidate)
    return sizes
