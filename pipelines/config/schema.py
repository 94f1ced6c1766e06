"""The complete, validated and frozen configuration of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ddpm.models import NETWORKS, UNNAMED_NETWORK, UNetConfig
from ddpm.timesteps import TIMESTEPS
from pipelines.config.choices import ConfigSection
from pipelines.config.launch import LaunchConfig
from pipelines.config.model_sections import EvaluationConfig, RegistryConfig, ServingConfig
from pipelines.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    Name,
    OptimConfig,
    Seed,
    StorageConfig,
    TrackingConfig,
)

if TYPE_CHECKING:  # made when the program runs, which a type checker does not see
    GuidanceConfig: TypeAlias = Any
    ModelConfig: TypeAlias = Any
    ObjectiveConfig: TypeAlias = Any
    SamplerConfig: TypeAlias = Any
    ScheduleConfig: TypeAlias = Any
else:
    from pipelines.config.choices import (
        GuidanceConfig,
        ModelConfig,
        ObjectiveConfig,
        SamplerConfig,
        ScheduleConfig,
    )

_FIRST = frozenset(
    ["task", "init_from", "seed", "batch_size", "images"]
    + [f"data.{name}" for name in ("image_size", "channels", "num_classes", "lanes", "window", "flip")]
    + [f"model.{name}" for name in ("channels", "layers_per_block", "attention", "head_dim", "norm_groups")]
    + [f"model.{name}" for name in ("scale_shift", "dropout", "class_conditional", "text_dim", "inpainting")]
    + [f"model.{name}" for name in ("learned_variance",)]
    + [f"schedule.{name}" for name in ("kind", "num_steps", "zero_terminal_snr", "log_snr_shift")]
    + [f"schedule.{name}" for name in ("beta_start", "beta_end", "s", "start", "end", "tau")]
    + [f"objective.{name}" for name in ("prediction", "loss", "weight", "min_snr_gamma", "vlb_weight")]
    + [f"objective.{name}" for name in ("timesteps", "label_drop", "mask")]
    + [f"optim.{name}" for name in ("lr", "betas", "weight_decay", "warmup_images", "decay", "decay_images")]
    + [f"optim.{name}" for name in ("grad_clip", "ema_half_life", "power_ema", "precision")]
)
"""Fields that are always part of an identity: those of the first release."""
_FIRST_KINDS = frozenset(["unet", "linear", "cosine", "sigmoid", "uniform", "min_snr", "stratified", "importance"])
"""Kinds of the first release, whose identities keep their original fields."""

FORMER_DEFAULTS = {"objective.prediction": "eps"}
"""Former defaults of fields that decide a run's loss trace and have another default now."""


