"""Everything that has seen a picture, as one answer, and as a statement that others can verify."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from pipelines.checkpoints import complete_checkpoints
from pipelines.cli import main
from pipelines.config import compose
from pipelines.provenance.find import Query
from pipelines.provenance.seen import look, write_statement
from pipelines.shards.audit.recorded import IN_THREADS
from pipelines.signing import Signer
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion
from tests.pipelines.provenance.logged import BATCH, config_of, given, id_of, train_logged
from tests.pipelines.shards.tars import picture
from tests.pipelines.shards.test_joined import write_source

STORAGE = Storage()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs "first" and "second" on two datasets of one root, and "tuned", which began from "first" after 40 images."""
    folder = tmp_path_factory.mktemp("seen")
    for name, first in (("one", 0), ("other", 100)):
        (folder / "datasets").mkdir(exist_ok=True)
        write_source(folder / "datasets" / name, ["cat", "dog"], np.arange(first, first + 30), splits=("train", "test"))
    runs = {"first": "one", "second": "other", "tuned": "other"}
    for run, data in runs.items():
        origin = {"init_from": f"runs:/{id_of('first')}/{2 * BATCH}"} if run == "tuned" else {}
        config = config_of(folder, 5, f"data.uri=file://{folder}/datasets/{data}", f"name={run}")
        config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 2 * BATCH})})
        log = folder / run
        log.mkdir()
        train_logged(folder, config, log=log, origin=origin)
    return folder


def configured(root):
    return compose(["+experiment=digits", "storage=file", f"storage.root=file://{root}", "tracking.uri=null"])


def sought(root, what, **options):
    return look(Query.parse(what, STORAGE), configured(root), lambda: IN_THREADS, **options)


def saved(root, value):
    path = root / f"sought-{value}.png"
    path.write_bytes(picture(value, mode="L"))
    return str(path)


def test_a_picture_is_found_with_all_that_was_trained_on_it(root):
    seen = sought(root, saved(root, 7), near=False)
    assert {(match.uri, match.split, match.key) for match in seen.matches} == {
        (f"file://{root}/datasets/one", split, "0007") for split in ("train", "test")
    }
    first, tuned = seen.exposures
    log = given(root / "first")
    expected = sorted(ordinal for ordinal, value in log.items() if value == 7)
    assert [each.ordinal for each in first.occurrences] == expected
    assert first.training.run == "first"
    assert tuned.training.run == "tuned"
    assert tuned.occurrences == ()
    before = sum(ordinal < 2 * BATCH for ordinal in expected)
    origin, words = f"runs:/{id_of('first')}/{2 * BATCH}", f"{before} time{'s' * (before != 1)}"
    assert tuned.through == (f"{origin}, which is run 'first' and had been given it {words}",)
    checkpoints = {kept.images_seen: first.times(kept.images_seen) for kept in first.training.kept}
    assert checkpoints == {n: sum(ordinal < n for ordinal in expected) for n in checkpoints}
    assert max(checkpoints) == 5 * BATCH
    assert seen.versions is None


def test_a_picture_that_is_nowhere_has_been_seen_by_nothing(root):
    seen = sought(root, saved(root, 77))
    assert (seen.matches, seen.exposures) == ((), ())
    assert next(seen.lines()).startswith("in none of 2 datasets")


def test_versions_are_named_with_how_often_their_checkpoint_was_given_it(root, monkeypatch):
    def version(number, run, images, *aliases):
        return ModelVersion("digits", number, id_of(run), {"images_seen": str(images)}, aliases)

    there = [version("3", "tuned", 5 * BATCH, "champion"), version("2", "second", BATCH), version("1", "first", 0)]
    there.append(version("4", "first", 5 * BATCH))
    monkeypatch.setattr("pipelines.tracking.all_versions", lambda uri: there)
    monkeypatch.setattr("pipelines.tracking.list_runs", lambda uri: [])
    config = configured(root)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    seen = look(Query.parse(saved(root, 7), STORAGE), config, lambda: IN_THREADS, near=False)
    found = {each.version.version: each.times for each in seen.versions}
    assert found.keys() == {"3", "4"}
    assert found["3"] == 0
    assert found["4"] == len(seen.exposures[0].occurrences)
    assert any("models:/digits/3 @champion: run 'tuned'" in line for line in seen.lines())


