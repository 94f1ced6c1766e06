"""What an earlier release left behind is still resumed, sampled and scored: `tests/fixtures/earlier`.

The folder holds a run of 1,000 images on 120 digits, made by `ddpm flow` of commit 87ec5fe: the dataset with its
evaluator network, both checkpoints, the configuration, the registered version (its model folder and tags), the scores
of its evaluation, and samples, keys and identities for a list of settings and configurations. Bits are compared on the
kind of machine that made them; elsewhere processors round differently.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm.generate import Sampling
from ddpm.model import load_model
from ddpm.quality import FeatureMoments, frechet_distance
from pipelines.checkpoints import load_checkpoint
from pipelines.config import FORMER_DEFAULTS, compose, read_config
from pipelines.evaluation.evaluators import open_evaluator, reference_part
from pipelines.evaluation.images import to_levels
from pipelines.evaluation.scores import Scores
from pipelines.shards.index import read_dataset
from pipelines.shards.read import opened_split, read_split
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion
from tests.pipelines.training.loop.ranks import last_checkpoint, train_here

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"


def read(name):
    return json.loads((EARLIER / name).read_text())


def same_machine():
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    here = {
        "torch": torch.__version__.split("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
    }
    return here == read("machine.json")


def assert_same(ours, theirs, atol):
    if same_machine():
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "dataset"
    shutil.copytree(EARLIER / "dataset", folder)
    return read_dataset(f"file://{folder}", Storage())


def test_a_checkpoint_resumes_to_the_same_weights(dataset, tmp_path):
    shutil.copytree(EARLIER / "run" / "000000500", tmp_path / "runs" / "earlier" / "checkpoint_2026-11-25_08-00-00")
    storage = ["storage.root=file://" + str(tmp_path), "storage.local_stack=false", f"data.cache_dir={tmp_path}/cache"]
    config = read_config(EARLIER / "config.json", storage)
    torch.set_num_threads(1)
    shell, _ = train_here(tmp_path, dataset, config)
    assert {report.resumed_at for report in shell.reports} == {500}
    state, tensors = load_checkpoint(last_checkpoint(tmp_path))
    expected, wanted = load_checkpoint(EARLIER / "run" / "000001000")
    assert (state.images_seen, state.identity) == (1000, expected.identity)
    assert tensors.keys() >= wanted.keys()
    for name, tensor in wanted.items():
        assert_same(tensors[name], tensor, atol=1e-4)


def test_a_registered_version_draws_the_same_images_under_every_setting():
    torch.set_num_threads(1)
    model = load_model(EARLIER / "version" / "model")
    expected = load_file(EARLIER / "samples.safetensors")
    for i, row in enumerate(read("sampling.json")):
        if str(i) in expected:
            settings = Sampling.from_json(row["settings"])
            images = model.generate(torch.tensor([0, 3, 7]), sampling=settings, seed=3)
            assert_same(images, expected[str(i)], atol=1e-4)


def test_settings_have_the_keys_by_which_earlier_evaluations_are_found():
    for row in read("sampling.json"):
        parts = ["model", "evaluator", "dataset", 1, Sampling.from_json(row["settings"]).key()]
        assert hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16] == row["key"]


def test_the_tags_of_a_version_are_read():
    tags = read("version/tags.json")
    version = ModelVersion("earlier", "1", tags["run_id"], tags, ("champion",))
    scores = Scores.from_plain(json.loads(version.tags["scores"]))
    assert scores.n == 24
    assert Sampling.from_json(json.loads(tags["sampling"])) == load_model(EARLIER / "version" / "model").spec.sampling


def test_an_evaluation_comes_to_the_same_scores(dataset, tmp_path):
    torch.set_num_threads(1)
    (stored,) = (json.loads(path.read_text()) for path in (EARLIER / "evaluation").iterdir())
    splits = {}
    for split in ("train", "test"):
        with opened_split(dataset, split, Storage(), str(tmp_path), 1.0) as reader:
            splits[split] = read_split(reader)
    config = read_config(EARLIER / "config.json")  # of a release that signed no evaluators
    (record,) = (EARLIER / "dataset" / "evaluator").rglob("evaluator.json")
    believed = (hashlib.sha256(record.read_bytes()).hexdigest(),)
    registry = config.registry.model_copy(update={"trusted_evaluators": believed})
    evaluator = open_evaluator(config.model_copy(update={"registry": registry}), dataset)
    assert (evaluator.digest, evaluator.accuracy) == (stored["evaluator_digest"], stored["real_accuracy"])
    assert dataset.digest == stored["dataset_digest"]
    model, labels = load_model(EARLIER / "version" / "model"), splits["test"].labels
    images = model.generate(labels, seed=stored["seed"], batch_size=90)
    found = evaluator.encoder(to_levels(images))
    real = reference_part(evaluator.share, dataset, Storage(), splits["train"])
    reference = FeatureMoments.of(evaluator.encoder(to_levels(real.images)).features)
    distance = frechet_distance(reference, FeatureMoments.of(found.features))
    assert distance == pytest.approx(stored["frechet_distance"], rel=1e-6 if same_machine() else 1e-3)
    assert (found.probabilities.argmax(1) == labels).double().mean().item() == stored["class_accuracy"]


@pytest.mark.parametrize("row", read("identities.json"), ids=lambda row: " ".join(row["overrides"]) or "defaults")
def test_configurations_keep_their_identity_beside_defaults_that_are_others_now(row):
    now, changed = compose(row["overrides"]).identity(), {k: (v, "v") for k, v in FORMER_DEFAULTS.items()}
    if row["overrides"] in (["+experiment=digits"], ["+experiment=digits_inpainting"]):
        changed["images"] = (102_400, 51_200)
    goes_on = [f"{key}={old}" for key, (old, new) in changed.items() if (row["identity"][key], now[key]) == (old, new)]
    assert json.loads(json.dumps(compose([*row["overrides"], *goes_on]).identity())) == row["identity"]