class Config(ConfigSection):
    """The complete configuration of one run."""

    name: Name = Field(description="name of the run; a second training of the same name resumes it")
    task: Literal["denoiser", "classifier"] = Field(
        "denoiser",
        description="network to train: the model, or a classifier of noisy images for classifier guidance, of classes "
        "or, with model.text_dim, of captions",
    )
    init_from: str | None = Field(
        None, description="MODEL reference to the initial weights of a new run; null: random weights"
    )
    seed: Seed = Field(0, description="seed of the sample order, noise, timesteps and initial weights")
    images: PositiveInt = Field(le=10**15, description="length of the training in images seen, repetitions included")
    training_s: PositiveFloat | None = Field(
        None,
        description="seconds of training steps after which the run ends; `images` is then a first guess, which is "
        "corrected by the measured speed during training; null: the run ends after `images`",
    )
    batch_size: PositiveInt = Field(description="images per training step, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        None, description="largest number of images that a worker processes at once, to limit memory; null: no limit"
    )
    data: DataConfig
    model: ModelConfig = Field(description="The network. Its channels and number of classes follow from the data.")
    schedule: ScheduleConfig = Field(description="Noise level after each step of the forward process.")
    objective: ObjectiveConfig
    guidance: GuidanceConfig
    sampler: SamplerConfig = Field(description="Sampler that draws images from the trained model.")
    optim: OptimConfig
    cluster: ClusterConfig
    storage: StorageConfig
    tracking: TrackingConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    registry: RegistryConfig
    serving: ServingConfig = ServingConfig.model_validate({})
    launch: LaunchConfig | None = Field(None, description="cluster of `ddpm launch`; not part of a run")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.batch_size % self.data.lanes:
            raise ValueError(f"data.lanes = {self.data.lanes} must divide batch_size = {self.batch_size}")
        if self.cluster.max_workers > self.batch_size:
            raise ValueError(
                f"cluster.num_workers = {self.cluster.max_workers} exceeds batch_size = {self.batch_size}: "
                "a worker would have no image; raise batch_size or use fewer workers"
            )
        pure_noise = "schedule.kind = flow" if self.schedule.kind == "flow" else "schedule.zero_terminal_snr"
        if self.objective.prediction == "eps" and (self.schedule.kind == "flow" or self.schedule.zero_terminal_snr):
            raise ValueError(
                f"objective.prediction = eps cannot be used with {pure_noise}: eps does not determine the image where "
                "there is no signal; use objective.prediction=v or flow"
            )
        if self.model.learned_variance != (self.objective.loss == "hybrid") and self.objective.loss != "vlb":
            raise ValueError(
                f"objective.loss = {self.objective.loss} and model.learned_variance = {self.model.learned_variance} do "
                "not fit: hybrid trains a learned variance, simple trains none; use hybrid with "
                "model.learned_variance=true, or simple with false"
            )
        if self.sampler.steps > self.schedule.num_steps:
            raise ValueError(
                f"sampler.steps = {self.sampler.steps} exceeds schedule.num_steps = {self.schedule.num_steps}"
            )
        self._check_task()
        self._check_loss()
        self._check_consistency()
        self._check_evaluation()
        return self

    def _check_loss(self) -> None:
        """Raise if the loss is incompatible with its timesteps, noise or learned weight."""
        objective = self.objective
        if objective.learned_weight and objective.loss != "simple":
            raise ValueError(
                f"objective.learned_weight = True weights a squared error by noise level, and objective.loss = "
                f"{objective.loss} is not one: use objective.loss=simple, or objective.learned_weight=false"
            )
        if objective.loss in ("hybrid", "vlb") and objective.noise_candidates > 1:
            raise ValueError(
                f"objective.noise_candidates = {objective.noise_candidates} chooses noise by the image, and "
                f"objective.loss = {objective.loss} is a bound for noise that is independent of it: use "
                "objective.loss=simple, or objective.noise_candidates=1"
            )
        if objective.loss in ("hybrid", "vlb") and not getattr(TIMESTEPS[objective.timesteps], "unbiased", True):
            raise ValueError(
                f"objective.timesteps = {objective.timesteps} makes the noise levels part of the objective, and "
                f"objective.loss = {objective.loss} has to be a mean over all of them: use uniform, stratified, "
                "low_discrepancy or importance, or objective.loss=simple"
            )

    def _check_consistency(self) -> None:
        objective, model = self.objective, self.model
        if objective.loss != "consistency":
            return
        if self.training_s is not None:
            raise ValueError(
                f"training_s = {self.training_s:g} leaves the length open, and the stages of objective.loss = "
                "consistency are parts of it: set images, and training_s=null"
            )
        if self.init_from is None:
            raise ValueError(
                "objective.loss = consistency tunes a trained model, and none is named: set init_from=MODEL, such as "
                "runs:/ID or models:/NAME@alias"
            )
        unused = {"objective.weight": objective.weight, "objective.timesteps": objective.timesteps}
        for name, value in unused.items():
            if value != "uniform":
                raise ValueError(
                    f"{name} = {value} has no effect with objective.loss = consistency, which draws its levels by "
                    "objective.consistency_p_mean and objective.consistency_p_std: leave it at uniform"
                )
        scale = objective.consistency_guidance
        if scale not in (None, 1) and not (model.class_conditional or model.text_dim):
            raise ValueError(
                f"objective.consistency_guidance = {scale:g} guides by class or text, and the model has neither: "
                "set it to 1 or null"
            )

    def _check_evaluation(self) -> None:
        every, keep_best = self.evaluation.every, self.checkpoint.keep_best
        if every is not None and self.task == "classifier":
            raise ValueError("evaluation.every scores samples, and task = classifier draws none: leave it at null")
        if keep_best is not None and every is None:
            raise ValueError("checkpoint.keep_best selects by scores, and nothing is scored: set evaluation.every")
        if keep_best is not None and self.optim.power_ema:
            raise ValueError(
                "checkpoint.keep_best would delete the snapshots that optim.power_ema is reconstructed from: "
                "set checkpoint.keep_best=null, or optim.power_ema=[]"
            )

    def _check_task(self) -> None:
        model, objective = self.model, self.objective
        if model.class_conditional and not self.data.num_classes:
            raise ValueError(
                "model.class_conditional = True needs labels, and data.num_classes = 0: "
                "set model.class_conditional=false, or use data with classes"
            )
        if self.task == "denoiser":
            return
        if not self.data.num_classes and not model.text_dim:
            raise ValueError(
                "task = classifier learns classes, and data.num_classes = 0: use data with labels, or set "
                "model.text_dim to learn captions"
            )
        if not issubclass(NETWORKS[model.kind], UNetConfig):
            raise ValueError(
                f"task = classifier is built on the UNet: use model.kind=unet, got model.kind = {model.kind}"
            )
        denoiser_only = {
            "init_from": self.init_from is not None,
            "model.inpainting": model.inpainting,
            "model.learned_variance": model.learned_variance,
            "objective.loss": objective.loss != "simple",
            "objective.weight": objective.weight != "uniform",
            "objective.learned_weight": objective.learned_weight,
            "objective.noise_candidates": objective.noise_candidates > 1,
        }
        wrong = [name for name, is_set in denoiser_only.items() if is_set]
        if wrong:
            raise ValueError(f"task = classifier does not use {', '.join(wrong)}: leave them at their defaults")

    def portable(self) -> Config:
        """This configuration without the addresses of the local stack, which may have changed when it is read again."""
        if not self.storage.local_stack:
            return self
        storage = self.storage.model_copy(update={"endpoint_url": None, "credentials_file": None})
        tracking = self.tracking.model_copy(update={"uri": None})
        cluster = self.cluster.model_copy(update={"address": None})
        return self.model_copy(update={"storage": storage, "tracking": tracking, "cluster": cluster})

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the loss trace, flat; a run resumes only with the same identity.

        A field that was added later is left out while it has its default, which changes nothing; of a kind that was
        added later, all fields are included.
        """
        data = self.model_dump(
            mode="json",
            include={"data": {"image_size", "channels", "num_classes", "lanes", "window", "flip"}},
        )
        if self.data.sources:
            mixed = [{"name": source.name, "weight": source.weight} for source in self.data.sources]
            data["data"]["sources"] = json.loads(json.dumps(mixed))
        decisive = {"task", "init_from", "seed", "batch_size", "model", "schedule", "objective", "optim"}
        rest = self.model_dump(mode="json", include=decisive, exclude={"optim": {"max_skipped"}})
        consistency = self.objective.loss == "consistency"  # its stages are parts of the run
        length = {"images": self.images} if self.optim.decay in ("linear", "cosine") or consistency else {}
        flat = flatten({**rest, **data, **length})
        later = {self.objective.weight, self.objective.timesteps} - _FIRST_KINDS
        whole = tuple(f"objective.{kind}_" for kind in later) + (("objective.consistency_",) if consistency else ())
        whole += ("objective.learned_weight_",) if self.objective.learned_weight else ()
        whole += ("optim.muon_",) if self.optim.kind == "muon" else ()
        whole += tuple(f"{name}." for name in ("model", "schedule") if getattr(self, name).kind not in _FIRST_KINDS)
        return {
            key: value
            for key, value in flat.items()
            if key in _FIRST or key.startswith(whole) or value != self._default(key)
        }

    def with_later_defaults(self, stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        """Return a stored configuration with the defaults of the fields that were added after it was stored.

        Args:
            stored: result of `model_dump` in this or an earlier release, possibly of some sections only.
            now: result of `model_dump` of this configuration.
        """
        found = dict(stored)
        for section, fields in now.items():
            if isinstance(fields, Mapping) and isinstance(stored.get(section), Mapping):
                later = {name: self._default(f"{section}.{name}") for name in fields.keys() - stored[section].keys()}
                found[section] = {**stored[section], **json.loads(json.dumps(later, default=str))}
        return found

    def _default(self, key: str) -> Any:
        """Return the default of SECTION.FIELD; for networks, that of the default kind."""
        if key == "model.kind":
            return UNNAMED_NETWORK
        section, _, field = key.partition(".")
        return type(getattr(self, section)).model_fields[field].default

    def digest(self) -> str:
        """SHA-256 of the whole resolved configuration."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
