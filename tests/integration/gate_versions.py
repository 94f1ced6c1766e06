"""Make versions of digits that the gate has to refuse, ask it about each, and print what it says.

    python -m tests.integration.gate_versions NAME GOOD_RUN_ID KIND …

The models are a trained one, the same with other weights or settings, and stand-ins that draw stored pictures where no
training gives what is needed: one picture for each class, and copies of training images. What they draw is scored and
registered as anybody's model is.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import compose
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Silent
from pipelines.stack.connect import connect

SERVICES = ("s3", "mlflow", "ray")
COPY = "s3://ddpm/datasets/gate-copy"


def main(name: str, run_id: str, *kinds: str) -> None:
    settings = [
        "+experiment=digits",
        f"name={name}",
        "sampler.steps=10",
        "evaluation.n=200",
        "evaluation.seeds=1",
        "evaluation.likelihood_images=0",
        "registry.n=359",
    ]
    config = connect(compose(settings), os.environ, SERVICES)  # before ray is imported

    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor

    from ddpm.model import Model
    from pipelines import registry, tracking
    from pipelines.checkpoints import references
    from pipelines.checkpoints.references import Resolved
    from pipelines.evaluation.data import EvaluationData
    from pipelines.evaluation.scoring import score
    from pipelines.registry import Gate, Signer
    from pipelines.shards.index import read_dataset
    from pipelines.shards.quarantine import Problem, make_quarantine
    from pipelines.shards.read import opened_split, read_split
    from pipelines.signing.keys import own_key
    from pipelines.storage import Storage
    from pipelines.training.resources import connect_ray

    @dataclass(frozen=True)
    class Replay(Model):
        """Draws stored pictures [classes, N, C, H, W] of the class that is asked for, one after another."""

        pictures: Tensor | None = None

        def generate(self, labels, *, image_ids, **_):  # type: ignore[override]
            assert self.pictures is not None
            return self.pictures[labels, image_ids % self.pictures.shape[1]]

    storage, uri = Storage.of(config), config.tracking.uri
    gate = Gate(config, Silent(), lambda: connect_ray(config), name, "champion")
    good = references.resolve(f"runs:/{run_id}", tracking_uri=uri, storage=storage)
    dataset_uri = good.model.spec.lineage["dataset_uri"]
    dataset = read_dataset(dataset_uri, storage)
    with opened_split(dataset, "train", storage, config.data.cache_dir, config.data.cache_gib) as reader:
        train = read_split(reader)
    least = int(train.labels.bincount().min())
    by_class = torch.stack([train.images[train.labels == c][:least] for c in range(10)])

    def jpeg(images: Tensor) -> Tensor:
        levels = ((images + 1) * 127.5).round().to(torch.uint8).flatten(0, 1)[:, 0].numpy()
        found = []
        for pixels in levels:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
            found.append(np.asarray(Image.open(buffer)))
        return (torch.tensor(np.stack(found)).float() / 127.5 - 1).reshape(images.shape)

    def replay(pictures: Tensor) -> Resolved:
        model = Replay(good.model.spec, good.model.network, pictures=pictures)
        return replace(good, model=model, published=None)

    def altered(change) -> Resolved:
        network = good.model.spec.network.build().eval()
        network.load_state_dict(good.model.network.state_dict())
        with torch.no_grad():
            change(network)
        return replace(good, model=replace(good.model, network=network), published=None)

    def nan(network):
        next(network.parameters()).fill_(float("nan"))

    def random(network):
        generator = torch.Generator().manual_seed(0)
        for weights in network.parameters():
            weights.copy_(torch.randn(weights.shape, generator=generator) * 0.02)

    def scored(resolved: Resolved, asked=config, **changes):
        sampling = resolved.model.spec.sampling.with_fields(**changes)
        data = EvaluationData.of(dataset_uri, asked, lambda: connect_ray(config))
        return score(resolved, sampling, data, Silent(), None).scores

    def version(resolved: Resolved, scores, *, signer=None, where=dataset_uri):
        real = replace(resolved, model=Model(resolved.model.spec, resolved.model.network))
        return registry.register(real, name, scores, where, signer or Signer.of(config.registry))

    def asked(found) -> dict[str, object]:
        fresh = tracking.version(uri, name, number=found.version)
        verdict = gate.promote(fresh)
        failed = [row.name for row in verdict.rows if not row.passed]
        return {"passed": verdict.passed, "reason": verdict.reason, "failed": failed, "version": found.version}

    own = scored(good)

    def drawn(broken: Resolved) -> dict[str, object]:
        """Ask about a model whose pictures are scored first."""
        return asked(version(broken, scored(broken)))

    def overflowed() -> dict[str, object]:
        broken = altered(nan)
        found = scored(broken)
        answer = {"finite": found["finite"].value, "failed": [], "passed": False}
        try:
            return answer | {"passed": True, "version": version(broken, found).version}
        except PipelineError as error:
            return answer | {"reason": str(error)}

    def unsigned() -> dict[str, object]:
        made = version(good, own)
        assert asked(made)["failed"] != ["signature"]
        _each_artifact(uri, storage, made, "model.sig", storage.delete)
        return asked(made)

    def tampered_weights() -> dict[str, object]:
        made = version(good, own)
        _each_artifact(
            uri, storage, made, "model.safetensors", lambda at: storage.write(at, _flipped(storage.read(at)))
        )
        return asked(made)

    def code_in_an_encoder() -> dict[str, object]:
        """Ask about a version into which an encoder of texts was put that would bring code of its own."""
        made = version(good, own)
        module = json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}]).encode()

        def put(at: str) -> None:
            storage.write(at.replace("/model.json", "/text_encoder/modules.json"), module)

        _each_artifact(uri, storage, made, "model.json", put)
        return asked(made)

    def tampered_tag() -> dict[str, object]:
        made = version(good, own)
        tracking.set_version_tags(uri, name, made.version, {"frechet_distance": "0.0001"})
        return asked(made)

    def untrusted_key() -> dict[str, object]:
        os.environ["DDPM_HOME"], home = f"{os.environ['DDPM_HOME']}/stranger", os.environ["DDPM_HOME"]
        stranger = Signer(own_key())
        os.environ["DDPM_HOME"] = home
        return asked(version(good, own, signer=stranger))

    def elsewhere() -> Any:
        """Return a version that was scored on a copy of its dataset."""
        for entry in storage.list(dataset_uri):
            if entry.uri.count("/") == dataset_uri.count("/") + 1:
                storage.copy(entry.uri, f"{COPY}/{entry.uri.rsplit('/', 1)[-1]}")
        return version(good, own, where=COPY)

    def other_quarantine() -> dict[str, object]:
        made = elsewhere()
        shard = dataset.shards("train")[0]
        excluded = make_quarantine(dataset, [Problem(shard.name, None, None, "decode", "planted")])
        storage.write(f"{COPY}/quarantine.json", excluded.to_json().encode())
        answer = asked(made)
        storage.delete_folder(COPY)
        return answer

    def missing_dataset() -> dict[str, object]:
        made = elsewhere()
        storage.delete_folder(COPY)
        return asked(made)

    def champion():
        return tracking.version(uri, name, alias="champion")

    @contextmanager
    def overwritten(version, file: str, content: Callable[[bytes], bytes]):
        """With other bytes in the place of a file of a version."""
        before: dict[str, bytes] = {}

        def put(at: str) -> None:
            before[at] = storage.read(at)
            storage.write(at, content(before[at]))

        _each_artifact(uri, storage, version, file, put)
        try:
            yield
        finally:
            for at, data in before.items():
                storage.write(at, data)

    def look_alike() -> dict[str, object]:
        """Ask about a version whose description was put over that of the champion, so that both look the same."""
        made = version(good, scored(good, other, steps=12))
        found: list[bytes] = []
        _each_artifact(uri, storage, made, "model.json", lambda at: found.append(storage.read(at)))
        with overwritten(champion(), "model.json", lambda _: found[0]):
            return asked(made)

    def tampered_champion() -> dict[str, object]:
        present = champion()
        with overwritten(present, "model.safetensors", _flipped):
            return asked(present)

    def tampered_previous() -> dict[str, object]:
        previous = tracking.version(uri, name, alias="previous")
        with overwritten(previous, "model.safetensors", _flipped):
            try:
                return {"passed": gate.rollback().passed, "failed": []}
            except PipelineError as error:
                return {"passed": False, "failed": [], "reason": str(error)}

    def tampered_checkpoint() -> dict[str, object]:
        """Load a published checkpoint whose weights are another's."""
        at = f"{good.published.uri}/model.safetensors"
        before = storage.read(at)
        storage.write(at, _flipped(before))
        try:
            references.resolve(f"runs:/{run_id}", tracking_uri=uri, storage=storage)
            return {"passed": True, "failed": []}
        except PipelineError as error:
            return {"passed": False, "failed": [], "reason": str(error)}
        finally:
            storage.write(at, before)

    contrastive = config.evaluation.model_copy(update={"evaluator": "contrastive"})
    other = config.model_copy(update={"evaluation": contrastive})
    cases = {
        "the same weights again": lambda: asked(version(good, own)),
        "nearly the same settings": lambda: asked(version(good, scored(good, steps=11))),
        "noise": lambda: drawn(altered(random)),
        "NaN weights": overflowed,
        "one picture for each class": lambda: drawn(replay(by_class[:, :1])),
        "copies": lambda: drawn(replay(by_class)),
        "mirrored copies": lambda: drawn(replay(by_class.flip(-1))),
        "JPEG copies": lambda: drawn(replay(jpeg(by_class))),
        "shifted copies": lambda: drawn(replay(torch.roll(by_class, 1, dims=-1))),
        "unsigned": unsigned,
        "tampered weights": tampered_weights,
        "code in an encoder": code_in_an_encoder,
        "tampered tag": tampered_tag,
        "untrusted key": untrusted_key,
        "other quarantine": other_quarantine,
        "missing dataset": missing_dataset,
        "look-alike": look_alike,
        "tampered champion": tampered_champion,
        "tampered previous": tampered_previous,
        "tampered checkpoint": tampered_checkpoint,
        "other evaluator": lambda: asked(version(good, scored(good, other, steps=11))),
        "the champion scored again": lambda: asked(version(good, scored(good, other))),
    }
    print(json.dumps({kind: cases[kind]() for kind in kinds}))


def _each_artifact(uri, storage, version, file, change) -> None:
    """Apply a function to the address in S3 of a file of a version."""
    from mlflow import MlflowClient

    source = MlflowClient(uri).get_model_version(version.name, version.version).source.removeprefix("models:/")
    found = [entry.uri for entry in storage.list("s3://ddpm/mlflow") if source in entry.uri]
    ours = [address for address in found if address.endswith(f"/{file}")]
    assert ours, found
    for address in ours:
        change(address)


def _flipped(data: bytes) -> bytes:
    """Return bytes of which the last has one other bit."""
    return data[:-1] + bytes([data[-1] ^ 1])


if __name__ == "__main__":
    main(*sys.argv[1:])
