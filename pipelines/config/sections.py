"""The sections of a run's configuration: data, optimizer, cluster, storage, tracking, checkpoints, scores, serving."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from pipelines.config.choices import ConfigSection
from pipelines.presentation.errors import ConfigError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What runs, studies and served applications may be called: their names are parts of addresses."""
Name = Annotated[str, Field(pattern=NAME, max_length=200)]
MODEL_NAME = r"[^/:@'\\\x00-\x1f\x7f]+"
"""What registered models may be called: what a MODEL reference divides, and what MLflow's filters cannot hold in the
quotes in which they ask for a name, is no part of it."""
MODEL_NAME_RULE = "the name of a model has no / : @ ' or \\ in it, and no control character"
CANDIDATE = "candidate"
"""Alias of the newest version of a registered model; nothing guards it."""
PREVIOUS = "previous"
"""Alias of the version that had the guarded alias before; nothing guards it."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Geometry = Literal["crop", "resize", "keep"]
Encoding = Literal["png", "jpg", "webp", "npy"]


class DataConfig(ConfigSection):
    """The dataset and how it is read."""

    source: str | None = Field(
        None, description="what `ddpm flow` ingests: `digits`, a folder, a .zip, or a .csv or .jsonl of paths"
    )
    uri: str = Field(description="where the shards and dataset.json are")
    image_size: PositiveInt = Field(le=4096, description="height and width in pixels")
    channels: Literal[1, 3] = Field(description="1 for grey images, 3 for colour")
    num_classes: NonNegativeInt = Field(description="number of classes; 0 for images without labels")
    lanes: PositiveInt = Field(8, description="places in the data that are read in parallel; must divide batch_size")
    window: PositiveInt = Field(4, description="consecutive shards of a lane that are shuffled together")
    flip: bool = Field(False, description="mirror every image with probability 1/2")
    geometry: Geometry = Field("crop", description="how an ingest brings images to size: crop takes the central square")
    encoding: Encoding = Field("png", description="file format of ingested images; only jpg loses detail")
    shard_samples: PositiveInt = Field(1000, description="images in each shard that an ingest writes")
    shard_bytes: PositiveInt | None = Field(None, description="size of a shard to aim at, instead of shard_samples")
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the images that is kept for testing, where the source has no test split"
    )
    text_encoder: str | None = Field(
        None, description="hub name or folder of the encoder whose embeddings of the captions an ingest stores"
    )
    allow_changed: bool = Field(False, description="resume a run although its data or their quarantine have changed")
    cache_dir: str | None = Field(None, description="node-wide shard cache; null: the user's cache folder")
    cache_gib: PositiveFloat = Field(20.0, description="most space that the shard cache takes on a node's disk, in GiB")
    memory_mib: NonNegativeFloat = Field(
        256.0,
        description="a worker keeps the decoded pixels of a split that takes no more than this, in MiB; 0 keeps none. "
        "Captioned images are never kept",
    )
    decode_threads: PositiveInt = Field(2, description="threads of a worker that decode images")
    prefetch_batches: PositiveInt = Field(4, description="batches that a worker reads ahead of the training")


class OptimConfig(ConfigSection):
    """Optimizer, learning rate by images seen, and the average of the weights."""

    kind: Literal["adamw", "radam", "muon"] = Field(
        "adamw",
        description="the optimizer: AdamW, or RAdam, which rectifies the first steps' variance instead of warming up "
        "(Liu et al. 2020), or Muon, which makes updates of hidden matrices orthogonal and leaves the rest to AdamW",
    )
    lr: PositiveFloat = Field(2e-4, description="learning rate after the warm-up, before any decay")
    lr_scaling: tuple[Literal["sqrt", "linear"], PositiveInt] | None = Field(
        None,
        description="[sqrt, N] or [linear, N]: optim.lr is for batches of N images, and grows with batch_size / N by "
        "its root or by itself. null: optim.lr is for every batch size",
    )
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="how slowly AdamW forgets: its averages of the gradient and of the gradient's square"
    )
    weight_decay: NonNegativeFloat = Field(
        0.0, description="weight decay of AdamW and Muon, taken from the weights themselves"
    )
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.95, description="how slowly Muon forgets: the momentum of hidden matrices"
    )
    warmup_images: NonNegativeInt = Field(
        0, description="images over which the learning rate rises from 0 to optim.lr at the beginning of a run"
    )
    decay: Literal["constant", "linear", "cosine", "inverse_sqrt"] = Field(
        "constant",
        description="how the learning rate falls: not at all (constant), to 2 % at the end of the run by a line or a "
        "cosine, or as 1/sqrt(images seen)",
    )
    decay_images: PositiveInt = Field(1_000_000, description="images after which decay=inverse_sqrt begins to fall")
    grad_clip: PositiveFloat | None = Field(
        1.0, description="largest norm of a gradient; a longer one is scaled down to it. null: no limit"
    )
    ema_half_life: PositiveFloat = Field(
        500_000, description="half-life, in images, of the average of the weights, from which samples are drawn"
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
        10, description="updates in a row that are left out for a loss or gradient that is not finite"
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
    """What the run asks of Ray."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        2,
        description="processes that train together. [min, max]: start with as many as the cluster has room for, go on "
        "with fewer when nodes are lost, grow back when they return",
    )
    cpus_per_worker: PositiveFloat = Field(1, description="processors that Ray reserves for each worker")
    gpus_per_worker: Literal[0, 1] = Field(0, description="1: each worker trains on a GPU of its own; 0: on processors")
    threads_per_worker: PositiveInt = Field(1, description="threads of torch in each worker that trains on processors")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="a copy of the network per worker, or its parts shared out over them (FSDP2)"
    )
    compile: bool = Field(False, description="torch.compile the network; what it makes is kept on the node's disk")
    peak_tflops: PositiveFloat | None = Field(
        None, description="dense bf16 peak of one GPU, for the utilization; null: from the card's name"
    )
    max_failures: NonNegativeInt = Field(3, description="failures without a new checkpoint before the run fails")
    max_preemption_failures: Annotated[int, Field(ge=-1)] = Field(
        -1, description="restarts after a node was taken away, which max_failures does not count; -1: without a limit"
    )
    preemption_grace_s: NonNegativeFloat = Field(
        0, description="seconds that the other workers go on after a preempted one is due to go, to end an upload"
    )
    patience_s: PositiveFloat = Field(300, description="seconds to wait for nodes that are missing")
    step_timeout_s: NonNegativeFloat | None = Field(
        1800,
        description="seconds without progress after which the workers are started again; longer than an outage of "
        "storage (300 s), compilation or a sample grid. null or 0: only the backend's 30 minutes count",
    )
    resize_every_s: PositiveFloat = Field(
        60, description="seconds between looks whether a run with num_workers=[min, max] can grow"
    )
    address: str | None = Field(None, description="address of the Ray cluster; null: RAY_ADDRESS, else the local stack")

    @model_validator(mode="after")
    def _ordered(self) -> ClusterConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers must be [min, max] with min <= max, got {list(self.num_workers)}")  # type: ignore[arg-type]
        return self

    @property
    def min_workers(self) -> int:
        """Fewer cannot train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """More are not asked for."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class StorageConfig(ConfigSection):
    """Where data, checkpoints and artifacts are."""

    root: str = Field(description="s3://BUCKET[/PREFIX], file:///PATH or the address of another registered storage")
    endpoint_url: str | None = Field(
        None, description="address of an S3 server that is not AWS, such as http://HOST:PORT"
    )
    credentials_file: str | None = Field(None, description="file with S3 keys, in the format of ~/.aws/credentials")
    region: str | None = Field(None, description="region of the S3 bucket; null: by AWS's own rules")
    local_stack: bool = Field(False, description="start the local S3 when nothing else is named")

    @model_validator(mode="after")
    def _known_scheme(self) -> StorageConfig:
        # Which schemes there are is checked by `pipelines.stack.connect`: storage is built on the configuration.
        scheme, separator, rest = self.root.partition("://")
        if not (scheme and separator and rest) or (scheme == "file" and not rest.startswith("/")):
            raise ValueError(f"root must be s3://BUCKET[/PREFIX] or file:///PATH, got {self.root!r}")
        return self


