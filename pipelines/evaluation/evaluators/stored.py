"""Evaluators that were trained on a dataset, stored under it: one of each kind, trained once and then the same for all.

    evaluator/DATASET_DIGEST/KIND/DIGEST.safetensors    the weights, under a name of their own
    evaluator/DATASET_DIGEST/KIND/evaluator.json        which of them, written last and by the first who can

Earlier releases stored a classifier as `evaluator.safetensors` and `evaluator.json`, without the folder of its kind.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

from safetensors.torch import load

from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.evaluators.classifier import MAX_SIDE
from pipelines.evaluation.evaluators.share import Share
from pipelines.evaluation.evaluators.train import SEED, Trainable, Trained, untrained
from pipelines.shards.index import Dataset, DatasetError
from pipelines.storage import ConflictError, NotFoundError, Storage, join

RECORD = "evaluator.json"


def find(kind: Trainable, dataset: Dataset, storage: Storage) -> Evaluator | None:
    """Return the stored evaluator of a dataset; None where none was trained yet.

    Raises:
        DatasetError: the stored weights are not those that the record names.
    """
    above = join(dataset.uri, "evaluator", dataset.digest[:16])
    # What an earlier release has stored goes first: scores that were made with it stay comparable.
    for folder in [above, join(above, kind)] if kind == "classifier" else [join(above, kind)]:
        try:
            record = json.loads(storage.read(join(folder, RECORD)))
        except NotFoundError:
            continue
        return _opened(kind, dataset, storage, folder, record)
    return None


def store(kind: Trainable, trained: Trained, dataset: Dataset, storage: Storage) -> Evaluator:
    """Store an evaluator, unless another process has stored one meanwhile, and return the one that is stored.

    Raises:
        DatasetError: the weights that another process has stored are not those that its record names.
    """
    folder = join(dataset.uri, "evaluator", dataset.digest[:16], kind)
    weights_digest = hashlib.sha256(trained.weights).hexdigest()
    name = f"{weights_digest[:16]}.safetensors"
    side = min(dataset.image_size, MAX_SIDE)
    parts = [kind, weights_digest, _preparation(dataset, side)]
    record = {
        "kind": kind,
        "digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "weights": name,
        "weights_digest": weights_digest,
        "test_accuracy": trained.accuracy,
        **({"text_dim": trained.text_dim} if trained.text_dim else {}),
        "image_size": side,
        "seed": SEED,
        "dataset_digest": dataset.digest,
        "total": trained.share.total,
        "trained_on": trained.share.count,
        "writer": uuid.uuid4().hex,  # a write whose answer was lost is told from another process's by it
    }
    storage.write(join(folder, name), trained.weights)
    try:
        storage.write_if(join(folder, RECORD), json.dumps(record, indent=1).encode(), None)
    except ConflictError:
        record = json.loads(storage.read(join(folder, RECORD)))
        if record["weights"] != name:
            storage.delete(join(folder, name))
    return _opened(kind, dataset, storage, folder, record)


def _opened(kind: Trainable, dataset: Dataset, storage: Storage, folder: str, record: dict[str, Any]) -> Evaluator:
    """Load the weights that a record names."""
    # Those of an earlier release were trained on the whole split at its size; the digest was that of the weights alone.
    earlier = "weights" not in record
    weights = storage.read(join(folder, "evaluator.safetensors" if earlier else record["weights"]))
    if hashlib.sha256(weights).hexdigest() != record["digest" if earlier else "weights_digest"]:
        raise DatasetError(
            f"{folder}: the evaluator's weights are not those that {RECORD} records; delete this folder, "
            "and the next evaluation trains an evaluator anew"
        )
    side = record.get("image_size", dataset.image_size)
    network = untrained(kind, dataset, side, record.get("text_dim", 0)).eval().requires_grad_(False)
    network.load_state_dict(load(weights))
    total = dataset.samples("train")
    return Evaluator(
        network,
        kind,
        record["digest"],
        f"trained on {dataset.uri}",
        _preparation(dataset, side),
        labels=kind == "classifier",
        accuracy=record["test_accuracy"],
        share=Share(dataset.digest, record.get("total", total), record.get("trained_on", total)),
    )


def _preparation(dataset: Dataset, side: int) -> str:
    """Return what a network that looks at so many pixels does to the images of a dataset, in words."""
    smaller = f"reduced to {side} pixels (bilinear, antialiased); " if side < dataset.image_size else ""
    return f"{smaller}scaled from 0..255 to [-1, 1]"
