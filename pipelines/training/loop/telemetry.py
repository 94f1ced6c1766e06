"""Numbers of a run's speed and health, between one logged point and the next; and a look with torch.profiler."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipelines.config import Config
from pipelines.tracking import TrackingError
from pipelines.training.loop.hardware import flops_per_image, memory_gib, peak_flops
from pipelines.training.loop.parallel import world
from pipelines.training.loop.progress import Clock
from pipelines.training.loop.shell import Job
from pipelines.training.loop.state import Training, make_network
from pipelines.training.loop.step import Outcome, learning_rate


class Window:
    """Means over the steps since the last logged point; grids and checkpoints do not count as steps."""

    def __init__(self, config: Config, clock: Clock, images_seen: int, device: torch.device) -> None:
        self.config, self.clock, self.device = config, clock, device
        self.flops, self.peak = 0, peak_flops(config, device)
        if self.peak is not None:
            with torch.device("meta"):
                self.flops = flops_per_image(make_network(config), config.data.channels, config.data.image_size)
        self._begin(images_seen)

    def add(self, outcome: Outcome) -> None:
        """One more step."""
        if outcome.updated:
            self.losses.append(outcome.loss)
            self.grad_norms.append(outcome.grad_norm)

    def metrics(self, training: Training) -> dict[str, float]:
        """The points to log now; a new window begins. The utilization is of the bf16 peak, whatever the precision."""
        seen, spent = training.images_seen, self.clock.seconds()
        stepping, waiting = spent["step"] - self.spent["step"], spent["data"] - self.spent["data"]
        rate = (seen - self.start) / max(stepping + waiting, 1e-9)
        found = {
            "train/lr": learning_rate(self.config.optim, seen, self.config.images),
            "train/images_per_s": rate,
            "train/data_wait_share": waiting / max(stepping + waiting, 1e-9),
            "train/skipped_updates": float(training.skipped),
            "train/memory_gib": memory_gib(self.device),
        }
        if self.losses:
            found["train/loss"] = sum(self.losses) / len(self.losses)
            found["train/grad_norm"] = sum(self.grad_norms) / len(self.grad_norms)
        if self.peak is not None:
            found["train/mfu"] = rate * self.flops / (self.peak * world())
        self._begin(seen)
        return found

    def _begin(self, images_seen: int) -> None:
        self.start, self.spent = images_seen, self.clock.seconds()
        self.losses: list[float] = []
        self.grad_norms: list[float] = []


class Profiler:
    """A torch.profiler trace of some steps of rank 0, for chrome://tracing or Perfetto, among the run's artifacts."""

    def __init__(self, job: Job, rank: int, resumed_at: int) -> None:
        at = job.config.tracking.profile_at
        self.job, self.left = job, job.config.tracking.profile_steps
        self.at = at if rank == 0 and at is not None and at >= resumed_at else None
        self.profile: profile | None = None

    def before_step(self, images_seen: int) -> None:
        """Begin where it is time, end after the steps that were asked for."""
        if self.at is None or images_seen < self.at:
            return
        if self.profile is None:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = profile(activities=activities)
            self.profile.start()
        elif self.left == 1:
            self.profile.stop()
            with tempfile.TemporaryDirectory(prefix="ddpm-profile-") as scratch, suppress(TrackingError):
                path = Path(scratch) / "trace.json"
                self.profile.export_chrome_trace(str(path))
                self.job.tracker.text(path.read_text(), f"profile/{self.at:012d}.json")
            self.at = self.profile = None
        else:
            self.left -= 1