class TrackingConfig(ConfigSection):
    """MLflow, and what else receives a run's curves."""

    uri: str | None = Field(
        None, description="address of the MLflow server; null: MLFLOW_TRACKING_URI, else the local stack"
    )
    experiment: str = Field("ddpm", description="MLflow experiment that runs are recorded in")
    sinks: tuple[Literal["mlflow", "jsonl"], ...] = Field(("mlflow",), description="what a run's curves are sent to")
    log_every: PositiveInt = Field(2_000, description="images between points of a run's curves")
    grid_every: PositiveInt | None = Field(10_000, description="images between sample grids; null: none")
    grid_images: PositiveInt = Field(64, description="most images in a grid, whatever the number of classes")
    profile_at: NonNegativeInt | None = Field(None, description="images seen at which torch.profiler begins to look")
    profile_steps: PositiveInt = Field(5, description="training steps that torch.profiler records, from profile_at on")

    @model_validator(mode="after")
    def _mlflow_is_there(self) -> TrackingConfig:
        if "mlflow" not in self.sinks or len(set(self.sinks)) < len(self.sinks):
            raise ValueError(
                f"sinks = {list(self.sinks)}: name each once, mlflow among them, which records the run's checkpoints"
            )
        return self

    @property
    def server(self) -> str:
        """Address of the MLflow server.

        Raises:
            ConfigError: none is named.
        """
        if self.uri is None:
            raise ConfigError("no MLflow server is named: set tracking.uri or MLFLOW_TRACKING_URI, or run `ddpm up`")
        return self.uri


