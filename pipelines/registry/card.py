"""The model card: what a version is, how good it is and what that does not say, on its page in MLflow.

It is made from the signed evidence, `model.json`, the run's configuration and the gate's verdict, as Markdown. What a
person has written in the description stays above it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ddpm.model import ModelSpec
from ddpm.models import NETWORKS
from pipelines import tracking
from pipelines.evaluation.recorded import evaluation_pictures, find_artifact
from pipelines.evaluation.score_blocks import score_table, what_was_scored
from pipelines.evaluation.scores import Scores
from pipelines.presentation import markdown
from pipelines.presentation.blocks import Block, Code, Image, Items, Link, Listing, Section, Strong, Text, Words
from pipelines.registry.evidence import Evidence
from pipelines.registry.verdict import Verdict, verdict_blocks
from pipelines.shards.audit.contents import SourceContents, contents_rows
from pipelines.shards.index import Dataset, DatasetError, read_dataset
from pipelines.shards.joined import weight_in_words
from pipelines.storage import Storage, StorageError
from pipelines.tracking import ModelVersion, Tracker, TrackingError, links

MARK = "<!-- model card: written by ddpm, anew with each verdict; a text above this line stays -->"
"""Where a card begins in a description: stored with every version, so it is not to be reworded."""
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
    """Facts about a version that do not travel with it; each of them may be gone by now.

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
    with tracking.warn_on_error(f"the model card of {version.uri}"):
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
    sections = [
        Section("what", "", _what(evidence, spec, origin)),
        Section("pictures", "", _pictures(origin)),
        Section("scores", "Scores", _scores(evidence.scores)),
        Section("gate", "The gate", [] if verdict is None else verdict_blocks(verdict)),
        Section("limits", "Limits", [Items(_limits(evidence))]),
        Section("use", "Use", _use(reference, evidence, spec)),
        Section("data", "Data", [_data(evidence, spec, origin.dataset)]),
        Section("training", "Training", [_training(evidence, spec, origin.settings)]),
        Section("settings", "Settings that it serves", [Text(Code(_settings(evidence.scores.sampling)))]),
    ]
    whole = [markdown.section(section) for section in sections if section.blocks]
    shown = list(whole)
    rest = "More is in `evidence.json` and `model.json` among the artifacts of the version."
    while len("\n\n".join([*shown, rest])) > room and len(shown) > 1:
        shown.pop()
    return "\n\n".join(shown if shown == whole else [*shown, rest])


