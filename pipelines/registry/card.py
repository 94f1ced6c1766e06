"""The model card: what a version is, how good it is and what that does not say, on its page in MLflow.

It is made from the signed evidence, `model.json`, the run's configuration and the gate's verdict, as Markdown. What a
person has written in the description stays above it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ddpm.model import ModelSpec
from ddpm.models import NETWORKS
from pipelines import tracking
from pipelines.evaluation.recorded import evaluation_pictures, find_artifact
from pipelines.evaluation.scores import LABELS, Estimate, Scores
from pipelines.registry.evidence import Evidence
from pipelines.registry.verdict import Verdict
from pipelines.shards.index import Dataset, DatasetError, read_dataset
from pipelines.storage import Storage, StorageError
from pipelines.tracking import ModelVersion, Tracker, TrackingError, links

MARK = "<!-- model card: written by ddpm, anew with each verdict; a text above this line stays -->"
LARGEST = 5_000
"""Characters that MLflow's database keeps of a description."""
SHORT = 12
"""Characters of a digest that are shown; the tags have all."""
EXAMPLE = 80
"""Characters of a caption that the commands have for an example."""
NAMES = 12
"""Classes whose names are shown."""
PICTURES = {
    "evaluation": "Samples that were scored",
    "nearest-training-images": "The samples that are nearest to a training image, and below each that image",
}
"""Key of a picture of the evaluation -> what it shows."""


@dataclass(frozen=True)
class Origin:
    """What is known of a version beside what travels with it; each part may be gone by now.

    Attributes:
        dataset: that it was scored on; None where it cannot be read.
        settings: the configuration of the run, as in its `config.json`; None where it cannot be read.
        run: address of the run's page; "" where there is none.
        pictures: key -> address of a picture of its evaluation, as in `PICTURES`.
    """

    dataset: Dataset | None = None
    settings: Mapping[str, Any] | None = None
    run: str = ""
    pictures: Mapping[str, str] | None = None


def describe(
    uri: str, version: ModelVersion, evidence: Evidence, spec: ModelSpec, verdict: Verdict | None, storage: Storage
) -> None:
    """Write the card of a version as its description in MLflow; where MLflow does not take it, that is logged.

    Args:
        uri: address of the MLflow server.
        evidence, spec: of the version.
        verdict: the newest about it; None where there is none.
    """
    with tracking.recording(f"has no model card of {version.uri}"):
        origin = read_origin(uri, version, evidence, storage)
        before = tracking.version_description(uri, version.name, version.version)
        room = LARGEST - len(below_notes(before, ""))
        text = below_notes(before, card(version.uri, evidence, spec, verdict, origin, room))
        tracking.describe_version(uri, version.name, version.version, text)


def read_origin(uri: str, version: ModelVersion, evidence: Evidence, storage: Storage) -> Origin:
    """Return what is still there of where a version came from."""
    dataset = settings = None
    run, pictures = "", {}
    with suppress(DatasetError, StorageError):  # data may be deleted, or be out of reach of whoever promotes
        dataset = read_dataset(evidence.dataset_uri, storage)
    tracker = Tracker(uri, version.run_id)
    with suppress(TrackingError):  # the run may be deleted, or be none of a training
        run = links.run_page(tracker.experiment_id(), tracker.run_id)
        seen = int(evidence.lineage.get("images_seen", 0))
        found = evaluation_pictures(tracker.names("images"), find_artifact(tracker, evidence.scores, seen), seen)
        pictures = {key: links.artifact(tracker.run_id, name) for key, name in found.items()}
        settings = tracking.recorded_config(tracker)
    return Origin(dataset, settings, run, pictures)


def below_notes(before: str, text: str) -> str:
    """Return a description with a card in the place of the one that it had; what a person wrote above that stays."""
    notes = before.partition(MARK)[0].strip()
    return f"{notes}\n\n{MARK}\n\n{text}".lstrip()


def card(
    reference: str,
    evidence: Evidence,
    spec: ModelSpec,
    verdict: Verdict | None,
    origin: Origin,
    room: int = LARGEST,
) -> str:
    """Return the card of a version as Markdown.

    Args:
        reference: models:/NAME/VERSION.
        room: characters that it may have; its last sections are left out where it would have more.
    """
    parts = [
        _what(evidence, spec, origin),
        _pictures(origin),
        _section("Scores", _scores(evidence.scores)),
        _section("The gate", _verdict(verdict)),
        _section("Limits", _limits(evidence)),
        _section("Use", _use(reference, evidence, spec)),
        _section("Data", _data(evidence, spec, origin.dataset)),
        _section("Training", _training(evidence, spec, origin.settings)),
        _section("Settings that it serves", _settings(evidence.scores.sampling)),
    ]
    whole = [part for part in parts if part]
    shown = list(whole)
    rest = "More is in `evidence.json` and `model.json` among the artifacts of the version."
    while len("\n\n".join([*shown, rest])) > room and len(shown) > 1:
        shown.pop()
    return "\n\n".join(shown if shown == whole else [*shown, rest])


