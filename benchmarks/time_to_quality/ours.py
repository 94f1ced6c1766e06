"""Our side: `ddpm flow FOLDER budget=…`, nothing else set, on a local stack of the benchmark's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import ddpm
from benchmarks.time_to_quality.pictures import Pictures
from ddpm.conditioning import Conditioning
from ddpm.generate import generate
from ddpm.model import Model
from pipelines.stack import StackState, read_state


@dataclass(frozen=True)
class Side:
    """A stack in a folder, and the commands on it."""

    home: Path

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[Side]:
        """Give a new stack, which has nothing of an earlier training; after that nothing of it runs or is kept."""
        side = cls(folder / ".ddpm")
        side.ddpm("down")  # of a benchmark that was killed
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        side.ddpm("up")
        try:
            yield side
        finally:
            side.ddpm("down")
        shutil.rmtree(folder)

    def environment(self) -> dict[str, str]:
        """Return the environment of commands: no service of the caller's is met."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_"))}
        return kept | {"DDPM_HOME": str(self.home), "XDG_CACHE_HOME": str(self.home.parent / "cache")}

    def ddpm(self, *arguments: str, log: Path | None = None) -> dict[str, Any]:
        """Return what a command answers as JSON.

        Args:
            log: where what it said is kept; None: nowhere.

        Raises:
            CalledProcessError: it fails; what it said is in its `stderr`, which is shown.
        """
        command = [*ddpm(), *arguments]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        if log is not None:
            log.write_text(done.stderr)
        if done.returncode:
            print(done.stderr[-3_000:], file=sys.stderr, flush=True)
            done.check_returncode()
        last = done.stdout.strip().splitlines()[-1:]
        return json.loads(last[0]) if last and last[0].startswith("{") else {}

    def flow(self, pictures: Pictures, name: str, seed: int, length: Sequence[str], log: Path) -> dict[str, Any]:
        """Train a model; return its address, its MLflow run, and the seconds to its registration.

        Args:
            name: of the run.
            length: the budget, or what is set in its place.
            log: keeps the plan and what every stage said.
        """
        began = time.monotonic()
        set_ = [*length, f"seed={seed}", f"name={name}"]
        answer = self.ddpm("flow", str(pictures.given), *set_, "--json", log=log)
        return {"seconds": time.monotonic() - began, "model": answer["model"], "run_id": answer["run_id"]}

    def state(self) -> StackState:
        """Return the addresses of the stack, which has to run."""
        state = read_state(self.home)
        assert state is not None
        return state

    def model(self, reference: str) -> Model:
        """Return a registered model."""
        from pipelines.checkpoints import references
        from pipelines.storage import Storage

        state = self.state()
        storage = Storage(state.s3_endpoint, str(state.credentials_file), "us-east-1")
        return references.resolve(reference, tracking_uri=state.tracking_uri, storage=storage).model

    def trained(self, run_id: str) -> dict[str, Any]:
        """Return what a run trained with: the settings that a peer is given too, and the images that it saw."""
        from mlflow import MlflowClient

        data = MlflowClient(tracking_uri=self.state().tracking_uri).get_run(run_id).data
        settings = {name: str(data.params[name]) for name in ("batch_size", "data.flip")}
        return {"settings": settings, "images": int(data.metrics["train/length"])}


def draw(model: Model, classes: tuple[str, ...], labels: Tensor, seed: int, scale: float | None = None) -> Tensor:
    """Return samples of these classes in [-1, 1], with the model's own settings, as `ddpm sample` draws them.

    Args:
        scale: of guidance; None for the model's own.
    """
    sampling = model.spec.sampling if scale is None else model.spec.sampling.with_fields(scale=scale)
    place = torch.tensor([model.spec.classes.index(name) for name in classes])
    return generate(
        model.denoiser,
        model.schedule,
        sampling,
        cond=Conditioning(label=place[labels]),
        shape=model.spec.shape,
        seed=seed,
        batch_size=100,
        guides=model.guides,
    )
