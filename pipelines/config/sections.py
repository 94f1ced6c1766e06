"""The sections of a training's configuration: data, optimizer, cluster, storage, tracking, checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ddpm.image_size import ImageSize, height_width, parse_image_size
from pipelines.config.choices import ConfigSection
from pipelines.presentation.errors import ConfigError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names of runs, studies and served applications, which are parts of addresses."""
Name = Annotated[str, Field(pattern=NAME, max_length=200)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Geometry = Literal["crop", "resize", "keep"]
Encoding = Literal["png", "jpg", "webp", "npy"]


def _ordinal(given: Any) -> int:
    """Return the number of a sample, which may be written as 1e6.

    Raises:
        ValueError: it is no whole number.
    """
    value = float(given)
    if not value.is_integer():
        raise ValueError
    return int(value if isinstance(given, str) and not given.isdecimal() else given)


class SourceConfig(ConfigSection):
    """One of several datasets that a training draws from."""

    name: Annotated[str, Field(pattern=NAME, max_length=60)] = Field(
        description="name of the source, by which metrics and messages call it"
    )
    uri: str = Field(description="address of the folder with its shards and dataset.json")
    weight: float | dict[int, float] = Field(
        1.0,
        description="share of the training stream, relative to the other weights; or {N: WEIGHT, ...}, with a weight "
        "from sample N of the stream on, where the first N is 0",
    )

    @field_validator("weight", mode="before")
    @classmethod
    def _weight(cls, given: Any) -> Any:
        try:
            found = {_ordinal(n): float(w) for n, w in given.items()} if isinstance(given, dict) else float(given)
        except (TypeError, ValueError):
            raise ValueError("a weight is a number, or {N: WEIGHT, ...} with a weight from sample N on") from None
        weights, starts = (list(found.values()), list(found)) if isinstance(found, dict) else ([found], [0])
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError("weights are numbers above 0; leave a source out that is not to be drawn")
        if min(starts) != 0:
            raise ValueError("weights by stretch need one from sample 0 on, and none before it: {0: 1, 1000000: 3}")
        return found

    @property
    def weights(self) -> dict[int, float]:
        """First sample -> weight from there on."""
        return self.weight if isinstance(self.weight, dict) else {0: self.weight}


class DataConfig(ConfigSection):
    """The dataset and how it is read."""

    source: str | None = Field(
        None,
        description="source that `ddpm flow` ingests: `digits`, a folder, a .zip, a .csv, .jsonl or .parquet of paths, "
        "or .parquet files or WebDataset tars that hold pictures",
    )
    uri: str = Field(
        description="address of the folder with the shards and dataset.json; with data.sources, that of the dataset by "
        "whose images samples are judged, by default the first source"
    )
    sources: tuple[SourceConfig, ...] = Field(
        (),
        description="datasets to train on in a mixture, each {name: NAME, uri: ADDRESS, weight: WEIGHT}, instead of "
        "the one at data.uri; the weight is a number, or {N: WEIGHT, ...} with one from sample N of the stream on",
    )
    image_size: Annotated[ImageSize, BeforeValidator(parse_image_size)] = Field(
        description="height and width in pixels: one number for square images, else HEIGHTxWIDTH, such as 48x64"
    )
    channels: Literal[1, 3] = Field(description="1 for grey images, 3 for colour")
    num_classes: NonNegativeInt = Field(
        description="number of classes, of all sources together; 0 for images without labels"
    )
    lanes: PositiveInt = Field(8, description="positions in the data that are read in parallel; must divide batch_size")
    window: PositiveInt = Field(4, description="consecutive shards of a lane that are shuffled together")
    flip: bool = Field(False, description="mirror every image with probability 1/2")
    geometry: Geometry = Field(
        "crop", description="how an ingest resizes images: crop takes the largest central part of the same proportions"
    )
    encoding: Encoding = Field("png", description="file format of ingested images; only jpg loses detail")
    shard_samples: PositiveInt = Field(1000, description="images per shard that an ingest writes")
    shard_bytes: PositiveInt | None = Field(
        None, description="target size of a shard in bytes, instead of shard_samples"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the images used for testing if the source has no test split"
    )
    text_encoder: str | None = Field(
        None, description="hub name or folder of the text encoder that embeds captions in an ingest"
    )
    min_side: NonNegativeInt = Field(0, description="an ingest leaves out images whose shorter side has fewer pixels")
    max_aspect: Annotated[float, Field(ge=1)] | None = Field(
        None, description="an ingest leaves out images whose longer side is more than this many times the shorter one"
    )
    min_caption: NonNegativeInt = Field(0, description="an ingest leaves out images whose caption has fewer characters")
    min_score: tuple[str, float] | None = Field(
        None,
        description="[COLUMN, VALUE]: an ingest leaves out images whose number in this column of their table is below",
    )
    near_duplicates: Literal["keep", "remove"] = Field(
        "keep", description="whether an ingest keeps images that are nearly the same as an earlier one"
    )
    allow_changed: bool = Field(False, description="resume a run even if its data or quarantine have changed")
    cache_dir: str | None = Field(None, description="node-wide shard cache; null: the user's cache folder")
    cache_gib: PositiveFloat = Field(20.0, description="largest size of the shard cache on a node's disk, in GiB")
    memory_mib: NonNegativeFloat = Field(
        256.0,
        description="largest size of a split, in MiB, whose decoded pixels a worker keeps in memory; 0: never. "
        "Captioned images are never kept",
    )
    decode_threads: PositiveInt = Field(2, description="image decoding threads per worker")
    prefetch_batches: PositiveInt = Field(4, description="batches that a worker prefetches")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return self.channels, *height_width(self.image_size)

    @model_validator(mode="before")
    @classmethod
    def _reference(cls, given: Any) -> Any:
        """Let the first source judge where no other dataset is named."""
        sources = given.get("sources") if isinstance(given, dict) else None
        if isinstance(sources, list) and sources and isinstance(sources[0], dict) and not given.get("uri"):
            return {**given, "uri": sources[0].get("uri", "")}
        return given

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
        if twice:
            where = [i for i, source in enumerate(sources) if source.name == twice[0]]
            raise ValueError(
                f"sources {' and '.join(map(str, where))}, counted from 0, are both named '{twice[0]}': give each a "
                "name of its own"
            )
        return sources


class OptimConfig(ConfigSection):
    """Optimizer, learning-rate schedule by images seen, and the moving average of the weights."""

    kind: Literal["adamw", "radam", "muon"] = Field(
        "adamw",
        description="optimizer: AdamW; RAdam, which rectifies the variance of the first steps instead of warming up "
        "(Liu et al. 2020); or Muon, which orthogonalizes the updates of hidden matrices and uses AdamW for the rest",
    )
    lr: PositiveFloat = Field(2e-4, description="learning rate after the warm-up, before any decay")
    lr_scaling: tuple[Literal["sqrt", "linear"], PositiveInt] | None = Field(
        None,
        description="[sqrt, N] or [linear, N]: optim.lr is for batches of N images and is scaled by the square root of "
        "batch_size / N or by the ratio itself; null: no scaling",
    )
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="decay rates of AdamW's averages of the gradient and of its square"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay of AdamW and Muon")
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.95, description="momentum of Muon, for hidden matrices"
    )
    warmup_images: NonNegativeInt = Field(
        0, description="images over which the learning rate rises from 0 to optim.lr at the start of a run"
    )
    decay: Literal["constant", "linear", "cosine", "inverse_sqrt"] = Field(
        "constant",
        description="decay of the learning rate: none (constant), linear or cosine to 2 % at the end of the run, or "
        "1/sqrt(images seen)",
    )
    decay_images: PositiveInt = Field(1_000_000, description="images after which decay=inverse_sqrt starts")
    grad_clip: PositiveFloat | None = Field(
        1.0, description="largest gradient norm; larger gradients are scaled down to it; null: no limit"
    )
    ema_half_life: PositiveFloat = Field(
        500_000, description="half-life, in images, of the moving average of the weights that samples are drawn from"
    )
    power_ema: tuple[PositiveFloat, ...] = Field(
        (), description="relative widths of power-function averages, whose width can be chosen after training"
    )
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32", "fp64"] = Field(
        "auto",
        description="auto: bf16 where the hardware is faster in it, else fp16 with a loss scale on GPUs with tensor "
        "cores, else fp32; weights stay float32",
    )
    max_skipped: PositiveInt = Field(
        10,
        description="largest number of consecutive updates that are skipped because the loss or gradient is not finite",
    )

    @model_validator(mode="after")
    def _widths(self) -> OptimConfig:
        if len(set(self.power_ema)) < len(self.power_ema) or max(self.power_ema, default=0) > 1 / (2 * 3**0.5):
            raise ValueError(
                f"power_ema must name widths in (0, 0.2886], each once, got {list(self.power_ema)}: "
                "[0.05, 0.1] is enough to reconstruct any other"
            )
        return self


