"""The reference for samples of models: a dataset, its evaluator, and the features of its real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ddpm.model import ModelSpec
from pipelines.config import Config
from pipelines.evaluation.evaluators import Evaluator, open_evaluator, open_matcher
from pipelines.evaluation.prompts import Prompts, open_captions
from pipelines.evaluation.real import Real, open_real
from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
from pipelines.shards.index import Dataset, DatasetError, read_dataset
from pipelines.shards.quarantine import read_quarantine, stream_digest
from pipelines.storage import Storage


def same_labels(spec: ModelSpec, dataset: Dataset) -> bool:
    """Return whether labels of a dataset mean the same for a model.

    A model of a mixture has the classes of all sources, and first those of the dataset that judges it.
    """
    known = len(dataset.classes) if spec.lineage.get("sources") else len(spec.classes)
    return spec.classes[:known] == dataset.classes


def _connected() -> None:
    """Do nothing, in a process that is connected to the Ray cluster."""


@dataclass(frozen=True)
class EvaluationData:
    """The reference for samples of the models of a dataset; each part is opened and verified on first use.

    What nobody has made yet is made then: an evaluator is trained, and the real images are encoded.

    Attributes:
        dataset: whose images samples are compared with.
        config: names the evaluator, who signs and who is believed.
        connect: connects this process to the Ray cluster; called only where something has to be computed.
        notice: called with lines for the user.
        progress: of encoding the real images.
    """

    dataset: Dataset
    config: Config
    connect: Callable[[], object] = _connected
    notice: Notice = no_notice
    progress: Progress = no_progress

    @property
    def storage(self) -> Storage:
        """Reads and writes what is stored."""
        return Storage.of(self.config)

    @classmethod
    def of(
        cls,
        uri: str,
        config: Config,
        connect: Callable[[], object] = _connected,
        notice: Notice = no_notice,
        progress: Progress = no_progress,
    ) -> EvaluationData:
        """Return what judges samples of models of the dataset at an address.

        Raises:
            DatasetError: there is none.
        """
        return cls(read_dataset(uri, Storage.of(config)), config, connect, notice, progress)

    @cached_property
    def stream(self) -> str:
        """Digest of the dataset with its quarantine."""
        return stream_digest(self.dataset, read_quarantine(self.dataset.uri, self.storage))

    @cached_property
    def evaluator(self) -> Evaluator:
        """Maps images to features."""
        return open_evaluator(self.config, self.dataset, self.notice, connect=self.connect)

    @cached_property
    def matcher(self) -> Evaluator:
        """Says which caption fits an image."""
        return open_matcher(self.config, self.dataset, self.notice, connect=self.connect)

    @cached_property
    def real(self) -> Real:
        """The evaluator's features and predictions of the real images."""
        evaluator = self.evaluator
        self.connect()
        return open_real(self.dataset, evaluator, self.config, progress=self.progress, notice=self.notice)

    def prompts(self, spec: ModelSpec) -> Prompts | None:
        """Return the captions of test images that samples of a model are drawn from, and what judges samples by them.

        Returns:
            None for a model that is not conditioned on text, and for data without fitting captions.
        """
        width, classes = key = spec.network.text_dim, spec.classes
        if key not in self._prompts:
            found = open_captions(width, self.dataset, self.config, self.notice)
            labelled = bool(classes) and same_labels(spec, self.dataset)
            # Where all captions are the same, there is nothing to tell apart.
            matcher = self.matcher if found is not None and len(found[0].different[0]) > 1 else None
            self._prompts[key] = None if found is None else Prompts(*found, labelled, matcher)
        return self._prompts[key]

    @cached_property
    def _prompts(self) -> dict[tuple[int, tuple[str, ...]], Prompts | None]:
        """Those that were opened, by what of a model they depend on."""
        return {}

    def opened(self, spec: ModelSpec) -> EvaluationData:
        """Return this with all that judges samples of a model opened, to be sent to where no key is."""
        self.prompts(spec)
        sent = EvaluationData(self.dataset, self.config)
        opened = {"evaluator": self.evaluator, "real": self.real, "stream": self.stream, "_prompts": self._prompts}
        vars(sent).update(opened)
        return sent

    def check(self, spec: ModelSpec) -> None:
        """Check that samples of a model can be compared with the images of the dataset.

        Raises:
            DatasetError: they have another shape, or the labels of one mean something else for the other.
        """
        if spec.shape != (shape := self.dataset.shape):
            raise DatasetError(
                f"{self.dataset.uri} has images of shape {shape} and the model draws {spec.shape}: ingest the data at "
                "the model's size (data.image_size, data.channels), or name other data with data.uri"
            )
        if spec.classes and self.dataset.classes and not same_labels(spec, self.dataset):
            differing = [
                f"class {number} is {there!r} there and {here!r} in the model"
                for number, (here, there) in enumerate(zip(spec.classes, self.dataset.classes, strict=False))
                if here != there
            ] or [f"it has {len(self.dataset.classes)} classes and the model {len(spec.classes)}"]
            raise DatasetError(
                f"{self.dataset.uri} has other classes than the model: {differing[0]}; name other data with data.uri"
            )
