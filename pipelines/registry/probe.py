"""The pictures that a version draws when it is made, and again, by the code it carries, when it is verified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import to_uint8
from ddpm.model import Model
from pipelines.environment.scratch import temporary_folder
from pipelines.presentation.errors import PipelineError
from pipelines.storage import layout

PROBES = 16
"""Pictures that a version draws when it is made."""
TOKENS = 4
"""Length of the texts that those of a model on text are asked for."""
SEED = 0
SAME_MACHINE = ("device", "torch", "capability", "processor", "threads")
"""Parts of the environment that must be as recorded for two drawings to be equal; others add sums in another order."""
TOLERANCE = 1
"""Grey levels by which a pixel may differ elsewhere."""
SHARE = 1e-3
"""Share of the pixels that may differ there."""
REDRAW_S = 3600.0
"""Seconds in which a version's pictures are drawn again, which the largest models take minutes for."""
_SCRIPT = Path(__file__).with_name("redraw.py")


class ProbeError(PipelineError):
    """A model draws nothing that could be compared."""


def draw_probe(model: Model, folder: Path) -> dict[str, Any]:
    """Draw a model's pictures, write them to the file `probe.safetensors` of a folder, and return how they were drawn.

    Returns:
        `seed`, `count`, and what `machine` says of this process.

    Raises:
        ProbeError: the model draws something that is not a number.
    """
    classes, width = len(model.spec.classes), model.spec.network.text_dim
    labels = torch.arange(PROBES) % classes if classes else None
    asked = {} if labels is None else {"labels": labels}
    text = None
    if width:  # embeddings as they may be: what counts is that the same come again
        generator = torch.Generator().manual_seed(SEED)
        tokens, pooled = (torch.randn(PROBES, *form, width, generator=generator) for form in ((TOKENS,), ()))
        text = Conditioning(text=tokens, pooled=pooled)
        asked |= {"text": tokens, "pooled": pooled}
    # In float32, whatever the version serves: bf16 rounds too coarsely to be compared from machine to machine.
    exact = model.spec.sampling.exact
    images = model.generate(
        labels, text=text, seed=SEED, sampling=exact, image_ids=torch.arange(PROBES), batch_size=PROBES
    )
    if not bool(images.isfinite().all()):
        raise ProbeError("the model draws pictures that are not numbers: its weights, or what they lead to, overflowed")
    save_file({"images": to_uint8(images).contiguous(), **asked}, folder / layout.PROBE)
    return {"seed": SEED, "count": PROBES, **machine(torch.get_num_threads())}


def machine(threads: int) -> dict[str, Any]:
    """Return what the rounding of a drawing on the CPU depends on."""
    return {
        "device": "cpu",
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "threads": threads,
    }


@dataclass(frozen=True)
class ProbeComparison:
    """Two drawings of the same pictures.

    Attributes:
        pixels: how many values there are, over all pictures and channels.
        differing: how many of them are not equal.
        farthest: by how many grey levels at most.
        elsewhere: what is not as recorded, as "name recorded -> name here"; empty where they have to be equal.
    """

    pixels: int
    differing: int
    farthest: int
    elsewhere: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Return whether they are as equal as they have to be."""
        if not self.elsewhere:
            return self.differing == 0
        return self.farthest <= TOLERANCE and self.differing <= SHARE * self.pixels

    @property
    def figure(self) -> str:
        """How far they differ, in words, and what is not as recorded."""
        levels = "grey level" if self.farthest == 1 else "grey levels"
        found = f"{self.differing:,} of {self.pixels:,} pixels differ, by up to {self.farthest} {levels}"
        if not self.differing:
            found = f"all {self.pixels:,} pixels are equal"
        return found + (f" ({', '.join(self.elsewhere)})" if self.elsewhere else "")

    @property
    def bound(self) -> str:
        """How equal they have to be, in words."""
        if not self.elsewhere:
            return "equal, as on the same machine"
        return f"within {TOLERANCE} grey level, at most 1 pixel in {1 / SHARE:,.0f}"


def redraw(pyfunc: Path, folder: Path, probe: dict[str, Any]) -> ProbeComparison:
    """Draw the pictures of a version again, in a new process and with the code that lies in its pyfunc.

    That runs the code, and what is compiled of it: look at its digests, and that nothing else lies there, first.

    Args:
        pyfunc: the version's folder.
        folder: the model in it.
        probe: how the pictures were drawn, as `draw_probe` returned it.

    Raises:
        ProbeError: nothing comes of it, or nothing comparable.
    """
    threads = min(int(probe["threads"]), os.cpu_count() or 1)
    with temporary_folder("redraw") as scratch:
        out = scratch / layout.PROBE
        asked = {
            "code": str((pyfunc / "code").resolve()),
            "folder": str(folder.resolve()),
            "out": str(out),
            "seed": probe["seed"],
            "count": probe["count"],
            "threads": threads,
        }
        # Without the script's own folder on the path (-P), and with no compiled file written to the version (-B).
        command = [sys.executable, "-P", "-B", str(_SCRIPT), json.dumps(asked)]
        # Threads that spin at their barriers, as is the default, stand still beside any other busy process.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=REDRAW_S
            )
        except subprocess.TimeoutExpired as error:
            raise ProbeError(
                f"the packaged code has drawn nothing for {REDRAW_S / 60:.0f} minutes: it stands still, or this "
                "machine is too slow for the model; verify it on a faster one"
            ) from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ProbeError(f"the packaged code draws nothing: {last}")
        drawn = load_file(out)["images"]
    return compare(drawn, load_file(folder / layout.PROBE)["images"], probe, machine(threads))


def compare(drawn: Tensor, recorded: Tensor, probe: dict[str, Any], here: dict[str, Any]) -> ProbeComparison:
    """Compare two drawings, uint8 of the same shape.

    Args:
        probe: on what the recorded one was made.
        here: on what the other was.

    Raises:
        ProbeError: their shapes differ.
    """
    if drawn.shape != recorded.shape:
        raise ProbeError(f"pictures of shape {tuple(drawn.shape)} are drawn, recorded are {tuple(recorded.shape)}")
    distance = (drawn.int() - recorded.int()).abs()
    elsewhere = [f"{name} {probe.get(name)} -> {here[name]}" for name in SAME_MACHINE if probe.get(name) != here[name]]
    farthest = int(distance.max()) if distance.numel() else 0
    return ProbeComparison(distance.numel(), int((distance > 0).sum()), farthest, tuple(elsewhere))


def _processor() -> str:
    """Return the name of the processor, by which the libraries of torch choose their code; empty where none is told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