class ClusterConfig(ConfigSection):
    """Resources that a run requests from Ray, and how it handles failures."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        2,
        description="number of worker processes. [min, max]: start with as many as the cluster has room for, continue "
        "with fewer when nodes are lost, grow back when they return",
    )
    cpus_per_worker: PositiveFloat = Field(1, description="CPUs that Ray reserves for each worker")
    gpus_per_worker: Literal[0, 1] = Field(0, description="GPUs per worker; 0: train on CPUs")
    threads_per_worker: PositiveInt = Field(1, description="torch threads per worker when training on CPUs")
    parallel: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="ddp: a copy of the network per worker; fsdp: its parameters are sharded over the workers (FSDP2); "
        "hsdp: sharded over the workers of a group, each of which has a copy",
    )
    shard_size: PositiveInt | None = Field(
        None,
        description="with parallel=hsdp, workers that share one copy of the network, or more where that does not "
        "divide their number; null: those of a node",
    )
    param_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="with parallel=fsdp or hsdp in bf16, dtype in which weights are gathered for forward and backward; "
        "bf16 halves what is gathered. Gradients are added up, and weights updated, in float32 either way",
    )
    check_memory: bool = Field(
        True, description="refuse a training whose estimated memory does not fit its nodes, as far as they are known"
    )
    compile: bool = Field(
        False, description="compile the network with torch.compile; compiled code is cached on the node's disk"
    )
    peak_tflops: PositiveFloat | None = Field(
        None, description="peak dense bf16 TFLOP/s of one GPU, for the utilization; null: from the name of the card"
    )
    max_failures: NonNegativeInt = Field(
        3, description="consecutive failures without a new checkpoint after which the run fails"
    )
    max_preemption_failures: Annotated[int, Field(ge=-1)] = Field(
        -1, description="restarts after preemptions, which max_failures does not count; -1: no limit"
    )
    preemption_grace_s: NonNegativeFloat = Field(
        0, description="seconds that the other workers continue after a preemption is due, to finish an upload"
    )
    patience_s: PositiveFloat = Field(
        300, description="seconds to wait for missing nodes, or for a trial that does not answer"
    )
    step_timeout_s: NonNegativeFloat | None = Field(
        1800,
        description="seconds without progress after which the workers are restarted; set it longer than an outage of "
        "storage (300 s), a compilation or a sample grid. null or 0: only the backend's timeout of 30 minutes",
    )
    resize_every_s: PositiveFloat = Field(
        60, description="seconds between checks whether a run with num_workers=[min, max] can grow"
    )
    address: str | None = Field(None, description="address of the Ray cluster; null: RAY_ADDRESS, else the local stack")

    @model_validator(mode="after")
    def _ordered(self) -> ClusterConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers must be [min, max] with min <= max, got {list(self.num_workers)}")  # type: ignore[arg-type]
        if self.shard_size is not None and self.parallel != "hsdp":
            raise ValueError(f"shard_size = {self.shard_size} needs parallel=hsdp, got parallel={self.parallel}")
        if self.param_dtype != "fp32" and self.parallel == "ddp":
            raise ValueError(
                f"param_dtype = {self.param_dtype} needs parallel=fsdp or hsdp: with ddp nothing is gathered"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Smallest number of workers with which the run trains."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Largest number that is requested."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class StorageConfig(ConfigSection):
    """Storage of data, checkpoints and artifacts."""

    root: str = Field(
        description="address of everything that is stored: s3://BUCKET[/PREFIX], file:///PATH or another known scheme"
    )
    endpoint_url: str | None = Field(
        None, description="address of an S3 server that is not AWS, such as http://HOST:PORT"
    )
    credentials_file: str | None = Field(None, description="file with S3 keys, in the format of ~/.aws/credentials")
    region: str | None = Field(None, description="region of the S3 bucket; null: AWS's default rules")
    local_stack: bool = Field(False, description="start the local S3 server if no other storage is configured")

    @model_validator(mode="after")
    def _known_scheme(self) -> StorageConfig:
        # `pipelines.stack.connect` checks the scheme: storage is built on the configuration.
        scheme, separator, rest = self.root.partition("://")
        if not (scheme and separator and rest) or (scheme == "file" and not rest.startswith("/")):
            raise ValueError(f"root must be s3://BUCKET[/PREFIX] or file:///PATH, got {self.root!r}")
        return self


class TrackingConfig(ConfigSection):
    """MLflow, and other sinks of a run's metrics."""

    uri: str | None = Field(
        None, description="address of the MLflow server; null: MLFLOW_TRACKING_URI, else the local stack"
    )
    experiment: str = Field("ddpm", description="MLflow experiment of runs")
    sinks: tuple[Literal["mlflow", "jsonl"], ...] = Field(("mlflow",), description="sinks of a run's metrics")
    log_every: PositiveInt = Field(2_000, description="images between logged metrics")
    grid_every: PositiveInt | None = Field(10_000, description="images between sample grids; null: none")
    grid_images: PositiveInt = Field(64, description="largest number of images in a sample grid")
    profile_at: NonNegativeInt | None = Field(
        None, description="images seen at which torch.profiler starts; null: never"
    )
    profile_steps: PositiveInt = Field(5, description="training steps that torch.profiler records")

    @model_validator(mode="after")
    def _mlflow_is_there(self) -> TrackingConfig:
        if "mlflow" not in self.sinks or len(set(self.sinks)) < len(self.sinks):
            raise ValueError(
                f"sinks = {list(self.sinks)}: name each once, and always mlflow, which records the run's checkpoints"
            )
        return self

    @property
    def server(self) -> str:
        """Address of the MLflow server.

        Raises:
            ConfigError: no server is configured.
        """
        if self.uri is None:
            raise ConfigError(
                "no MLflow server is configured: set tracking.uri or MLFLOW_TRACKING_URI, or run `ddpm up`"
            )
        return self.uri


class CheckpointConfig(ConfigSection):
    """How often checkpoints are saved, and which are kept."""

    every: PositiveInt = Field(
        description="images between checkpoints, at most as many are trained again after a crash"
    )
    local_every: PositiveInt | None = Field(
        None,
        description="images between copies of the state in the memory of the nodes, from which a restart goes on "
        "without reading the store; null: no copies",
    )
    keep: Annotated[int, Field(ge=1)] = Field(2, description="newest checkpoints that are kept for a restart")
    backlog: NonNegativeInt = Field(
        2, description="checkpoints that may wait in memory for an upload before the training blocks"
    )
    publish_every: PositiveInt = Field(
        50_000, description="images between published checkpoints, which are kept and which MODEL references can name"
    )
    keep_best: PositiveInt | None = Field(
        None,
        description="number of scored checkpoints that are kept: those with the lowest Frechet distance, besides the "
        "newest one and those that a version or another run refers to; null: all",
    )