def parameters(spec: ModelSpec) -> int:
    """Return the number of parameters of a network, without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in spec.network.build().parameters())


def _what(evidence: Evidence, spec: ModelSpec, origin: Origin) -> str:
    """Return what the version is; and first of all, if so, that it gives back training images."""
    lineage, (channels, height, width) = evidence.lineage, spec.shape
    kind = {1: "grey images", 3: "colour images"}.get(channels, f"images of {channels} channels")
    of = f" of {len(spec.classes)} classes" if spec.classes else ""
    of += " by prompts" if spec.network.text_dim else ""
    run = _code(lineage.get("run", "unknown"))
    run = f"[{run}]({origin.run})" if origin.run else run
    text = (
        f"Draws {height}x{width} {kind}{of}: a denoising diffusion model ({NETWORKS.name_of(spec.network)}, "
        f"{parameters(spec):,} parameters) of the run {run}, after {int(lineage.get('images_seen', 0)):,} images"
        + (f" from the weights of {_code(lineage['init_from'])}." if "init_from" in lineage else ".")
    )
    memorised = evidence.scores.memorisation
    return f"**{_plain(memorised['verdict'])}**\n\n{text}" if memorised and memorised["copies"] else text


def _pictures(origin: Origin) -> str:
    found = origin.pictures or {}
    return "\n\n".join(f"{text}:\n\n![{key}]({found[key]})" for key, text in PICTURES.items() if key in found)


def _scores(scores: Scores) -> str:
    """Return the scores with their intervals, what real test images and noise have, and what they are of."""
    rows = []
    for name, score in sorted(scores.estimates.items(), key=lambda item: _rank(item[0])):
        real = scores.real_accuracy if name == "class_accuracy" and score.floor is None else score.floor
        words = LABELS.get(name, name)
        rows.append((words, _figure(score.value), _interval(score), _figure(real), _figure(score.ceiling)))
    drawn = f"{scores.n:,} samples" if len(scores.seeds) == 1 else f"{len(scores.seeds)} x {scores.n:,} samples"
    judged = f"{drawn} (noise seeds {', '.join(map(str, scores.seeds))}), judged by the {scores.evaluator} "
    judged += f"`{scores.evaluator_digest[:SHORT]}`"
    against = " and ".join(f"{count:,} {_plain(split)} images" for split, count in scores.real.items())
    judged += f" against {against}." if against else "."
    found = [_table(("score", "value", "95 % interval", "real test images", "noise"), rows), judged]
    if scores.memorisation is not None:
        found.append(f"Copies of training images: {_plain(scores.memorisation['verdict'])}.")
    return "\n\n".join(found)


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    where = f"`{verdict.alias}`: **{verdict.outcome}** on {verdict.at}, {_plain(verdict.reason)}"
    if verdict.champion is not None:
        where += f"; compared with version {verdict.champion}"
    if verdict.n:
        where += f" on {verdict.n:,} samples of each, attempt {verdict.attempt}"
    rows = [(row.name, row.figure, row.bound, "yes" if row.passed else "no") for row in verdict.rows]
    return "\n\n".join([f"{where}.", *([_table(("asked for", "found", "has to be", "passed"), rows)] if rows else [])])


def _limits(evidence: Evidence) -> str:
    """Return what the scores do not say, as far as it can be told from them."""
    scores, found = evidence.scores, []
    found += [f"{_plain(note)}." for note in scores.notes()]
    if scores.prompts is not None and "prompt_accuracy" in scores:
        found.append(
            f"Prompt accuracy: samples are drawn from {scores.prompts['captions']:,} captions of test images; each "
            f"has to match its own best of {scores.prompts['choices']} different ones, which guessing does in "
            f"{scores.prompts['chance']:.0%}. It says nothing of prompts unlike these."
        )
    elif "class_accuracy" not in scores:
        found.append("It was judged without labels: nothing tells whether a sample is of the kind that was asked for.")
    if "class_accuracy" in scores and scores.real_accuracy is not None:
        found.append(
            f"The evaluator names the class of {scores.real_accuracy:.2%} of real test images: a class accuracy "
            "near or above that tells no more."
        )
    if scores.memorisation is None:
        found.append("Whether samples are copies of training images was not looked at: there were too few images.")
    else:
        found.append("Copies that are cropped, turned or recoloured are not found.")
    if scores["frechet_distance"].low is None:
        found.append("The scores have no intervals: they are of an earlier release.")
    found.append("Distances compare only with those of the same evaluator, data, number of samples and seeds.")
    found.append("Scores are of many samples: they say nothing about a single one, nor about images unlike the data.")
    found.append("They are of the settings that it serves; at other steps, guidance or samplers it was not scored.")
    return "\n".join(f"- {line}" for line in found)


def _use(reference: str, evidence: Evidence, spec: ModelSpec) -> str:
    rows = '{"label": [0, 1]}' if spec.classes else '{"label": [0] * 2}'
    labels = " --labels 0,1" if len(spec.classes) > 1 else ""
    if spec.network.text_dim:
        example = " ".join(str((evidence.scores.prompts or {}).get("examples", ["a prompt"])[0]).split())
        example = re.sub(r"[`\"\\$]", "", example)[:EXAMPLE]  # as it is quoted below
        rows, labels = f'{{"prompt": ["{example}"] * 2}}', f' --prompts "{example}"'
    return (
        f"```sh\nddpm sample {reference}{labels} --out samples\nddpm verify {reference}\n```\n\n"
        f"```python\nmodel = mlflow.pyfunc.load_model({reference!r})\n"
        f'model.predict(pandas.DataFrame({rows}), params={{"seed": 7}})  # uint8 [2, H, W, C]\n```'
    )


def _data(evidence: Evidence, spec: ModelSpec, dataset: Dataset | None) -> str:
    scores, lineage = evidence.scores, evidence.lineage
    rows = [("data", _code(evidence.dataset_uri)), ("digest", _code(scores.dataset_digest[:SHORT]))]
    if dataset is not None:
        same = "" if dataset.digest == scores.dataset_digest else " (there now, which is other data)"
        rows.append(("images", ", ".join(f"{dataset.samples(s):,} {_plain(s)}" for s in dataset.splits) + same))
    rows.append(("left out by quarantine", f"{int(lineage.get('quarantined', 0)):,}"))
    if lineage.get("dataset_digest") not in (None, scores.dataset_digest):
        rows.append(("trained on other data", _code(lineage.get("dataset_uri"))))
    shown = ", ".join(map(_plain, spec.classes[:NAMES]))
    more = len(spec.classes) - NAMES
    rows.append(("classes", f"{shown}, and {more:,} more" if more > 0 else shown or "none"))
    return _list(rows)


def _training(evidence: Evidence, spec: ModelSpec, settings: Mapping[str, Any] | None) -> str:
    lineage, given = evidence.lineage, settings or {}
    schedule = ", ".join(
        f"{key} {value}" for key, value in spec.schedule.items() if key != "kind" and value is not None
    )
    rows = [
        ("images seen", f"{int(lineage.get('images_seen', 0)):,}"),
        ("schedule", f"{spec.schedule.get('kind', 'linear')} ({schedule})"),
        ("prediction", str(spec.prediction)),
    ]
    for name in ("batch_size", "seed", "objective.loss", "objective.weight", "optim.lr", "optim.ema_half_life"):
        value: Any = given
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        rows += [] if value is None else [(name, str(value))]
    if "precision" in lineage:
        rows.append(("precision", str(lineage["precision"])))
    if "init_from" in lineage:
        digest = str(lineage.get("init_from_digest", "unknown"))[:SHORT]
        rows.append(("started from", f"{_code(lineage['init_from'])}, weights {_code(digest)}"))
    code = f"{lineage.get('code_version', 'unknown')}, commit {_code(lineage.get('git_commit') or 'unknown')}"
    packages = ", ".join(f"{name} {release}" for name, release in sorted(evidence.packages.items()))
    return _list([*rows, ("code", code), ("packages", packages), ("weights", _code(evidence.model_digest[:SHORT]))])


def _settings(sampling: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in sampling.items() if value is not None) + "."


def _section(title: str, text: str) -> str:
    return f"### {title}\n\n{text}" if text else ""


def _list(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; MLflow's page has no space of its own between columns."""
    cells = [[_plain(row[0]), *(f"&emsp;{_plain(cell)}" if cell else "" for cell in row[1:])] for row in [head, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], ["---"] * len(head), *cells[1:]])


def _rank(name: str) -> int:
    order = list(LABELS)
    return order.index(name) if name in order else len(order)


def _interval(found: Estimate) -> str:
    return "" if found.low is None or found.high is None else f"{_figure(found.low)} to {_figure(found.high)}"


def _figure(value: float | None) -> str:
    """Return a number with four digits; nothing where there is none."""
    if value is None or not math.isfinite(value):
        return "" if value is None else "not a number"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def _plain(text: Any) -> str:
    """Return a text, such as the name of a class, that says in Markdown what it is, in one line."""
    return re.sub(r"([\\`*_\[\]>|#])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


def _code(text: Any) -> str:
    return f"`{' '.join(str(text).replace('`', '').split())}`"
