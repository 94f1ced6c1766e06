"""What a plan is made of and what it is: facts about a source and a machine, and the lines of the proposal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.config import override_value


@dataclass(frozen=True)
class Mirror:
    """How well a small network that was trained for it tells images from their mirror images.

    Attributes:
        accuracy: share of held-out images that it preferred to their mirror images, 0..1; 0.5 is guessing.
        pairs: number of held-out images.
    """

    accuracy: float
    pairs: int

    @property
    def highest(self) -> float:
        """The upper end of the accuracy's 95 % interval (Wilson 1927)."""
        if not self.pairs:
            return 1.0
        z, n, p = 1.96, self.pairs, self.accuracy
        centre = p + z * z / (2 * n)
        return (centre + z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5) / (1 + z * z / n)


@dataclass(frozen=True)
class SourceFacts:
    """What a source of images was found to hold.

    Attributes:
        source: as it is named in every folder, see `pipelines.shards.ingest.sources.absolute`.
        images: number of images that are listed, all splits together.
        test_images: those of them in the test split.
        class_counts: class name -> number of images; empty without labels.
        captions: number of images with a caption.
        shorter_sides: the 10 %, 50 % and 90 % quantiles of the shorter side in pixels, of the images that were opened.
        one_size: (width, height) where all opened images have the same; None where they differ.
        grey: whether no opened image has a colour.
        opened: number of images that were opened.
        unreadable: number of those that could not be read.
        write_s: seconds in which one process reads an image and writes it to a shard.
        mirror: whether images can be told from their mirror images, given their class.
        names_sides: whether captions name left or right.
        encoder: hub name or folder of the text encoder that can be loaded here; None where none can or none is needed.
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
    """The measured speed of one network at one image size, of one process while every GPU, or core, has one.

    Attributes:
        train: images that one worker trains on in a second.
        draw: images for which one process evaluates the network in a second, as sampling does many times an image.
        evaluate: the same in float32, as likelihoods are computed.
        parameters: of the network.
        piece: images of the steps whose speed `train` is.
        step_s: seconds that a step takes whatever the number of its images; 0 where images take all of the time.
    """

    train: float
    draw: float
    evaluate: float
    parameters: int
    piece: int = 1
    step_s: float = 0.0

    def train_in_steps_of(self, images: float) -> float:
        """Return images that one worker trains on in a second where it has so many in a step.

        The time of a step grows linearly with its images; more than `piece` are computed in several parts.
        """
        if not self.step_s:
            return self.train
        count = min(images, self.piece)
        return count / (self.step_s + count * (1 / self.train - self.step_s / self.piece))

    def times(self, training: float, drawing: float) -> Speed:
        """Return the speed on a machine that trains and draws so many times as fast."""
        train, draw, evaluate = training * self.train, drawing * self.draw, drawing * self.evaluate
        return replace(self, train=train, draw=draw, evaluate=evaluate, step_s=self.step_s / training)


@dataclass(frozen=True)
class MachineFacts:
    """What the machine or cluster that trains was found to do.

    Attributes:
        where: in words, such as "this machine" or "the Ray cluster at ADDRESS".
        cores: CPU cores that workers can have.
        gpus: GPUs that workers can have.
        precision: what forward and backward compute in.
        speeds: key of a candidate -> speed; candidates that were too slow or too large are missing.
        judge_step_s: image size -> seconds of one step of the training of the evaluator.
        together: speed of a core while all of them compute, relative to one alone; cores that are two threads of one
            unit share it.
        start_s: seconds until the services that are needed answer.
        looking_s: seconds that looking at the source and measuring took, without the wait for a busy cluster.
    """

    where: str
    cores: int
    gpus: int
    precision: str
    speeds: Mapping[str, Speed]
    judge_step_s: Mapping[int, float]
    together: float = 1.0
    start_s: float = 0.0
    looking_s: float = 0.0

    def times(self, training: float, drawing: float, judging: float) -> MachineFacts:
        """Return the facts of a machine that trains, draws and trains evaluators so many times as fast."""
        speeds = {key: speed.times(training, drawing) for key, speed in self.speeds.items()}
        judge = {size: seconds / judging for size, seconds in self.judge_step_s.items()}
        return replace(self, speeds=speeds, judge_step_s=judge)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> MachineFacts:
        """Return the facts from JSON types."""
        speeds = {key: Speed(**speed) for key, speed in plain["speeds"].items()}
        judge = {int(size): seconds for size, seconds in plain["judge_step_s"].items()}
        return cls(**{**plain, "speeds": speeds, "judge_step_s": judge})


@dataclass(frozen=True)
class PlanLine:
    """One choice of a plan.

    Attributes:
        title: what is chosen, in a word or two.
        settings: the configuration's fields and groups that it sets; those that the user sets are left out.
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
        budget_s: the time for everything, from the command to the registered version.
        lines: the choices, in the order in which they are shown.
        seconds: what the time is for -> seconds; they add up to at most the budget.
        images: length of the training.
        network: key of the chosen candidate.
        warnings: what the user should know before it starts.
    """

    budget_s: float
    lines: tuple[PlanLine, ...]
    seconds: Mapping[str, float]
    images: int
    network: str
    warnings: tuple[str, ...] = ()

    @property
    def total_s(self) -> float:
        """Seconds that everything is expected to take."""
        return sum(self.seconds.values())

    @property
    def settings(self) -> dict[str, Any]:
        """Every field and group that the plan sets."""
        return {key: value for line in self.lines for key, value in line.settings.items()}

    def overrides(self) -> list[str]:
        """Return the settings as Hydra overrides: groups first, because they bring fields of their own."""
        settings = sorted(self.settings.items(), key=lambda item: "." in item[0])
        return [f"{key}={override_value(value)}" for key, value in settings]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {**asdict(self), "total_s": self.total_s, "overrides": self.overrides()}


@dataclass(frozen=True)
class UserOverrides:
    """What the user has set, which the plan leaves as it is.

    Attributes:
        settings: field or group -> value.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str, otherwise: Any) -> Any:
        """Return the user's value of a field, else the other one."""
        return self.settings.get(key, otherwise)

    def sets(self, key: str) -> bool:
        """Return whether the user has set a field, or chosen the group that it belongs to."""
        group = key.partition(".")[0]
        return key in self.settings or group in self.settings

    def sets_network(self) -> bool:
        """Return whether the user has chosen anything of the network itself."""
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
