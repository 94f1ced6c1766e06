from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec

from ddpm.generate import Sampling
from ddpm.model import load_model
from pipelines.config import compose
from pipelines.evaluation.actors import Drawer
from pipelines.evaluation.evaluators.classifier import Classifier
from pipelines.evaluation.samples import SampleFiles, SamplePlan, balanced_labels
from pipelines.signing import Authority
from pipelines.storage import Storage
from tests.pipelines.signing.authority import write_key
from tests.pipelines.test_earlier_release import EARLIER

PLAN = SamplePlan("digest", Sampling.of(steps=4), 100, (1, 2), (30, 10), 32, "file:///evaluations")


@pytest.mark.parametrize("n", [1, 7, 100, 999])
def test_labels_have_the_proportions_of_the_data(n):
    counts = np.array([60, 0, 30, 10])
    found = np.bincount(balanced_labels(n, counts, seed=3), minlength=4)
    assert found.sum() == n
    assert np.abs(found - n * counts / 100).max() < 1


def test_labels_are_in_an_order_that_a_prefix_does_not_betray():
    # Data that is stored class by class must not make the first samples all of one class.
    labels = balanced_labels(1_000, [100] * 10, seed=1)
    assert np.bincount(labels[:100], minlength=10).min() >= 3
    np.testing.assert_array_equal(labels, balanced_labels(1_000, [100] * 10, seed=1))
    assert (labels != balanced_labels(1_000, [100] * 10, seed=2)).any()


def test_units_cover_every_image_of_every_seed_once():
    units = PLAN.units()
    assert [(u.seed, u.first, u.stop) for u in units[:4]] == [(1, 0, 32), (1, 32, 64), (1, 64, 96), (1, 96, 100)]
    rows = np.concatenate([np.arange(u.row, u.row + u.stop - u.first) for u in units])
    np.testing.assert_array_equal(rows, np.arange(200))
    for seed in PLAN.seeds:
        labels = np.concatenate([u.labels for u in units if u.seed == seed])
        np.testing.assert_array_equal(labels, PLAN.labels(seed))
    assert len({u.path(u.shard) for u in units}) == len(units)


@pytest.mark.parametrize(
    "change",
    [{"model_digest": "other"}, {"sampling": Sampling.of(steps=5)}, {"n": 99}, {"class_counts": (1, 1)},
     {"batch_size": 31}],
)  # fmt: skip
def test_what_decides_an_image_decides_where_it_is_kept(change):
    assert replace(PLAN, **change).folder != PLAN.folder


def test_more_seeds_are_kept_beside_those_that_are_there():
    assert replace(PLAN, seeds=(1, 2, 3)).folder == PLAN.folder


@pytest.fixture
def drawing(tmp_path):
    """An actor, the one unit of its plan, and the files that are stored."""
    torch.manual_seed(0)
    evaluator = SimpleNamespace(digest="e" * 32, encoder=Classifier(1, 8, 10).eval())
    actor = Drawer(load_model(EARLIER / "version" / "model"), None, evaluator, Storage())
    plan = SamplePlan("digest", Sampling.of(steps=2), 30, (1,), (3,) * 10, 30, f"file://{tmp_path}")
    (unit,) = plan.units()
    return SimpleNamespace(actor=actor, plan=plan, unit=unit, folder=tmp_path)


def signing(drawing, said, authority):
    return SampleFiles(drawing.plan, Storage(), authority, said.append)


def own_authority(*overrides):
    return Authority.of(compose(["+experiment=digits", *overrides]).registry)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_images_that_an_interrupted_evaluation_has_stored_have_the_features_of_new_ones(drawing):
    new = drawing.actor.draw(drawing.unit, drawing.plan, {})
    (rows,) = drawing.folder.rglob("*.safetensors")
    rows.unlink()  # the kill came between the images and what was computed of them
    written = next(drawing.folder.rglob("*.tar")).stat().st_mtime_ns
    again = drawing.actor.draw(drawing.unit, drawing.plan, new.files)
    assert rows.exists()
    assert next(drawing.folder.rglob("*.tar")).stat().st_mtime_ns == written
    assert again.files == new.files
    equal(again.rows, new.rows)


@pytest.mark.parametrize("ending", [".safetensors", ".tar"])
def test_what_somebody_has_written_over_is_named_and_made_again(home, drawing, ending):
    """Both files of the honest drawing have other bytes of the same kind put in their place."""
    said, authority = [], own_authority()
    files = signing(drawing, said, authority)
    honest = drawing.actor.draw(drawing.unit, drawing.plan, files.of(drawing.unit))
    files.add(drawing.unit, honest)
    files.write()

    (attacked,) = drawing.folder.rglob(f"*{ending}")
    other = replace(drawing.plan, model_digest="another")
    drawing.actor.draw(replace(other.units()[0], seed=2), other, {})
    foreign = next(path for path in drawing.folder.rglob(f"*{ending}") if path != attacked)
    attacked.write_bytes(foreign.read_bytes())
    if ending == ".tar":
        next(path for path in attacked.parent.glob("*.safetensors")).unlink()

    files = signing(drawing, said, authority)
    again = drawing.actor.draw(drawing.unit, drawing.plan, files.of(drawing.unit))
    files.add(drawing.unit, again)
    equal(again.rows, honest.rows)
    assert any(f"{attacked.name} was made again: it is gone, or not what was stored" in line for line in said)


def test_what_is_stored_is_believed_by_its_signature_and_place(home, drawing, tmp_path):
    authority, said = own_authority(), []
    files = signing(drawing, said, authority)
    files.add(drawing.unit, drawing.actor.draw(drawing.unit, drawing.plan, {}))
    files.write()
    assert signing(drawing, said, authority).of(drawing.unit) == files.of(drawing.unit) != {}
    assert signing(drawing, said, None).of(drawing.unit) == {}

    stranger = own_authority(
        f"registry.signing_key={write_key(tmp_path / 'other.pem', ec.generate_private_key(ec.SECP256R1()))}"
    )
    theirs = signing(drawing, said, stranger)
    assert theirs.of(drawing.unit) == {}
    assert "drawn again: who has drawn them is not known" in said[-1]

    other = SimpleNamespace(**vars(drawing) | {"plan": replace(drawing.plan, model_digest="another")})
    Storage().write(f"{other.plan.folder}/record.json", Storage().read(f"{drawing.plan.folder}/record.json"))
    assert signing(other, said, authority).digests == {}  # a record that was copied to other samples
    assert "it is a copy of" in said[-1]


def test_two_evaluations_at_once_add_to_one_record(home, drawing):
    authority, said = own_authority(), []
    ours, theirs = (signing(drawing, said, authority) for _ in range(2))
    ours.add_files({"seed-1/0": {"a": "1"}})
    theirs.add_files({"seed-1/1": {"b": "2"}, "seed-1/0": {"c": "3"}})  # that of another evaluator
    ours.write()
    theirs.write()
    assert signing(drawing, said, authority).digests == {"seed-1/0": {"a": "1", "c": "3"}, "seed-1/1": {"b": "2"}}
    assert said == []
