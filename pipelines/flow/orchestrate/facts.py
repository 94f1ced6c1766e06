"""Metadata for Dagster: addresses, digests and scores of a stage's result, and whether there are new data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.checkpoints import newest_checkpoint
from pipelines.config import Config
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.scores import Scores
from pipelines.flow.ingest import Ingest
from pipelines.flow.stage import Results, Site, digest, there
from pipelines.flow.train import for_data
from pipelines.presentation.progress import Silent
from pipelines.registry import Verdict
from pipelines.shards.index import Dataset
from pipelines.shards.joined import read_data
from pipelines.shards.quarantine import stream_digest
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion, links
from pipelines.training.driver import TrainingResult

Metadata = dict[str, Any]
"""Metadata in the form of `dagster_pipes`: plain values, or {"type": …, "raw_value": …}."""


@dataclass(frozen=True)
class DataChange:
    """Whether an experiment has data that none of its runs has seen.

    Attributes:
        digest: of the source's state and the settings of an ingest, without a source of the dataset; and of what is in
            quarantine.
        new: whether no run has seen these data.
        reason: in words.
    """

    digest: str
    new: bool
    reason: str


def data_change(config: Config) -> DataChange:
    """Check whether there are data that no run of an experiment has seen; nothing is started or written.

    Raises:
        PipelineError: there are no data, or they cannot be reached.
    """
    storage = Storage.of(config)
    found = Ingest(config).look(Site(storage, {}, Silent()), Results())
    if found.result is None:
        return DataChange(found.inputs["source"], True, found.reason)
    dataset, quarantine = read_data(config.data, storage)
    stream = stream_digest(dataset, quarantine)
    # An ingest turns a source into a dataset, which is not a change of the data.
    ingested = None if dataset.sources else found.inputs.get("source")
    digest = (ingested or dataset.digest) + (quarantine.digest if quarantine else "")
    current = for_data(config)
    if newest_checkpoint(current) is None:
        return DataChange(digest, True, f"no run has seen the data of digest {stream[:12]}")
    return DataChange(digest, False, f"run '{current.name}' is of the data of digest {stream[:12]}")


def facts(gives: str, results: Results, tracking_uri: str) -> tuple[Metadata, str]:
    """Return the metadata of a result, and its digest, which is the version of the asset's data.

    Args:
        gives: name of the result, see `StageSpec`.
        results: with that one among them.
        tracking_uri: address of the MLflow server.
    """
    return _FACTS[gives](getattr(results, gives), results, tracking_uri)


def gate_table(verdict: Verdict) -> str:
    """Return the gate's table in Markdown."""
    lines = ["| | check | found | required |", "|---|---|---|---|"]
    cells = [("ok" if row.passed else "NO", row.name, row.figure, row.bound) for row in verdict.rows]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines)


def url(address: str) -> Metadata:
    """Return an address as metadata that the page shows as a link."""
    return {"type": "url", "raw_value": address}


def text_table(markdown: str) -> Metadata:
    """Return Markdown as metadata that the page renders."""
    return {"type": "md", "raw_value": markdown}


def plain_json(value: Mapping[str, Any]) -> Metadata:
    """Return a mapping as metadata that the page shows as JSON."""
    return {"type": "json", "raw_value": dict(value)}


def _dataset(dataset: Dataset, results: Results, uri: str) -> tuple[Metadata, str]:
    samples = {f"samples/{split}": dataset.samples(split) for split in dataset.splits}
    return {"uri": dataset.uri, "digest": dataset.digest, "classes": len(dataset.classes), **samples}, dataset.digest


def _run(run: TrainingResult, results: Results, uri: str) -> tuple[Metadata, str]:
    published = there(run.published)
    metadata = {
        "mlflow": url(run.tracker.url),
        "run_id": run.tracker.run_id,
        "images_seen": run.images_seen,
        "checkpoint": published.uri,
        "digest": published.digest,
    }
    if run.goodput is not None:
        metadata["goodput"] = run.goodput.fraction
    return metadata, published.digest


def _evaluator(evaluator: Evaluator, results: Results, uri: str) -> tuple[Metadata, str]:
    accuracy = {} if evaluator.accuracy is None else {"accuracy": evaluator.accuracy}
    metadata = {"kind": evaluator.kind, "source": evaluator.source, "digest": evaluator.digest, **accuracy}
    return metadata, evaluator.digest


def _evaluation(scores: Scores, results: Results, uri: str) -> tuple[Metadata, str]:
    found = digest(scores.to_plain())
    metadata: Metadata = {f"scores/{name}": estimate.value for name, estimate in scores.estimates.items()}
    metadata |= dict(scores.lines())
    metadata |= {"n": scores.n, "evaluator": scores.evaluator, "evaluator_digest": scores.evaluator_digest}
    return {"mlflow": url(there(results.run).tracker.url), "digest": found, **metadata}, found


def _version(version: ModelVersion, results: Results, uri: str) -> tuple[Metadata, str]:
    served = version.tags.get("served_digest", "")
    metadata = {
        "mlflow": url(f"{uri}/{links.version_page(version.name, version.version)}"),
        "model": version.uri,
        "version": version.version,
        "model_digest": version.tags.get("model_digest", ""),
        "served_digest": served,
    }
    return metadata, served


def _champion(verdict: Verdict, results: Results, uri: str) -> tuple[Metadata, str]:
    version = there(results.version)
    metadata: Metadata = {
        "mlflow": url(f"{uri}/{links.version_page(verdict.model, verdict.version)}"),
        "model": version.uri,
        "alias": verdict.alias,
        "verdict": str(verdict),
        "table": text_table(gate_table(verdict)),
    }
    return metadata, version.tags.get("served_digest", "")


_FACTS: dict[str, Callable[..., tuple[Metadata, str]]] = {
    "dataset": _dataset,
    "run": _run,
    "evaluator": _evaluator,
    "evaluation": _evaluation,
    "version": _version,
    "champion": _champion,
}
"""Result -> function that describes it."""
