"""The speed and health of a run between two logged points, and traces by torch.profiler."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pipelines.environment.scratch import scratch_folder
from pipelines.tracking import RunLog
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.hardware import flops_per_image, memory_gib, peak_flops
from pipelines.training.loop.optimizer import learning_rate
from pipelines.training.loop.progress import Clock, StepResult
from pipelines.training.loop.state import TrainingState, make_network


class StepStatistics:
    """Means over the steps since the last logged point; time for grids and checkpoints is left out.

    Args:
        images_seen: where the attempt begins.
    """

    def __init__(self, context: RunContext, clock: Clock, images_seen: int) -> None:
        self.context, self.clock = context, clock
        config = context.config
        self.flops, self.peak = 0, peak_flops(config, context.device)
        if self.peak is not None:
            with torch.device("meta"):
                self.flops = flops_per_image(make_network(config), config.data.shape)
        self._reset(images_seen)

    def add(self, result: StepResult) -> None:
        """Count one more step; a step without an update has no finite loss to count."""
        if result.updated:
            self.losses.append(result.loss)
            self.by_source += np.reshape(result.by_source, self.by_source.shape)
            self.grad_norms.append(result.grad_norm)

    def metrics(self, state: TrainingState) -> dict[str, float]:
        """Return the metrics since the last call. `worker/mfu` is a share of the bf16 peak at any precision."""
        config, seen, spent = self.context.config, state.images_seen, self.clock.seconds()
        stepping, waiting = spent["step"] - self.spent["step"], spent["data"] - self.spent["data"]
        rate = (seen - self.start) / max(stepping + waiting, 1e-9)
        found = {}  # MLflow lists a run's values in this order
        if self.losses:
            found["train/loss"] = sum(self.losses) / len(self.losses)
        for source, total, count in zip(self.context.job.dataset.sources, *self.by_source.tolist(), strict=True):
            if count:
                found[f"train/loss/{source.name}"] = total / count
        found["train/images_per_s"] = rate
        if self.losses:
            found["updates/grad_norm"] = sum(self.grad_norms) / len(self.grad_norms)
        found |= {
            "updates/lr": learning_rate(config, seen, state.length),
            "updates/skipped": float(state.skipped),
            "worker/data_wait_share": waiting / max(stepping + waiting, 1e-9),
            "worker/memory_gib": memory_gib(self.context.device),
        }
        if config.training_s is not None:
            found["train/length"] = float(state.length)
        if state.loss_scale.enabled:
            found["updates/loss_scale"] = state.loss_scale.factor
        if self.peak is not None:
            found["worker/mfu"] = rate * self.flops / (self.peak * self.context.world_size)
        self._reset(seen)
        return found

    def _reset(self, images_seen: int) -> None:
        self.start, self.spent = images_seen, self.clock.seconds()
        self.losses: list[float] = []
        self.by_source = np.zeros((2, len(self.context.job.dataset.sources)))
        self.grad_norms: list[float] = []


class Profiler:
    """Records a trace of some steps of rank 0, for chrome://tracing or Perfetto, among the run's artifacts.

    Args:
        resumed_at: images seen where the attempt begins; a trace that should have begun before is left out.
        log: of rank 0; None elsewhere.
    """

    def __init__(self, context: RunContext, resumed_at: int, log: RunLog | None) -> None:
        tracking = context.config.tracking
        at, self.left = tracking.profile_at, tracking.profile_steps
        self.log = log
        self.at = at if log is not None and at is not None and at >= resumed_at else None
        self.profile: profile | None = None

    def before_step(self, images_seen: int) -> None:
        """Start or stop the trace where that is due; called before every step."""
        if self.at is None or images_seen < self.at:
            return
        if self.profile is None:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = profile(activities=activities)
            self.profile.start()
        elif self.left == 1:
            self.profile.stop()
            assert self.log is not None
            with tempfile.TemporaryDirectory(prefix="profile-", dir=scratch_folder()) as scratch:
                path = Path(scratch) / "trace.json"
                self.profile.export_chrome_trace(str(path))
                self.log.text(path.read_text(), f"profile/{self.at:012d}.json", images_seen)
            self.at = self.profile = None
        else:
            self.left -= 1
