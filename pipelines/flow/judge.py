"""The stages that judge a trained run: the evaluator, its scores, its version in the registry, and the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from pipelines import checkpoints, registry, tracking
from pipelines.checkpoints import references
from pipelines.checkpoints.references import Resolved
from pipelines.config import CANDIDATE, sampling
from pipelines.evaluation.evaluators import (
    Evaluator,
    check_evaluator,
    evaluator_kind,
    find_evaluator,
    open_evaluator,
)
from pipelines.evaluation.scores import Scores
from pipelines.evaluation.scoring import find_scores, score_and_record
from pipelines.flow.stage import (
    EVALUATE,
    EVALUATOR,
    GATE,
    REGISTER,
    Results,
    Site,
    Stage,
    StageSpec,
    StageStatus,
    digest,
    there,
)
from pipelines.presentation.errors import PipelineError
from pipelines.registry import Gate, Verdict, check_signing
from pipelines.remote.tasks import alive_nodes
from pipelines.shards.quarantine import read_quarantine, stream_digest
from pipelines.storage import Storage, join, layout
from pipelines.tracking import ModelVersion
from pipelines.training import prepare
from pipelines.training.driver import TrainingResult
from pipelines.training.resources import connect_ray, has_room_beside
from pipelines.training.scoring import needs


@dataclass(frozen=True)
class MakeEvaluator(Stage[Evaluator]):
    """Train the evaluator of the dataset, where it is one that is trained on the dataset."""

    spec: ClassVar[StageSpec] = EVALUATOR
    on_ray: ClassVar[bool] = True

    @property
    def output(self) -> str:
        """Where evaluators that are trained on a dataset are stored."""
        return join(self.config.data.uri, layout.EVALUATORS)

    def inputs(self, site: Site, given: Results) -> dict[str, str]:
        """Return the digest of the data, and the kind of the evaluator."""
        dataset = there(given.dataset)
        return {"data": dataset.digest, "kind": evaluator_kind(self.config, dataset)}

    def check(self, site: Site, given: Results) -> None:
        """Check that there can be an evaluator for the dataset.

        Raises:
            ConfigError: there is none.
        """
        if given.dataset is not None:
            check_evaluator(self.config, given.dataset)

    def has_room(self, site: Site) -> bool:
        """Return whether the cluster has room for a task beside all workers of a training."""
        connect_ray(self.config)
        return has_room_beside(self.config.cluster, alive_nodes(), needs(self.config))

    def done(self, site: Site, given: Results, inputs: Mapping[str, str]) -> StageStatus[Evaluator]:
        """Look whether the evaluator is there: stored with the dataset, or loaded from `evaluation.weights`."""
        dataset = there(given.dataset)
        found = find_evaluator(self.config, dataset)
        if found is None:
            return StageStatus(None, f"{dataset.uri} has no evaluator ({inputs['kind']}) yet")
        return StageStatus(found, f"the evaluator ({found.kind}) is there already (digest {found.digest[:12]})")

    def run(self, site: Site, given: Results) -> Evaluator:
        """Train the evaluator in a Ray task, and store it."""
        return open_evaluator(
            self.config,
            there(given.dataset),
            lambda text: site.display.stage(self.name, text),
            connect=lambda: connect_ray(self.config),
        )


@dataclass(frozen=True)
class Evaluate(Stage[Scores]):
    """Score the newest published checkpoint of the run with the configuration's sampling settings."""

    spec: ClassVar[StageSpec] = EVALUATE

    @property
    def output(self) -> str:
        """Where scores are: among the artifacts of the MLflow run."""
        return f"{self.config.tracking.uri}, run '{self.config.name}', {layout.SCORES_RECORDED}/"

    def inputs(self, site: Site, given: Results) -> dict[str, str]:
        """Return the digests of the checkpoint, of the data that it is compared with, and of the settings."""
        dataset = there(given.dataset)
        return {
            "model": there(there(given.run).published).digest,
            "data": stream_digest(dataset, read_quarantine(dataset.uri, site.storage)),
            "settings": digest([sampling(self.config).key(), self.config.evaluation.model_dump(mode="json")]),
        }

    def check(self, site: Site, given: Results) -> None:
        """Check that samples of a model of the dataset can be judged.

        Raises:
            ConfigError: they cannot be.
        """
        if given.dataset is not None:
            check_evaluator(self.config, given.dataset)

    def done(self, site: Site, given: Results, inputs: Mapping[str, str]) -> StageStatus[Scores]:
        """Look whether the run has scores of this checkpoint with these settings, data and evaluator."""
        run = there(given.run)
        published = there(run.published)
        spec = checkpoints.published_spec(published, site.storage)
        scores = find_scores(run.tracker, spec, inputs["model"], sampling(self.config), self.config)
        if scores is None:
            return StageStatus(
                None, f"the model of {published.images_seen:,} images was not scored with these settings yet"
            )
        return StageStatus(scores, "this model was scored with these settings already")

    def run(self, site: Site, given: Results) -> Scores:
        """Draw samples on the Ray cluster and score them."""
        model, config = _loaded(there(given.run), site.storage), self.config
        return score_and_record(model, sampling(config), config, site.display, lambda: connect_ray(config))[0]