def test_what_judges_models_by_the_picture_is_named_with_what_the_picture_is_in_it(root, monkeypatch):
    one, other = f"file://{root}/datasets/one", f"file://{root}/datasets/other"
    for uri in (one, other):
        for name in ("evaluator/abc/evaluator.json", "features/abc/real.json"):
            STORAGE.write(f"{uri}/{name}", b"{}")
        STORAGE.write(
            f"file://{root}/studies/of-{uri[-3:]}/study.json", json.dumps({"config": {"data": {"uri": uri}}}).encode()
        )
    STORAGE.write(f"file://{root}/studies/damaged/study.json", b"{")
    tags = {"images_seen": "0", "scores": "{}", "dataset_uri": one}
    there = [ModelVersion("digits", "1", "0" * 32, tags, ()), ModelVersion("digits", "2", "0" * 32, {}, ())]
    monkeypatch.setattr("pipelines.tracking.all_versions", lambda uri: there)
    monkeypatch.setattr("pipelines.tracking.list_runs", lambda uri: [])
    config = configured(root)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    seen = look(Query.parse(saved(root, 7), STORAGE), config, lambda: IN_THREADS, near=False)
    roles = {judge.address: judge.role for judge in seen.judges}
    study = f"file://{root}/studies/of-one"
    assert roles.keys() == {f"{one}/evaluator/abc", f"{one}/features/abc", "models:/digits/1", study}
    assert "trained on it" in roles[f"{one}/evaluator/abc"]
    as_both = "as a reference (split train) and as a test image (split test)"
    assert all(as_both in roles[judge] for judge in (f"{one}/features/abc", "models:/digits/1", study))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_statement_is_verified_by_openssl_with_the_public_key_alone_and_a_changed_one_is_not(
    root, tmp_path, monkeypatch
):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path))
    config = configured(root)
    signer = Signer.of(config.registry)
    seen = look(Query.parse(saved(root, 7), STORAGE), config, lambda: IN_THREADS, near=False)
    path, signature = write_statement(seen, tmp_path / "statement.json", signer)
    said = json.loads(path.read_text())
    assert said["trainings"][0]["occurrences"] == [each.ordinal for each in seen.exposures[0].occurrences]
    assert "does not prove" in said["does_not_prove"]
    assert "sought-7" not in path.read_text()
    public = tmp_path / "key.pub"
    subprocess.run(["openssl", "pkey", "-in", str(signer.key), "-pubout", "-out", str(public)], check=True)
    signer.key.rename(tmp_path / "gone")

    def verified():
        command = ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(signature), str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    assert verified() == "Verified OK"
    path.write_text(path.read_text().replace('"times": ', '"times": 1', 1))
    assert verified() == "Verification failure"


def test_the_verb_says_the_same(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = ["storage=file", f"storage.root=file://{root}"]
    monkeypatch.setattr("sys.argv", ["ddpm", "seen", saved(root, 7), *settings, "--exact", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    captured = capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    assert answer == json.loads(json.dumps(sought(root, saved(root, 7), near=False).to_dict()))
    first = answer["trainings"][0]
    assert f"run 'first': {first['times']} times in {5 * BATCH} images" in " ".join(captured.err.split())


def test_all_stored_checkpoints_are_known(root):
    (exposure, _) = sought(root, saved(root, 7), near=False).exposures
    stored = complete_checkpoints(STORAGE, f"file://{root}/runs/first")
    assert {kept.images_seen for kept in exposure.training.kept} == {state.images_seen for _, state in stored}