class CheckpointConfig(ConfigSection):
    """How often state is saved, in images."""

    every: PositiveInt = Field(description="images between checkpoints: most that is trained again after a crash")
    keep: Annotated[int, Field(ge=1)] = Field(2, description="newest checkpoints that stay for a restart")
    backlog: NonNegativeInt = Field(
        2, description="checkpoints that may wait in memory behind an upload before the training waits for it"
    )
    publish_every: PositiveInt = Field(
        50_000, description="images between checkpoints that stay for good and that MODEL references can name"
    )
    keep_best: PositiveInt | None = Field(
        None,
        description="how many scored checkpoints stay: those of the lowest Frechet distance, beside the newest one and "
        "those that a version or another run names; null: all",
    )


class EvaluationConfig(ConfigSection):
    """How samples are scored."""

    n: Annotated[int, Field(ge=2)] | None = Field(
        None, description="samples drawn from each noise seed; null: as many as the test split has. Papers use 50_000"
    )
    seed: Seed = Field(1, description="first seed of the noise that samples are drawn from")
    seeds: PositiveInt = Field(
        3, description="how many noise seeds are drawn from; scores are means over them, with their spread"
    )
    batch_size: PositiveInt = Field(90, description="images that are drawn together")
    actors: PositiveInt | None = Field(
        None, description="processes that draw, each with a CPU or GPU of the Ray cluster; null: as many as it has"
    )
    likelihood_images: NonNegativeInt = Field(
        32, le=256, description="test images whose bits per dimension are computed, by the bound and by the ODE"
    )
    evaluator: Literal["auto", "classifier", "contrastive", "inception", "encoder"] = Field(
        "auto",
        description="network whose features are compared; auto: the dataset's own classifier, or contrastive for data "
        "without labels",
    )
    evaluator_passes: PositiveInt | None = Field(
        None,
        description="passes over its images by which the dataset's own evaluator is trained, where none is there yet; "
        "null: 40 for classifier, 20 for contrastive",
    )
    weights: str | None = Field(None, description="path or address of the network of evaluator=inception or encoder")
    encoder_size: PositiveInt | None = Field(
        None,
        description="size of the images that evaluator=encoder gets; null: what its folder says, else 224",
    )
    encoder_mean: tuple[float, ...] | None = Field(
        None, description="subtracted from pixels in [0, 1], per channel; null: what the folder says, else ImageNet's"
    )
    encoder_std: tuple[PositiveFloat, ...] | None = Field(
        None, description="what pixels are divided by after encoder_mean is subtracted, per channel"
    )
    every: PositiveInt | None = Field(
        None, description="images between checkpoints that are published, and scored while training goes on; null: none"
    )
    wait_s: Annotated[float, Field(ge=10)] = Field(
        3600, description="seconds that a training which has seen all its images waits for evaluations that still run"
    )

    @model_validator(mode="after")
    def _channels(self) -> EvaluationConfig:
        if self.encoder_mean is not None or self.encoder_std is not None:
            mean, std = self.encoder_mean or (), self.encoder_std or ()
            if len(mean) != len(std) or len(mean) not in (1, 3):
                raise ValueError(
                    "encoder_mean and encoder_std must have one value each, for grey images, or three, "
                    f"got {list(mean)} and {list(std)}"
                )
        return self


