"""Facts about a source and a machine, and the plan that is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.config import override_value


@dataclass(frozen=True)
class Mirror:
    """Accuracy with which a small network distinguishes images from their mirror images.

    Attributes:
        accuracy: share of held-out images that it recognized as the original, 0..1; 0.5 is guessing.
        pairs: number of held-out images.
    """

    accuracy: float
    pairs: int

    @property
    def highest(self) -> float:
        """Upper end of the 95 % interval of the accuracy (Wilson 1927)."""
        if not self.pairs:
            return 1.0
        z, n, p = 1.96, self.pairs, self.accuracy
        centre = p + z * z / (2 * n)
        return (centre + z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5) / (1 + z * z / n)


@dataclass(frozen=True)
class SourceFacts:
    """Facts about a source of images.

    Attributes:
        source: absolute address, see `pipelines.shards.ingest.sources.absolute`.
        images: number of images in the listing, all splits together.
        test_images: number of images in the test split.
        class_counts: class name -> number of images; empty without labels.
        captions: number of images with a caption.
        shorter_sides: 10 %, 50 % and 90 % quantiles of the shorter side in pixels, of the opened images.
        one_size: (width, height) if equal for all opened images; else None.
        grey: whether all opened images are grey.
        opened: number of opened images.
        unreadable: number of opened images that could not be read.
        write_s: seconds in which one process reads an image and writes it to a shard.
        mirror: accuracy of distinguishing images from their mirror images, given their class.
        names_sides: whether captions name left or right.
        encoder: hub name or folder of a text encoder that can be loaded here; None if there is none or none is needed.
        encoder_width: width of its embeddings.
        caption_s: seconds to embed one caption.
    """

    source: str
    images: int
    test_images: int
    class_counts: Mapping[str, int]
    captions: int
    shorter_sides: tuple[int, int, int]
    one_size: tuple[int, int] | None
    grey: bool
    opened: int
    unreadable: int = 0
    write_s: float = 0.002
    mirror: Mirror = Mirror(0.5, 0)
    names_sides: bool = False
    encoder: str | None = None
    encoder_width: int = 0
    caption_s: float = 0.0

    @property
    def train_images(self) -> int:
        """Number of images outside the test split."""
        return self.images - self.test_images

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SourceFacts:
        """Return the facts from JSON types."""
        sides, size = tuple(plain["shorter_sides"]), plain["one_size"]
        own = {**plain, "shorter_sides": sides, "one_size": tuple(size) if size else None}
        return cls(**{**own, "mirror": Mirror(**plain["mirror"])})


@dataclass(frozen=True)
class Speed:
    """Measured speed of one network at one image size, per process while every GPU or core runs one.

    Attributes:
        train: training images per second of one worker.
        draw: network evaluations per second of one process, each of one image.
        evaluate: the same in float32, as used for likelihoods.
        parameters: number of parameters of the network.
        piece: images per step at which `train` was measured.
        step_s: seconds of a step independent of its number of images; 0 if none were found.
    """

    train: float
    draw: float
    evaluate: float
    parameters: int
    piece: int = 1
    step_s: float = 0.0

    def train_in_steps_of(self, images: float) -> float:
        """Return training images per second of one worker with this many images per step.

        The time of a step grows linearly with its images; more than `piece` images are processed in several parts.
        """
        if not self.step_s:
            return self.train
        count = min(images, self.piece)
        return count / (self.step_s + count * (1 / self.train - self.step_s / self.piece))

    def times(self, training: float, drawing: float) -> Speed:
        """Return the speed with training and drawing multiplied by these factors."""
        train, draw, evaluate = training * self.train, drawing * self.draw, drawing * self.evaluate
        return replace(self, train=train, draw=draw, evaluate=evaluate, step_s=self.step_s / training)


@dataclass(frozen=True)
class MachineFacts:
    """Facts about the machine or cluster that trains.

    Attributes:
        where: description, such as "this machine" or "the Ray cluster at ADDRESS".
        cores: CPU cores available to workers.
        gpus: GPUs available to workers.
        precision: precision of the forward and backward pass.
        speeds: key of a candidate -> speed; candidates that are too slow or too large are missing.
        judge_step_s: image size, as settings are given it -> seconds of one step of the training of the evaluator.
        together: speed of a core while all cores compute, relative to a single busy core; cores that are two threads of
        one physical core share it.
        start_s: seconds until the required services answer.
        looking_s: seconds that examining the source and measuring took, without waiting for a busy cluster.
    """

    where: str
    cores: int
    gpus: int
    precision: str
    speeds: Mapping[str, Speed]
    judge_step_s: Mapping[str, float]
    together: float = 1.0
    start_s: float = 0.0
    looking_s: float = 0.0

    def times(self, training: float, drawing: float, judging: float) -> MachineFacts:
        """Return the facts with the speeds of training, drawing and evaluator training multiplied by these factors."""
        speeds = {key: speed.times(training, drawing) for key, speed in self.speeds.items()}
        judge = {size: seconds / judging for size, seconds in self.judge_step_s.items()}
        return replace(self, speeds=speeds, judge_step_s=judge)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> MachineFacts:
        """Return the facts from JSON types."""
        speeds = {key: Speed(**speed) for key, speed in plain["speeds"].items()}
        return cls(**{**plain, "speeds": speeds})


@dataclass(frozen=True)
class PlanLine:
    """One choice of a plan.

    Attributes:
        title: what is chosen, in a word or two.
        settings: fields and groups of the configuration that it sets, without those set by the user.
        value: the choice in words.
        reason: why.
    """

    title: str
    settings: Mapping[str, Any]
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A proposed configuration and its reasons.

    Attributes:
        budget_s: seconds for everything, from the command to the registered version.
        lines: choices in display order.
        seconds: stage -> seconds; they add up to at most the budget.
        images: length of the training.
        network: key of the chosen candidate.
        warnings: warnings for the user before the start.
    """

    budget_s: float
    lines: tuple[PlanLine, ...]
    seconds: Mapping[str, float]
    images: int
    network: str
    warnings: tuple[str, ...] = ()

    @property
    def total_s(self) -> float:
        """Expected seconds of everything."""
        return sum(self.seconds.values())

    @property
    def settings(self) -> dict[str, Any]:
        """Every field and group that the plan sets."""
        return {key: value for line in self.lines for key, value in line.settings.items()}

    def overrides(self) -> list[str]:
        """Return the settings as Hydra overrides: groups first, because they set fields too."""
        settings = sorted(self.settings.items(), key=lambda item: "." in item[0])
        return [f"{key}={override_value(value)}" for key, value in settings]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {**asdict(self), "total_s": self.total_s, "overrides": self.overrides()}


