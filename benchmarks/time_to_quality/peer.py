"""The peer: diffusers' network and schedulers in a training loop of its kind, tuned for this machine.

    python -m benchmarks.time_to_quality.peer SETTINGS.json FOLDER

trains and draws in a process of its own, whose budget begins with its start. It has what a user of diffusers who knows
the field would give it: cosine schedule, one-cycle learning rate that ends with the budget, exponential moving average
with warm-up, dropped labels for classifier-free guidance, gradient clipping, fused AdamW, bf16 and channels-last where
they are faster here, images in memory, DPM-Solver++ for drawing.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.time_to_quality.pictures import Pictures, as_frequent

BEGAN = psutil.Process().create_time()
"""When the budget began: imports are part of it."""
SCHEDULE = "squaredcos_cap_v2"
KINDS = {"eps": "epsilon", "v": "v_prediction"}
SAMPLERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dpm_solver": ("DPMSolverMultistepScheduler", 15, {"lambda_min_clipped": -5.1}),
    "ddim": ("DDIMScheduler", 50, {"clip_sample": False}),
}
"""Scheduler of diffusers, steps, options; the better one of the best trial counts. The clipped level is what its page
advises for the cosine schedule; a sample that DDIM clips, as by default, keeps the noise of the unclipped one."""


@dataclass(frozen=True)
class Settings:
    """A training of the peer.

    Attributes:
        network: the fields of `UNetConfig` that diffusers' network has as well.
        size, channels, classes: of the images that it is trained on.
        prediction: eps or v.
        lr: the largest learning rate.
        batch: images of a step.
        flip: whether images are mirrored at random.
        guidance: its scale for drawing.
        budget_s: seconds from the start of the process to the end of training.
        seed: of weights, order and noise.
        samples: to draw at the end, which is not part of the budget.
        samplers: names of `SAMPLERS` to draw them with.
    """

    network: dict[str, Any]
    size: int
    channels: int
    classes: int
    prediction: str
    lr: float
    batch: int
    flip: bool
    guidance: float
    budget_s: float
    seed: int
    samples: int
    samplers: tuple[str, ...] = tuple(SAMPLERS)


def build(settings: Settings) -> nn.Module:
    """Return diffusers' network of the same shape as ours; the last class is the null label."""
    from diffusers import UNet2DModel

    shape = settings.network
    return UNet2DModel(
        sample_size=settings.size,
        in_channels=settings.channels,
        out_channels=settings.channels,
        block_out_channels=tuple(shape["channels"]),
        layers_per_block=shape["layers_per_block"],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in shape["attention"]],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(shape["attention"])],
        attention_head_dim=shape["head_dim"],
        num_class_embeds=settings.classes + 1,
    )


def main(arguments: list[str]) -> None:
    """Train, draw, and write samples and facts."""
    settings, folder = Settings(**json.loads(Path(arguments[0]).read_text())), Path(arguments[1])
    given = json.loads((folder / "pictures.json").read_text())
    pictures = Pictures(given["name"], Path(given["given"]), Path(given["held_out"]), given["size"], given["channels"])
    images, labels = pictures.read(pictures.given, settings.size)
    torch.manual_seed(settings.seed)
    network = build(settings)
    average, facts = Training(settings, network, images, labels).run()
    network.load_state_dict(average)
    wanted = as_frequent(labels, settings.samples)
    drawn = {sampler: draw(settings, network.eval(), wanted, sampler, facts["bf16"]) for sampler in settings.samplers}
    torch.save({"labels": wanted, "samples": drawn}, folder / "samples.pt")
    (folder / "facts.json").write_text(json.dumps(facts | asdict(settings)))


