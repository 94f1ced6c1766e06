"""What can be seen of a model while it trains: a grid of samples, or a classifier's accuracy by noise level."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm.gaussian import q_sample
from ddpm.generate import generate, to_uint8
from ddpm.inpainting import inpainting_condition, random_mask
from ddpm.interop import ModelSpec
from ddpm.noise import Purpose, normal
from ddpm.prediction import Conditioning, NetworkDenoiser
from ddpm.schedule import NoiseSchedule
from pipelines.evaluation.plots import label_grid
from pipelines.shards.order import Located
from pipelines.shards.read import Batch, ShardReader
from pipelines.shards.stream import StreamSettings, open_stream
from pipelines.tracking import RunLog
from pipelines.training.hardware import to_device
from pipelines.training.parallel import world
from pipelines.training.shell import Job
from pipelines.training.state import Training, averaged
from pipelines.training.task import describe

SEED = 0
LEVELS = (0.05, 0.25, 0.5, 0.75)  # of T
BATCH = 64


class Preview:
    """Draws with the average's weights, the work shared out over the ranks; logs at the images seen.

    Args:
        settings: how test images are read, where conditions come from them.
        log: of rank 0.
    """

    def __init__(
        self,
        job: Job,
        spec: ModelSpec,
        schedule: NoiseSchedule,
        settings: StreamSettings,
        log: RunLog | None,
        rank: int,
        device: torch.device,
    ) -> None:
        self.job, self.spec, self.schedule, self.settings = job, spec, schedule, settings
        self.log, self.rank, self.device = log, rank, device

    @cached_property
    def examples(self) -> ShardReader:
        """Reads the test images."""
        return open_stream(self.job.dataset, "test", self.job.storage, self.settings, self.job.quarantine)[0]

    def show(self, training: Training) -> None:
        """One grid, or one set of accuracies; called by every rank at the same step."""
        if self.job.config.task == "classifier":
            self._accuracies(training)
        else:
            self._grid(training)

    def _grid(self, training: Training) -> None:
        columns = max(len(self.spec.classes), 1)
        count = self.job.config.tracking.grid_rows * columns
        mine = share_out(count, self.rank)
        cond = self._conditions(mine, columns)
        with averaged(training) as network:
            images = generate(
                NetworkDenoiser(_InItsPrecision(network), self.schedule, self.spec.prediction),
                self.schedule,
                self.spec.sampling,
                cond=cond,
                shape=self.spec.shape,
                seed=SEED,
                images=mine.to(self.device),
                batch_size=BATCH,
            )
        grid = collect(images, count)
        if self.log:
            pixels = label_grid(to_uint8(grid).cpu().numpy(), columns, self.spec.classes)
            self.log.image("samples", pixels, training.images_seen)

    def _conditions(self, numbers: Tensor, columns: int) -> Conditioning | None:
        """The classes in turn; captions and known pixels of the first test images."""
        config = self.job.config
        if config.model.text_dim == 0 and not config.model.inpainting:
            return Conditioning(label=(numbers % columns).to(self.device)) if self.spec.classes else None
        batch = first(self.examples, numbers)
        cond = describe(batch, config, self.device)
        if config.model.inpainting:
            known = to_device(batch.images, config, self.device)
            size = (known.shape[2], known.shape[3])
            mask = random_mask(SEED, numbers.to(self.device), size, config.objective.mask)
            cond = inpainting_condition(known, mask, cond)
        return cond

    def _accuracies(self, training: Training) -> None:
        count = sum(shard.samples for shard in self.examples.shards)
        mine = share_out(count, self.rank)
        rights = []
        with averaged(training) as network, torch.no_grad():
            for part in mine.split(BATCH):
                batch = first(self.examples, part)
                assert batch.labels is not None
                x_0, labels = to_device(batch.images, self.job.config, self.device), batch.labels.to(self.device)
                eps = normal(SEED, part.to(self.device), Purpose.NOISE, tuple(x_0.shape[1:])).to(x_0)
                row = []
                for level in LEVELS:
                    t = torch.full((len(part),), self._level(level), device=self.device)
                    scores = network(q_sample(x_0, t, eps, self.schedule), (t - 1).float())
                    row.append(scores.argmax(1) == labels)
                rights.append(torch.stack(row, dim=1).double())
        accuracy = collect(torch.cat(rights), count).mean(0)
        if self.log:
            values = {
                f"test/accuracy_t{self._level(at):04d}": a for at, a in zip(LEVELS, accuracy.tolist(), strict=True)
            }
            self.log.metrics(values, training.images_seen)

    def _level(self, fraction: float) -> int:
        return max(1, round(fraction * self.schedule.num_steps))


class _InItsPrecision(nn.Module):
    """A network that takes float32 images whatever its weights are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        return self.network(x_t.to(next(self.network.parameters()).dtype), t, cond)


def share_out(count: int, rank: int) -> Tensor:
    """Which of `count` pieces of work are this rank's, as many for each; some twice where they do not come out even.

    All ranks of FSDP2 must call the network equally often.
    """
    each = -(-count // world())
    return torch.arange(rank, each * world(), world()) % count


def collect(mine: Tensor, count: int) -> Tensor:
    """What all ranks made of `share_out`'s pieces, in order, [count, ...]; on every rank."""
    if world() == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(parts, mine.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


def first(reader: ShardReader, numbers: Tensor) -> Batch:
    """The samples of these numbers in shard order, from 0 on, beginning anew behind the last one."""
    counts = np.array([shard.samples for shard in reader.shards])
    wanted = numbers.numpy() % counts.sum()
    ends = counts.cumsum()
    shards = np.searchsorted(ends, wanted, side="right")
    return reader.batch(Located(wanted, shards, wanted - (ends - counts)[shards]))