@dataclass(frozen=True)
class Register(Stage[ModelVersion]):
    """Register the scored checkpoint as a version of the configuration's model."""

    spec: ClassVar[StageSpec] = REGISTER

    @property
    def output(self) -> str:
        """Name of the registered model."""
        return f"models:/{self.config.registry.model}"

    def inputs(self, site: Site, given: Results) -> dict[str, str]:
        """Return the digests of the checkpoint and of its scores."""
        scores = digest(there(given.evaluation).to_plain())
        return {"model": there(there(given.run).published).digest, "scores": scores}

    def check(self, site: Site, given: Results) -> None:
        """Check that a version can be signed, and that the text encoder that it would carry is here.

        Raises:
            ConfigError, RegistryError: it cannot be.
        """
        check_signing(self.config.registry)
        if given.dataset is not None and self.config.model.text_dim:
            registry.bundled_encoder(prepare.encoder_lineage(self.config)["text_encoder"])

    def done(self, site: Site, given: Results, inputs: Mapping[str, str]) -> StageStatus[ModelVersion]:
        """Look whether a version has this checkpoint with these scores."""
        name, uri = self.config.registry.model, there(given.run).tracker.uri
        found = registry.find_version(uri, name, there(given.evaluation), inputs["model"])
        if found is None:
            return StageStatus(None, f"no version of {name} has this model with these scores")
        if not registry.is_candidate(uri, found):
            return StageStatus(None, f"version {found.version} of {name} lacks the alias {CANDIDATE}")
        return StageStatus(found, f"this model is {name} version {found.version} already")

    def run(self, site: Site, given: Results) -> ModelVersion:
        """Register the version, and say so on the page of its run, unless that was done."""
        resolved = _loaded(there(given.run), site.storage)
        uri = resolved.model.spec.lineage["dataset_uri"]
        return registry.register_once(resolved, there(given.evaluation), self.config, site.display, uri)


@dataclass(frozen=True)
class Promote(Stage[Verdict]):
    """Ask the gate whether the alias may move to the version."""

    spec: ClassVar[StageSpec] = GATE

    @property
    def output(self) -> str:
        """The alias."""
        return f"models:/{self.config.registry.model}@{self.config.registry.alias}"

    def inputs(self, site: Site, given: Results) -> dict[str, str]:
        """Return the digest of the weights and settings that the version serves."""
        return {"served": there(given.version).tags.get("served_digest", "")}

    def done(self, site: Site, given: Results, inputs: Mapping[str, str]) -> StageStatus[Verdict]:
        """Look whether the alias is at the version, by the gate's log and in MLflow, or was taken from it again."""
        gate, found = self.gate(site), there(given.version)
        version, verdict = found.version, gate.holds(found)
        if verdict is not None:
            return StageStatus(verdict, f"{gate.alias} is at version {version} already")
        taken = gate.taken(found)
        if taken is None:
            return StageStatus(None, f"{gate.alias} of {gate.model} is not at version {version}")
        reason = f"a rollback took {gate.alias} from version {version}"
        again = f"`ddpm promote {found.uri} --alias {gate.alias}` gives it back"
        verdict = Verdict(False, f"{reason} at {taken.at}; {again}", gate.model, gate.alias, version, at=taken.at)
        return StageStatus(verdict, reason)

    def run(self, site: Site, given: Results) -> Verdict:
        """Return the gate's verdict, by which the alias has moved or has not; a refusal is a result too.

        Where the data have changed since the champion was scored, it is scored again first. The version that this makes
        takes the alias, as the same model with evidence that can be compared.
        """
        gate, version = self.gate(site), there(given.version)
        champion = gate.incomparable(version)
        if champion is not None:
            try:
                gate.promote(self._scored_anew(champion, gate, site))
                # The version that this made is newer than the one that is to be judged, which stays the candidate.
                tracking.set_alias(gate.uri, self.config.registry.model, CANDIDATE, version.version)
            except PipelineError as error:
                site.display.stage(self.name, f"{champion.uri} cannot be scored again: {error}")
        return gate.promote(version)

    def _scored_anew(self, champion: ModelVersion, gate: Gate, site: Site) -> ModelVersion:
        """Score the model of the champion, with the settings that it serves, on the data of the configuration."""
        site.display.stage(self.name, f"{champion.uri} was scored on other data or otherwise: scoring it again")
        resolved = references.open_model(champion.uri, self.config)
        return registry.register_scored(
            resolved,
            resolved.model.spec.sampling,
            self.config,
            site.display,
            gate.connect,
            dataset_uri=self.config.data.uri,
        )

    def gate(self, site: Site) -> Gate:
        """Return the gate before the alias."""
        config = self.config
        name, alias = config.registry.model, config.registry.alias
        return Gate(config, site.display, lambda: connect_ray(config), name, alias)


def _loaded(run: TrainingResult, storage: Storage) -> Resolved:
    """Return the newest published checkpoint of a run, loaded."""
    return _resolved(f"runs:/{run.tracker.run_id}/{there(run.published).images_seen}", run.tracker.uri, storage)


@lru_cache(maxsize=1)
def _resolved(reference: str, tracking_uri: str, storage: Storage) -> Resolved:
    """Return a model, which two stages after each other want."""
    return references.resolve(reference, tracking_uri=tracking_uri, storage=storage)