class RegistryConfig(ConfigSection):
    """Under which name a model is registered, which alias the gate guards, who signs and who is believed."""

    model: str = Field(description="name under which the model is registered; unless set, the name of the run")
    alias: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        "champion", description="alias that only a version which passes the gate gets"
    )
    n: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="samples of each version that the gate compares; null: 5,000, or 20 for each feature where that "
        "is more",
    )
    signing_key: str | None = Field(
        None, description="private key (PEM) that signs versions and verdicts; null: one that is made on first use"
    )
    signing_certificate: str | None = Field(None, description="certificate (PEM) of the signing key")
    signing_chain: tuple[str, ...] = Field(
        (), description="certificates (PEM) between the signing certificate and its root"
    )
    trusted_keys: tuple[str, ...] = Field(
        (), description="public keys (PEM) whose signatures are believed; without one and without certificates: our own"
    )
    trusted_certificates: tuple[str, ...] = Field(
        (), description="root certificates (PEM) below which signatures are believed"
    )
    trusted_evaluators: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(
        (), description="SHA-256 of records of evaluators that are believed although nobody who is trusted signed them"
    )

    @field_validator("model")
    @classmethod
    def _can_be_asked_for(cls, model: str) -> str:
        if not re.fullmatch(MODEL_NAME, model):
            raise ValueError(f"{MODEL_NAME_RULE}: choose another one")
        return model

    @field_validator("alias")
    @classmethod
    def _not_taken(cls, alias: str) -> str:
        if alias in (CANDIDATE, PREVIOUS):
            raise ValueError(f"{CANDIDATE} and {PREVIOUS} move without the gate: choose another alias")
        if alias.lower() == "latest" or (alias[0] in "vV" and alias[1:].isdecimal()):
            raise ValueError("MLflow keeps latest, v1, v2 and so on for versions: choose another alias")
        return alias


class ServingConfig(ConfigSection):
    """How `ddpm serve` answers: where, with how many replicas of a model, and how much it accepts."""

    name: Name = Field(
        "ddpm", description="name of the Ray Serve application; a cluster has one application of each name"
    )
    prefix: Annotated[str, Field(pattern=r"^/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?$")] = Field(
        "/", description="path of the URL below which the server answers, without a slash at its end"
    )
    host: Annotated[str, Field(pattern=r"^[^:/ ]+$")] = Field(
        "127.0.0.1", description="network interface that the server listens on, by IPv4; 0.0.0.0: all of them"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="port that the server listens on; 0: any that is free"
    )
    token_file: str | None = Field(
        None, description="file with the bearer token; null: DDPM_SERVE_TOKEN, else one that is made on first use"
    )
    replicas: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1, description="processes that hold each model; [min, max]: as many as the requests need"
    )
    cpus_per_replica: NonNegativeFloat = Field(1, description="processors that Ray reserves for each replica")
    gpus_per_replica: NonNegativeFloat = Field(0, description="GPUs of each replica; 0.5: two of them share one")
    batch_size: PositiveInt = Field(64, description="most pictures that are drawn together in one batch")
    batch_wait_ms: NonNegativeFloat = Field(
        5, description="milliseconds that a request waits for others to be drawn with it"
    )
    follow_s: PositiveFloat = Field(5, description="seconds between looks whether an alias has moved")
    patience_s: PositiveFloat = Field(
        60, description="seconds for which a request is tried again when its replica dies"
    )
    max_pictures: PositiveInt = Field(64, description="most pictures that one request may ask for")
    max_steps: PositiveInt = Field(2_500, description="most network evaluations that a request may ask for per picture")
    max_prompt: PositiveInt = Field(2_000, description="most characters of a prompt")
    max_body_mib: PositiveFloat = Field(16, description="largest size of a request, in MiB")
    max_answer_mib: PositiveFloat = Field(
        64, description="largest size of an answer's pixels before compression, in MiB"
    )
    max_megapixels: PositiveFloat = Field(16, description="largest size of a picture in a request, in megapixels")
    max_total_megapixels: PositiveFloat = Field(
        64, description="largest size of all pictures and masks of a request together, in megapixels"
    )
    max_queue: PositiveInt = Field(256, description="most requests to a model that wait or are drawn at a time")
    body_s: PositiveFloat = Field(30, description="seconds in which a request must have arrived completely")

    @model_validator(mode="after")
    def _ordered(self) -> ServingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"replicas must be [min, max] with min <= max, got {list(self.replicas)}")  # type: ignore[arg-type]
        return self

    @property
    def min_replicas(self) -> int:
        """Fewer never run."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def max_replicas(self) -> int:
        """More are not asked for."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]