class Training:
    """A training of the peer, whose budget counts from the start of the process.

    Args:
        images, labels: [N, C, H, W] in [-1, 1], and [N].
    """

    def __init__(self, settings: Settings, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        from diffusers import DDPMScheduler

        self.settings, self.network, self.images, self.labels = settings, network, images, labels
        self.scheduler = DDPMScheduler(beta_schedule=SCHEDULE, prediction_type=KINDS[settings.prediction])
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
        self.bf16 = self.channels_last = False
        self.batches = self._batches()

    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train until the budget has passed; return the averaged weights, and what was done."""
        self._take_the_fastest()
        shadow = {name: value.clone() for name, value in self.network.state_dict().items()}
        from_s = time.time() - BEGAN
        length, steps = max(self.settings.budget_s - from_s, 1e-9), 0  # of one step where nothing is left
        while (gone := (time.time() - BEGAN - from_s) / length) < 1:
            # One cycle: a linear warm-up, then half a cosine that ends with the budget.
            rate = self.settings.lr * min(gone / 0.05, 0.5 * (1 + math.cos(math.pi * gone)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._forward_and_backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            steps += 1
            decay = min(0.999, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(list(shadow.values()), list(self.network.state_dict().values()), 1 - decay)
        facts = {"images": steps * self.settings.batch, "steps": steps, "bf16": self.bf16}
        return shadow, facts | {"channels_last": self.channels_last, "seconds": time.time() - BEGAN}

    def _batches(self) -> Iterator[Tensor]:
        """Yield the indices of batches without end, each pass in another order."""
        count, size = len(self.images), self.settings.batch
        while True:
            yield from torch.randperm(count)[: count // size * size].split(size)

    def _forward_and_backward(self) -> None:
        settings, picked = self.settings, next(self.batches)
        x_0, label = self.images[picked], self.labels[picked]
        if settings.flip:
            x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1) < 0.5, x_0.flip(-1), x_0)
        label = torch.where(torch.rand(len(label)) < 0.1, settings.classes, label)
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),))
        noisy = self.scheduler.add_noise(x_0, noise, t)
        target = noise if settings.prediction == "eps" else self.scheduler.get_velocity(x_0, noise, t)
        if self.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = F.mse_loss(self.network(noisy, t, label).sample.float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)

    def _take_the_fastest(self) -> None:
        """Choose precision and memory format by a step of each, after one to warm up; the budget pays for it."""
        units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        seconds = {}
        for bf16 in (False, True) if units else (False,):
            for channels_last in (False, True):
                self._use(bf16, channels_last)
                for _ in range(2):
                    began = time.perf_counter()
                    self._forward_and_backward()
                    seconds[bf16, channels_last] = time.perf_counter() - began
        self.optimizer.zero_grad()
        self._use(*min(seconds, key=seconds.__getitem__))

    def _use(self, bf16: bool, channels_last: bool) -> None:
        self.bf16, self.channels_last = bf16, channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=layout)  # type: ignore[call-overload]


@torch.no_grad()
def draw(settings: Settings, network: nn.Module, labels: Tensor, sampler: str, bf16: bool) -> Tensor:
    """Return samples of these classes in [-1, 1], drawn by one of `SAMPLERS`, in bf16 as a plan of ours draws there."""
    import diffusers

    name, steps, options = SAMPLERS[sampler]
    generator, parts = torch.Generator().manual_seed(settings.seed), []
    for part in labels.split(100):
        scheduler = getattr(diffusers, name)(
            beta_schedule=SCHEDULE,
            prediction_type=KINDS[settings.prediction],
            timestep_spacing="trailing",
            **options,
        )
        scheduler.set_timesteps(steps)
        x = torch.randn(len(part), settings.channels, settings.size, settings.size, generator=generator)
        both = torch.cat([part, torch.full_like(part, settings.classes)])
        for t in scheduler.timesteps:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                given, null = network(torch.cat([x, x]), t, both).sample.float().chunk(2)
            x = scheduler.step(null + settings.guidance * (given - null), t, x).prev_sample
        parts.append(x.clamp(-1, 1))
    return torch.cat(parts)


if __name__ == "__main__":
    main(sys.argv[1:])