def parameters(spec: ModelSpec) -> int:
    """Return the number of parameters of a network, without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in spec.network.build().parameters())


def _what(evidence: Evidence, spec: ModelSpec, origin: Origin) -> list[Block]:
    """Return what the version is; and first of all, if so, that it gives back training images."""
    lineage, (channels, height, width) = evidence.lineage, spec.shape
    kind = {1: "grey images", 3: "colour images"}.get(channels, f"images of {channels} channels")
    of = f" of {len(spec.classes)} classes" if spec.classes else ""
    of += " by prompts" if spec.network.text_dim else ""
    run = Code(str(lineage.get("run", "unknown")))
    words: list[str | Code | Link] = [
        f"Draws {height}x{width} {kind}{of}: a denoising diffusion model ({NETWORKS.name_of(spec.network)}, "
        f"{parameters(spec):,} parameters) of the run ",
        Link(run, origin.run) if origin.run else run,
        f", after {int(lineage.get('images_seen', 0)):,} images",
    ]
    if "init_from" in lineage:
        words += [" from the weights of ", Code(str(lineage["init_from"]))]
    memorised = evidence.scores.memorisation
    copies = [Text(Strong(memorised["verdict"]))] if memorised and memorised["copies"] else []
    return [*copies, Text([*words, "."])]


def _pictures(origin: Origin) -> list[Block]:
    found = origin.pictures or {}
    return [Image(found[key], key, text) for key, text in PICTURES.items() if key in found]


def _scores(scores: Scores) -> list[Block]:
    """Return the scores with their intervals, what real test images and noise have, and what they are of."""
    digest = Text([what_was_scored(scores), " The evaluator is ", Code(scores.evaluator_digest[:SHORT]), "."])
    found: list[Block] = [score_table(scores), digest]
    if scores.memorisation is not None:
        found.append(Text(f"Copies of training images: {scores.memorisation['verdict']}."))
    return found


def _limits(evidence: Evidence) -> list[Words]:
    """Return what the scores do not say, as far as it can be told from them."""
    scores = evidence.scores
    found: list[Words] = [f"{note}." for note in scores.notes()]
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
    return found


def _use(reference: str, evidence: Evidence, spec: ModelSpec) -> list[Block]:
    rows = '{"label": [0, 1]}' if spec.classes else '{"label": [0] * 2}'
    labels = " --labels 0,1" if len(spec.classes) > 1 else ""
    if spec.network.text_dim:
        example = " ".join(str((evidence.scores.prompts or {}).get("examples", ["a prompt"])[0]).split())
        example = re.sub(r"[`\"\\$]", "", example)[:EXAMPLE]  # as it is quoted below
        rows, labels = f'{{"prompt": ["{example}"] * 2}}', f' --prompts "{example}"'
    python = f"model = mlflow.pyfunc.load_model({reference!r})\n"
    python += f'model.predict(pandas.DataFrame({rows}), params={{"seed": 7}})  # uint8 [2, H, W, C]'
    return [
        Listing(f"ddpm sample {reference}{labels} --out samples\nddpm verify {reference}", "sh"),
        Listing(python, "python"),
    ]


def _data(evidence: Evidence, spec: ModelSpec, dataset: Dataset | None) -> Items:
    scores, lineage = evidence.scores, evidence.lineage
    rows: list[Words] = [("data: ", Code(evidence.dataset_uri)), ("digest: ", Code(scores.dataset_digest[:SHORT]))]
    if dataset is not None and not evidence.training_data:
        same = "" if dataset.digest == scores.dataset_digest else " (there now, which is other data)"
        rows.append("images: " + ", ".join(f"{dataset.samples(s):,} {s}" for s in dataset.splits) + same)
    if not evidence.training_data:
        rows.append(f"left out by quarantine: {int(lineage.get('quarantined', 0)):,}")
    sources = lineage.get("sources", [])
    rows += [
        (
            f"trained on source {source['name']} (weight {weight_in_words(source['weights'])}): ",
            Code(source["uri"]),
            ", digest ",
            Code(source["stream_digest"][:SHORT]),
        )
        for source in sources
    ]
    if not sources and lineage.get("dataset_digest") not in (None, scores.dataset_digest):
        rows.append(("trained on other data: ", Code(str(lineage.get("dataset_uri")))))
    for plain in evidence.training_data:
        source = SourceContents.from_plain(plain)
        of = f" of {source.name}" if source.name else ""
        rows += [f"{name}{of}: {value}" for name, value in contents_rows(source)]
    shown = ", ".join(spec.classes[:NAMES])
    more = len(spec.classes) - NAMES
    rows.append(f"classes: {shown}, and {more:,} more" if more > 0 else f"classes: {shown or 'none'}")
    return Items(rows)


def _training(evidence: Evidence, spec: ModelSpec, settings: Mapping[str, Any] | None) -> Items:
    lineage, given = evidence.lineage, settings or {}
    schedule = ", ".join(
        f"{key} {value}" for key, value in spec.schedule.items() if key != "kind" and value is not None
    )
    rows: list[Words] = [
        f"images seen: {int(lineage.get('images_seen', 0)):,}",
        f"schedule: {spec.schedule.get('kind', 'linear')} ({schedule})",
        f"prediction: {spec.prediction}",
    ]
    for name in ("batch_size", "seed", "objective.loss", "objective.weight", "optim.lr", "optim.ema_half_life"):
        value: Any = given
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        rows += [] if value is None else [f"{name}: {value}"]
    if "precision" in lineage:
        rows.append(f"precision: {lineage['precision']}")
    if "init_from" in lineage:
        digest = str(lineage.get("init_from_digest", "unknown"))[:SHORT]
        rows.append(("started from: ", Code(str(lineage["init_from"])), ", weights ", Code(digest)))
    code = f"code: {lineage.get('code_version', 'unknown')}, commit "
    packages = ", ".join(f"{name} {release}" for name, release in sorted(evidence.packages.items()))
    rows.append((code, Code(str(lineage.get("git_commit") or "unknown"))))
    return Items([*rows, f"packages: {packages}", ("weights: ", Code(evidence.model_digest[:SHORT]))])


def _settings(sampling: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in sampling.items() if value is not None)
