"""The sections of a configuration that are about trained models: scores, registry, serving."""

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
from pipelines.config.sections import Name, Seed

MODEL_NAME = r"[^/:@'\\\x00-\x1f\x7f]+"
"""Names of registered models: without the separators of a MODEL reference, and without characters that MLflow's filters
cannot quote."""
MODEL_NAME_RULE = "the name of a model has no / : @ ' or \\ in it, and no control character"
CANDIDATE = "candidate"
"""Alias of the newest version of a registered model; nothing guards it."""
PREVIOUS = "previous"
"""Alias of the version that had the guarded alias before; nothing guards it."""


class EvaluationConfig(ConfigSection):
    """Evaluation of samples."""

    n: Annotated[int, Field(ge=2)] | None = Field(
        None, description="samples per noise seed; null: as many as the test split has. Papers use 50_000"
    )
    seed: Seed = Field(1, description="first noise seed of the samples")
    seeds: PositiveInt = Field(3, description="number of noise seeds; scores are means over them, with their spread")
    batch_size: PositiveInt = Field(90, description="images per network batch while samples are drawn")
    actors: PositiveInt | None = Field(
        None,
        description="sampling processes, each with a CPU or GPU of the Ray cluster; null: as many as the cluster has",
    )
    likelihood_images: NonNegativeInt = Field(
        32,
        le=256,
        description="test images whose bits per dimension are computed, with the bound and with the ODE; 0: none",
    )
    evaluator: Literal["auto", "classifier", "contrastive", "inception", "encoder"] = Field(
        "auto",
        description="network that computes features; auto: the dataset's own classifier, or contrastive for data "
        "without labels",
    )
    evaluator_passes: PositiveInt | None = Field(
        None,
        description="passes over its images in the training of the dataset's own evaluator, if it is not trained yet; "
        "null: 40 for classifier, 20 for contrastive",
    )
    weights: str | None = Field(None, description="path or address of the network of evaluator=inception or encoder")
    encoder_size: PositiveInt | None = Field(
        None,
        description="input size of evaluator=encoder, in pixels; null: the value in its folder, else 224",
    )
    encoder_mean: tuple[float, ...] | None = Field(
        None,
        description="mean per channel of pixels in [0, 1], subtracted; null: the value in the folder, else ImageNet's",
    )
    encoder_std: tuple[PositiveFloat, ...] | None = Field(
        None,
        description="divisor of pixels per channel; null: the value in the folder, else ImageNet's",
    )
    every: PositiveInt | None = Field(
        None, description="images between checkpoints that are published and scored during training; null: none"
    )
    wait_s: Annotated[float, Field(ge=10)] = Field(
        3600, description="seconds that a finished training waits for running evaluations"
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
    """Name of the registered model, alias that the gate guards, signing key and trusted keys."""

    model: str = Field(description="name of the registered model; default: the name of the run")
    alias: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        "champion", description="alias that the gate guards: only a version that passes gets it"
    )
    n: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="samples per version that the gate compares; null: 5,000, or 20 per feature if that is more",
    )
    signing_key: str | None = Field(
        None, description="private key (PEM) that signs versions and verdicts; null: a key that is made on first use"
    )
    signing_certificate: str | None = Field(None, description="certificate (PEM) of the signing key")
    signing_chain: tuple[str, ...] = Field(
        (), description="certificates (PEM) between the signing certificate and its root"
    )
    trusted_keys: tuple[str, ...] = Field(
        (), description="trusted public keys (PEM); without keys and certificates: the public half of signing_key"
    )
    trusted_certificates: tuple[str, ...] = Field((), description="trusted root certificates (PEM)")
    trusted_evaluators: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(
        (), description="SHA-256 of evaluator records that are trusted without a trusted signature"
    )
    forgotten: Literal["refuse", "warn"] = Field(
        "refuse",
        description="what the gate does with a version that had been given a picture which is to be forgotten",
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
    """Serving with `ddpm serve`: address, replicas, and limits on requests."""

    name: Name = Field(
        "ddpm", description="name of the Ray Serve application; a cluster has one application of each name"
    )
    prefix: Annotated[str, Field(pattern=r"^/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?$")] = Field(
        "/", description="URL path prefix of the server, without a trailing slash"
    )
    host: Annotated[str, Field(pattern=r"^[^:/ ]+$")] = Field(
        "127.0.0.1", description="IPv4 address that the server listens on; 0.0.0.0: all interfaces"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="port that the server listens on; 0: any free port"
    )
    token_file: str | None = Field(
        None, description="file with the bearer token; null: DDPM_SERVE_TOKEN, else a token that is made on first use"
    )
    replicas: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1, description="replicas of each model; [min, max]: scaled with the number of requests"
    )
    cpus_per_replica: NonNegativeFloat = Field(1, description="CPUs that Ray reserves for each replica")
    gpus_per_replica: NonNegativeFloat = Field(0, description="GPUs per replica; 0.5: two replicas share one")
    batch_size: PositiveInt = Field(64, description="largest number of pictures in one network batch")
    batch_wait_ms: NonNegativeFloat = Field(
        5, description="milliseconds that a request waits to be batched with others"
    )
    follow_s: PositiveFloat = Field(5, description="seconds between checks whether an alias has moved")
    patience_s: PositiveFloat = Field(60, description="seconds for which a request is retried when its replica dies")
    max_pictures: PositiveInt = Field(64, description="largest number of pictures per request")
    max_steps: PositiveInt = Field(2_500, description="largest number of network evaluations per picture")
    max_prompt: PositiveInt = Field(2_000, description="largest number of characters of a prompt")
    max_body_mib: PositiveFloat = Field(16, description="largest size of a request, in MiB")
    max_answer_mib: PositiveFloat = Field(
        64, description="largest size of a response's pixels before compression, in MiB"
    )
    max_megapixels: PositiveFloat = Field(16, description="largest size of a picture in a request, in megapixels")
    max_total_megapixels: PositiveFloat = Field(
        64, description="largest size of all pictures and masks of a request together, in megapixels"
    )
    max_queue: PositiveInt = Field(
        256, description="largest number of requests to a model that wait or are being drawn"
    )
    body_s: PositiveFloat = Field(30, description="seconds within which a request must have arrived completely")

    @model_validator(mode="after")
    def _ordered(self) -> ServingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"replicas must be [min, max] with min <= max, got {list(self.replicas)}")  # type: ignore[arg-type]
        return self

    @property
    def min_replicas(self) -> int:
        """Smallest number of replicas."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def max_replicas(self) -> int:
        """Largest number that is requested."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]
