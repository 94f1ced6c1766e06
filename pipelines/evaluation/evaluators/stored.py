"""Evaluators that were trained on a dataset, stored under it: one of each kind, trained once and then the same for all.

    evaluator/DATASET_DIGEST/KIND/DIGEST.safetensors    the weights, under a name of their own
    evaluator/DATASET_DIGEST/KIND/evaluator.json        which of them, signed, written last and by the first who can

Earlier releases stored a classifier as `evaluator.safetensors` and `evaluator.json`, without the folder of its kind,
and signed none of them.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

from safetensors.torch import load

from ddpm.image_size import ImageSize, as_setting, parse_image_size
from pipelines.config import Config, RegistryConfig
from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.evaluators.classifier import reduced_size
from pipelines.evaluation.evaluators.share import TrainShare
from pipelines.evaluation.evaluators.train import SEED, Trainable, Trained, untrained
from pipelines.shards.index import Dataset, DatasetError
from pipelines.signing import Authority, Derived, SignatureError, Trust, said
from pipelines.storage import ConflictError, Storage, join, layout


def find(kind: Trainable, dataset: Dataset, config: Config) -> Evaluator | None:
    """Return the stored evaluator of a dataset; None where none was trained yet.

    Args:
        config: of the store, and of whose evaluators are believed.

    Raises:
        DatasetError: nobody who is believed has signed the record, or the stored weights are not those that it names.
    """
    # What an earlier release has stored goes first: scores that were made with it stay comparable.
    kinds: list[Trainable | None] = [None, kind] if kind == "classifier" else [kind]
    for of in kinds:
        place = _place(of, dataset, Storage.of(config))
        record = _believed(place, config.registry)
        if record is not None:
            return _opened(kind, dataset, place, record)
    return None


def store(kind: Trainable, trained: Trained, dataset: Dataset, config: Config) -> Evaluator:
    """Store an evaluator, unless another process has stored one meanwhile, and return the one that is stored.

    Args:
        config: of the store, of who signs, and of whose evaluators are believed.

    Raises:
        DatasetError: another process has stored one that is not believed, or whose weights its record does not name.
    """
    place, authority = _place(kind, dataset, Storage.of(config)), Authority.of(config.registry)
    weights_digest = hashlib.sha256(trained.weights).hexdigest()
    name = f"{weights_digest[:16]}.safetensors"
    size = reduced_size(dataset.image_size)
    parts = [kind, weights_digest, _preparation(dataset, size)]
    record = {
        "kind": kind,
        "digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "weights": name,
        "weights_digest": weights_digest,
        "test_accuracy": trained.accuracy,
        **({"text_dim": trained.text_dim} if trained.text_dim else {}),
        "image_size": size,
        "seed": SEED,
        "dataset_digest": dataset.digest,
        "total": trained.share.total,
        "trained_on": trained.share.count,
        "writer": uuid.uuid4().hex,  # a write whose answer was lost is told from another process's by it
    }
    place.write(name, trained.weights)
    try:
        place.storage.write_if(place.uri, place.sealed(record, authority.signer), None)
    except ConflictError:
        theirs = _believed(place, config.registry)
        assert theirs is not None
        record = theirs
        if record["weights"] != name:
            place.storage.delete(join(place.folder, name))
    return _opened(kind, dataset, place, record)


def _place(kind: Trainable | None, dataset: Dataset, storage: Storage) -> Derived:
    """Return where the evaluator of a kind lies; without a kind, that of an earlier release."""
    parts = [layout.EVALUATORS, dataset.digest[:16], *([] if kind is None else [kind])]
    return Derived(storage, join(dataset.uri, *parts), layout.EVALUATOR, "/".join(parts))


def _believed(place: Derived, config: RegistryConfig) -> dict[str, Any] | None:
    """Return the record of an evaluator; None where there is none.

    Raises:
        DatasetError: nobody who is trusted has signed it, and it is none of `registry.trusted_evaluators`.
    """
    try:
        return place.find(Trust.of(config))
    except SignatureError as error:
        content = place.storage.read(place.uri)
        digest, record = hashlib.sha256(content).hexdigest(), said(content)
        if digest in config.trusted_evaluators:
            return record
        raise DatasetError(
            f"{place.uri}: this evaluator decides every score, and is not believed: {error}. If you know whose it is "
            f"(its digest is {str(record.get('digest'))[:12]}, which the scores and versions that it has judged name), "
            f"believe it with registry.trusted_evaluators=[{digest}] or trust its signer; else delete {place.folder}, "
            "and the next evaluation trains one anew"
        ) from error


def _opened(kind: Trainable, dataset: Dataset, place: Derived, record: dict[str, Any]) -> Evaluator:
    """Load the weights that a record names."""
    # Those of an earlier release were trained on the whole split at its size; the digest was that of the weights alone.
    earlier = "weights" not in record
    name, digest = (layout.EARLIER_EVALUATOR_WEIGHTS, "digest") if earlier else (record["weights"], "weights_digest")
    weights = place.read(name, record[digest])
    if weights is None:
        raise DatasetError(
            f"{place.folder}: the evaluator's weights are not those that {layout.EVALUATOR} records; delete this "
            "folder, and the next evaluation trains an evaluator anew"
        )
    size = parse_image_size(record.get("image_size", dataset.image_size))
    network = untrained(kind, dataset, size, record.get("text_dim", 0)).eval().requires_grad_(False)
    network.load_state_dict(load(weights))
    total = dataset.samples("train")
    return Evaluator(
        network,
        kind,
        record["digest"],
        f"trained on {dataset.uri}",
        _preparation(dataset, size),
        labels=kind == "classifier",
        accuracy=record["test_accuracy"],
        share=TrainShare(dataset.digest, record.get("total", total), record.get("trained_on", total)),
    )


def _preparation(dataset: Dataset, size: ImageSize) -> str:
    """Return what a network that looks at images of a size does to the images of a dataset, in words."""
    smaller = f"reduced to {as_setting(size)} pixels (bilinear, antialiased); " if size != dataset.image_size else ""
    return f"{smaller}scaled from 0..255 to [-1, 1]"