@dataclass(frozen=True)
class UserOverrides:
    """The settings that the user has given, which a plan does not change.

    Attributes:
        settings: field or group -> value.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str, otherwise: Any) -> Any:
        """Return the user's value of a field, or `otherwise`."""
        return self.settings.get(key, otherwise)

    def sets(self, key: str) -> bool:
        """Return whether the user has set a field, or chosen the group that it belongs to."""
        group = key.partition(".")[0]
        return key in self.settings or group in self.settings

    def sets_network(self) -> bool:
        """Return whether the user has set anything about the network itself."""
        conditions = ("class_conditional", "text_dim", "inpainting", "learned_variance")
        own = {f"model.{name}" for name in conditions}
        return any(key == "model" or (key.startswith("model.") and key not in own) for key in self.settings)

    def line(self, title: str, settings: Mapping[str, Any], value: str, reason: str) -> PlanLine:
        """Return a line of the plan without what the user has set, and saying so."""
        own = {key: it for key, it in settings.items() if not self.sets(key)}
        if len(own) == len(settings):
            return PlanLine(title, own, value, reason)
        chosen = {key: it for key, it in self.settings.items() if key in settings or key in _groups(settings)}
        text = ", ".join(f"{key}={override_value(it)}" for key, it in chosen.items())
        return PlanLine(title, own, text if not own else f"{value}; {text}", "set by hand")


def _groups(settings: Mapping[str, Any]) -> set[str]:
    return {key.partition(".")[0] for key in settings}
