"""The whole way on real services: what a user types, and what S3 and MLflow hold afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
import webdataset
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.storage import Storage
from tests.integration.conftest import DIGITS, SCORED, Shell
from tests.integration.workers import slow_steps
from tests.networks import TINY_UNET

pytestmark = pytest.mark.integration

SHORT = [*DIGITS, *SCORED]
FEW = ["evaluation.n=40", "evaluation.seeds=1", "evaluation.likelihood_images=0"]
"""Where it matters whether something is scored, and not how well."""


@pytest.fixture
def client(local_stack) -> MlflowClient:
    return MlflowClient(tracking_uri=local_stack.tracking_uri)


def test_the_run_holds_curves_grids_config_and_lineage(digits, client, tmp_path):
    experiment = client.get_experiment_by_name("ddpm")
    runs = client.search_runs([experiment.experiment_id], "tags.`ddpm.run` = 'digits'")
    assert [run.info.run_id for run in runs] == [digits.answer["run_id"]]
    run = runs[0]
    assert run.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6400
    assert len(steps) == 10
    losses = [m.value for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert losses[-1] < losses[0] / 2
    assert run.data.params["optim.lr"] == "0.002"
    assert run.data.tags["dataset_digest"] == digits.answer["scores"]["dataset_digest"]
    assert len(run.data.tags["git_commit"]) >= 7
    grids = [i.path for i in client.list_artifacts(run.info.run_id, "images") if "samples" in i.path]
    assert len([path for path in grids if path.endswith(".png")]) == 6  # one of them before the first step
    names = {i.path for i in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "checkpoints", "evaluation"} <= names
    config = json.loads(Path(client.download_artifacts(run.info.run_id, "config.json", str(tmp_path))).read_text())
    assert config["images"] == 6400
    assert run.data.metrics["eval/frechet_floor"] < run.data.metrics["eval/frechet_distance"]


def test_the_page_of_the_run_tells_its_score_its_version_its_goodput_and_shows_its_newest_samples(digits, client):
    run = client.get_run(digits.answer["run_id"])
    note = run.data.tags["mlflow.note.content"]
    labels = re.findall(r"^\*\*(\w+)\.\*\* ", note, re.MULTILINE)
    assert labels == ["Training", "Score", "Registered", "Goodput", "Samples", "Commands"]
    distance = digits.answer["scores"]["estimates"]["frechet_distance"]["value"]
    assert f"Frechet {distance:.2f}" in note
    assert "[digits version 1](#/models/digits/versions/1?workflowType=machine_learning)" in note
    assert digits.answer["mlflow"].endswith(f"/runs/{run.info.run_id}?workflowType=machine_learning")
    (shown,) = re.findall(r"!\[evaluation\]\((.*?)\)", note)
    assert requests.get(f"{client.tracking_uri}/{shown}", timeout=30).content[:4] == b"\x89PNG"
    assert {key.split("/")[0] for key in run.data.metrics} - {"system"} == {"eval", "train", "updates", "worker"}


def test_the_logged_model_has_the_scores_and_the_loss_of_its_images(digits, client):
    version = client.get_model_version("digits", "1")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.source_run_id == version.run_id == digits.answer["run_id"]
    points = {m.key: m for m in model.metrics}
    assert {"train/loss", "eval/frechet_distance", "eval/class_accuracy"} <= points.keys()
    assert not [key for key in points if key.startswith("system/")]
    assert {m.step for m in model.metrics} == {6400}


CHOICE = "whole shards are cached on this node: .*"
STAGES = {
    "s3", "mlflow", "ray", "ingest", "note", "dataset", "report", "train", "goodput", "evaluator", "evaluate",
    "accuracy", "variety", "bits/dim", "copies", "distance", "gate", "register", "registry", "grid",
}  # fmt: skip


def test_nothing_but_our_own_lines_is_on_the_terminal_of_a_healthy_run(digits):
    """Neither Ray's banners and logs nor anybody's deprecation and other warnings, nor a warning of ours."""
    foreign = [line for line in digits.err.splitlines() if line[:10].strip() not in STAGES or line[10:12] != "  "]
    assert foreign == []
    chosen = re.findall(rf"^     train  rank 0: {CHOICE}$", digits.err, re.MULTILINE)
    assert len(chosen) == 1
    assert not re.search(r"(?i)warn|deprecat|traceback|rank \d", digits.err.replace(chosen[0], ""))


def test_a_healthy_runs_workers_say_how_they_read_and_nothing_else(digits, shell):
    said = shell.ok("logs", "digits", "--json")
    ours = [line for line in said.answer["lines"] if line["logger"].startswith(("pipelines", "ddpm"))]
    assert [(line["level"], line["rank"]) for line in ours] == [("INFO", 0)]
    assert re.fullmatch(CHOICE, ours[0]["message"])


def test_a_report_holds_what_is_recorded_of_a_version_and_is_kept_with_its_run(digits, shell, client, tmp_path):
    done = shell.ok("report", "models:/digits/1", "--out", "report.html", "--json")
    before = ["training", "data", "time", "curves", "scores"]
    expected = [*before, "gate", "samples", "growth", "film", "levels", "nearest"]
    assert [name for name in done.answer["sections"] if name != "settings"] == expected  # others may score it too
    text = (shell.folder / done.answer["path"]).read_text()
    assert set(re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', text)) == {digits.answer["mlflow"]}
    distance = digits.answer["scores"]["estimates"]["frechet_distance"]["value"]
    assert f'<td class="n">{distance:.4g} (' in text
    (goodput,) = re.findall(r"Goodput, here ([\d.]+)%", text)
    recorded = client.get_run(digits.answer["run_id"]).data.metrics["train/goodput"]
    assert float(goodput) == pytest.approx(100 * recorded, abs=2)  # the ledger's last seconds come after the curve's
    assert text.count("<figure data-name=") == 6  # as many as there are grids
    kept = client.download_artifacts(digits.answer["run_id"], "report.html", str(tmp_path))
    assert Path(kept).read_text() == text

    read = shell.ok("report", "digits", "--no-model", "--no-log", "--json")
    assert read.answer["path"] == "report-digits.html"
    assert (read.answer["mlflow"], "film" in read.answer["sections"]) == (None, False)
    wrong = shell("report", "nowhere")
    assert wrong.code == 1
    assert "no run 'nowhere' in experiment 'ddpm'" in wrong.err


def test_the_registry_holds_version_one_as_champion_with_its_evidence(digits, client):
    version = client.get_model_version_by_alias("digits", "champion")
    assert version.version in (1, "1")
    assert version.run_id == digits.answer["run_id"]
    scores = json.loads(version.tags["scores"])
    assert scores == digits.answer["scores"]
    assert scores["n"] == 359
    assert {"git_commit", "dataset_digest", "model_digest", "code_version", "sampling"} <= set(version.tags)
    assert version.tags["gate.champion"].startswith("passed")


def test_s3_holds_shards_evaluator_checkpoints_and_artifacts(digits, s3: Storage):
    objects = {entry.uri.removeprefix("s3://ddpm/"): entry.size for entry in s3.list("s3://ddpm")}
    assert {"datasets/digits/dataset.json", "runs/digits/checkpoints.json"} <= set(objects)
    (published,) = {name.split("/")[3] for name in objects if name.startswith("runs/digits/published/")}
    assert published.startswith("000000006400-e1-")
    assert any(name.startswith("datasets/digits/evaluator/") for name in objects)
    assert any(name.startswith("mlflow/") for name in objects)
    kept = {name.split("/")[2] for name in objects if name.startswith("runs/digits/checkpoint_")}
    assert len(kept) == 2
    assert f"checkpoint_{published}" in kept
    assert not [name for name in objects if name.endswith((".pkl", ".pt", ".pickle")) and "runs/" in name]


def test_plain_webdataset_reads_every_image_once(digits, s3: Storage, tmp_path: Path):
    s3.download_folder("s3://ddpm/datasets/digits", tmp_path)
    shards = sorted(str(p) for p in tmp_path.glob("*.tar"))
    seen = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls"))
    assert len(seen) == len({key for key, _, _ in seen}) == 1797
    assert {image.size for _, image, _ in seen} == {(8, 8)}
    assert {label for _, _, label in seen} == set(range(10))


def test_a_second_flow_skips_every_stage(digits, shell, client):
    again = shell.ok("flow", *SHORT, "--json")
    assert again.answer["skipped"] == ["ingest", "train", "evaluator", "evaluate", "register", "gate"]
    assert again.answer["scores"] == digits.answer["scores"]
    assert again.answer["model"] == digits.answer["model"]
    assert len(client.search_model_versions("name = 'digits'")) == 1


def test_a_dry_run_says_what_would_run_and_leaves_no_trace(digits, shell, client, s3):
    before = stored(s3), [run.info.run_id for run in client.search_runs(["1"])]
    same = shell.ok("flow", *SHORT, "--dry-run", "--json")
    assert [(stage["name"], stage["runs"]) for stage in same.answer["stages"]] == [
        (name, False) for name in ("ingest", "train", "evaluator", "evaluate", "register", "gate")
    ]
    assert "gate  will be skipped: champion is at version 1 already" in same.err
    other = shell.ok("flow", *SHORT, "sampler.steps=9", "--dry-run", "--json")
    assert [stage["runs"] for stage in other.answer["stages"]] == [False, False, False, True, True, True]
    assert "evaluate  will run: the model of 6,400 images was not scored with these settings yet" in other.err
    early = shell("flow", *SHORT, "name=nobody", "--from", "evaluate", "--dry-run")
    assert (early.code, "the result of train, which comes before, is not there" in early.err) == (2, True), early.err
    assert (stored(s3), [run.info.run_id for run in client.search_runs(["1"])]) == before


def test_samples_do_not_depend_on_the_batch_size(digits, shell):
    options = ["--labels", "0,1,2", "--guidance", "2", "--steps", "10", "--count", "3", "--seed", "7"]
    first = shell.ok("sample", "models:/digits@champion", *options, "--batch-size", "9", "--out", "a", "--json")
    second = shell.ok("sample", "models:/digits/1", *options, "--batch-size", "2", "--out", "b", "--json")
    assert len(first.answer["files"]) == 10
    for one, other in zip(first.answer["files"][:-1], second.answer["files"][:-1], strict=True):
        pixels = [np.asarray(Image.open(shell.folder / path)).astype(int) for path in (one, other)]
        assert pixels[0].shape == (8, 8)
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert Image.open(shell.folder / first.answer["files"][-1]).mode == "RGB"


def test_the_registered_pyfunc_gives_the_images_of_ddpm_sample(digits, shell, local_stack):
    mlflow.set_tracking_uri(local_stack.tracking_uri)
    model = mlflow.pyfunc.load_model("models:/digits@champion")
    import pandas

    frame = pandas.DataFrame({"label": np.array([0, 1, 2], dtype=np.int64)})
    images = model.predict(frame, params={"scale": 2.0, "steps": 10, "seed": 7})
    assert images.shape == (3, 8, 8, 1)
    assert images.dtype == np.uint8
    options = ["--labels", "0,1,2", "--guidance", "2", "--steps", "10", "--seed", "7", "--out", "c", "--json"]
    files = shell.ok("sample", "models:/digits@champion", *options).answer["files"][:-1]
    drawn = np.stack([np.asarray(Image.open(shell.folder / path)) for path in files])
    assert np.abs(drawn.astype(int) - images[..., 0].astype(int)).max() <= 1


def test_published_checkpoints_are_named_by_run_and_images(digits, shell):
    run = f"runs:/{digits.answer['run_id']}"
    newest = shell.ok("sample", run, "--labels", "3", "--steps", "5", "--out", "d", "--json")
    named = shell.ok("sample", f"{run}/6400", "--labels", "3", "--steps", "5", "--out", "e", "--json")
    one, other = [(shell.folder / done.answer["files"][0]).read_bytes() for done in (newest, named)]
    assert one == other
    best = shell.ok("sample", f"{run}/best", "--labels", "3", "--steps", "5", "--out", "g", "--json")
    assert (shell.folder / best.answer["files"][0]).read_bytes() == one  # there is one
    averaged = shell.ok("sample", f"{run}/sigma_rel=0.1", "--labels", "3", "--steps", "5", "--out", "h", "--json")
    assert (shell.folder / averaged.answer["files"][0]).read_bytes() != one
    missing = shell("sample", f"{run}/123", "--out", "f")
    assert missing.code == 1
    assert "the run has: 6400" in missing.err


@pytest.mark.slow  # the gate's own tests refuse a worse version on every run
def test_a_weaker_model_does_not_take_the_alias(digits, shell, client):
    weak = shell.ok("flow", *SHORT, "name=weak", "images=1280", "registry.model=digits", "--json")
    assert not weak.answer["gate"]["passed"]
    assert weak.answer["gate"]["reason"].startswith(("not noise: ", "not collapsed: ", "worse: "))
    assert str(client.get_model_version_by_alias("digits", "champion").version) == "1"
    assert shell("promote", "models:/digits/2", "--alias", "champion", "registry.n=359").code == 1


LONG = [
    "+experiment=digits", "name=interrupted", "optim.decay=constant", "tracking.log_every=640", *TINY_UNET,
    "tracking.grid_every=null",
]  # fmt: skip
ENDLESS = 100_000_000


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_name_resumes_there(digits, shell: Shell, client, local_stack):
    with slow_steps(local_stack.home):
        process = shell.start("train", *LONG, f"images={ENDLESS}", "--json")
        assert process.stderr is not None
        assert process.stdout is not None
        deadline, said = time.monotonic() + 120, ""
        while not re.search(r"[1-9]\d* images, [\d,]+/s", said):  # a line of progress, not the run's announcement
            said = process.stderr.readline()
            assert time.monotonic() < deadline
        second = shell("train", *LONG, f"images={ENDLESS}")
        assert (second.code, "is being trained by another driver" in second.err) == (1, True), second.err[-1500:]
        removed = shell("rm", "interrupted", "--yes")
        assert (removed.code, "may be being trained" in removed.err) == (1, True), removed.err[-1500:]
        (row,) = [row for row in shell.ok("runs", "--json").answer["runs"] if row["name"] == "interrupted"]
        assert row["state"] == "running"
        follower = shell.start("logs", "interrupted", "--follow", "--json")
        time.sleep(8)
        assert follower.poll() is None  # it goes on as long as the run does
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    _, followed = follower.communicate(timeout=60)
    assert (follower.returncode, "is not being trained (KILLED)" in followed) == (0, True), followed
    assert "press Ctrl-C again" in err
    stopped = json.loads(out.strip().splitlines()[-1])
    assert stopped["status"] == "stopped"
    assert 0 < stopped["images_seen"] < ENDLESS

    more = stopped["images_seen"] + 1280
    resumed = shell.ok("train", *LONG, f"images={more}", "--json")
    assert f"resuming run 'interrupted' at {stopped['images_seen']:,}" in resumed.err
    assert resumed.answer["run_id"] == stopped["run_id"]
    assert resumed.answer["images_seen"] == more
    ledger = resumed.answer["goodput"]
    assert (ledger["sessions"], ledger["attempts"], ledger["recomputed_images"]) == (2, 2, 0)
    assert "2 starts of the workers, 2 of the driver" in resumed.err
    run = client.get_run(stopped["run_id"])
    assert run.data.metrics["train/goodput"] == pytest.approx(ledger["fraction"])
    assert f"{ledger['fraction']:.1%}: {ledger['productive_s']:,.0f} of " in run.data.tags["mlflow.note.content"]
    table = client.download_artifacts(stopped["run_id"], "goodput.html", str(shell.folder))
    assert "2 of the workers, 2 of the driver" in Path(table).read_text()
    steps = [m.step for m in client.get_metric_history(stopped["run_id"], "train/loss")]
    assert len(steps) == len(set(steps))

    other = shell("train", *LONG, f"images={more + 1280}", "optim.lr=0.5")
    assert other.code == 1
    assert "optim.lr: 0.002 before, 0.5 now" in other.err
    done = shell.ok("train", *LONG, f"images={more}", "--json")
    assert done.answer["status"] == "complete"


def stored(s3: Storage, address: str = "s3://ddpm") -> dict[str, tuple[int, str]]:
    return {entry.uri: (entry.size, entry.tag) for entry in s3.list(address)}


def test_runs_shows_state_images_score_and_size(digits, shell, s3):
    (row,) = [row for row in shell.ok("runs", "--json").answer["runs"] if row["name"] == "digits"]
    assert (row["state"], row["images_seen"], row["run_id"]) == ("finished", 6400, digits.answer["run_id"])
    name, value = row["score"]
    scored = digits.answer["scores"]["estimates"]["frechet_distance"]["value"]
    assert (name, value) == ("frechet_distance", pytest.approx(scored))
    assert row["size"] == sum(size for size, _ in stored(s3, "s3://ddpm/runs/digits").values())
    assert time.time() - row["when"] < 3600


def test_rm_removes_a_run_and_nothing_else_and_no_run_that_the_registry_names(digits, shell, s3, client):
    before = stored(s3)
    refused = shell("rm", "digits", "--yes")
    assert refused.code == 1
    assert re.search(r"models:/digits/1 (@candidate )?@champion", refused.err), refused.err

    for uri in stored(s3, "s3://ddpm/runs/digits"):
        s3.copy(uri, uri.replace("/runs/digits/", "/runs/copied/"))
    experiment = client.get_experiment_by_name("ddpm").experiment_id
    run_id = client.create_run(experiment, run_name="copied", tags={"ddpm.run": "copied"}).info.run_id
    client.set_terminated(run_id, "KILLED")
    removed = shell.ok("rm", "copied", "--yes", "--json")
    assert removed.answer["run_ids"] == [run_id]
    assert "published checkpoints in it: 000000006400" in removed.err
    assert stored(s3) == before
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    again = shell("rm", "copied", "--yes")
    assert (again.code, "no run 'copied'" in again.err) == (1, True), again.err


def test_gc_finds_a_published_checkpoint_that_nothing_names_and_deletes_only_that(digits, shell, s3):
    before = stored(s3)
    folder = "s3://ddpm/runs/digits/published"
    (published,) = {uri.rsplit("/", 1)[0] for uri in stored(s3, folder)}
    orphan = f"{folder}/000000009999-e1-orphan"
    for uri in stored(s3, published):
        s3.copy(uri, uri.replace(published, orphan))
    described = json.loads(s3.read(f"{orphan}/model.json"))
    described["lineage"]["images_seen"] = 9999  # else the registered version names it
    s3.write(f"{orphan}/model.json", json.dumps(described).encode())

    young = shell.ok("gc", "--dry-run", "--json").answer
    assert young == {"garbage": [], "deleted": []}
    found = shell.ok("gc", "--dry-run", "--older-than", "0", "--json")
    assert [(g["address"], g["why"]) for g in found.answer["garbage"] if "/runs/digits/" in g["address"]] == [
        (orphan, "run 'digits' has finished and does not record it")
    ]
    assert len(stored(s3, orphan)) == len(stored(s3, published))
    done = shell.ok("gc", "--yes", "--older-than", "0", "--json").answer
    assert orphan in done["deleted"]
    after = stored(s3)
    assert not stored(s3, orphan)
    assert {uri for uri in before if not uri.startswith(tuple(f"{a}/" for a in done["deleted"]))} == after.keys()
    assert stored(s3, published)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["train", "+experiment=digits", "modle.width=3"], 2, "Did you mean 'model'?"),
        (["train", "+experiment=digits", "name=big", "cluster.num_workers=64"], 1, "too small for 64 workers"),
        (["train", "+experiment=digits", "data.uri=s3://ddpm/nothing"], 1, "no dataset at s3://ddpm/nothing"),
        (["train", "+experiment=digits", "storage.root=s3://other"], 2, "the local stack has the bucket ddpm"),
        pytest.param(
            ["train", "+experiment=digits", "name=off", "tracking.uri=http://127.0.0.1:9"],
            1,
            "no answer from MLflow",
            marks=pytest.mark.slow,  # a first answer is waited for
        ),
        (["sample", "models:/nobody@champion", "--out", "x"], 1, "not in the registry"),
        (["sample", "models:/digits@champion", "--labels", "eleven", "--out", "x"], 2, "no class 'eleven'"),
        (["sample", "nowhere", "--out", "x"], 1, "names no model"),
        (["ingest", "missing-folder", "--to", "s3://ddpm/datasets/x"], 2, "is not a folder"),
    ],
)
def test_mistakes_are_named_before_anything_starts(digits, shell, arguments, code, message):
    failed = shell(*arguments)
    assert (failed.code, message in failed.err) == (code, True), failed.err[-1500:]
    assert "Traceback" not in failed.err


@contextmanager
def edited(s3: Storage, uri: str, change):
    """Change a file that the tests share, and put it back."""
    before = s3.read(uri)
    s3.write(uri, change(before))
    try:
        yield
    finally:
        s3.write(uri, before)


def test_an_edited_evaluator_and_edited_features_of_real_images_are_named_and_not_used(digits, shell, s3: Storage):
    run, fewer = f"runs:/{digits.answer['run_id']}", (*SHORT, *FEW)  # which were not scored yet
    there = {entry.uri.rpartition("/")[2]: entry.uri for entry in s3.list("s3://ddpm/datasets/digits")}

    with edited(s3, there["evaluator.json"], lambda content: json.loads(content)["record"].encode()):
        for verb in ("evaluate", "register"):
            refused = shell(verb, run, *fewer)
            assert refused.code == 1
            assert f"{there['evaluator.json']}: this evaluator decides every score, and is not believed" in refused.err

    other = s3.read(there["test-000000000.safetensors"])
    with edited(s3, there["train-000000000.safetensors"], lambda content: other):
        refused = shell("evaluate", run, *fewer)
    assert refused.code == 1
    assert f"{there['train-000000000.safetensors']} is gone, or not what real.json beside it says" in refused.err

    believed = shell.ok("evaluate", run, *fewer, "--json").answer
    with edited(s3, there["real.json"], lambda content: content.replace(b"class_counts", b"class_count5")):
        again = shell.ok("evaluate", run, *fewer, "evaluation.seed=50", "--json")
    assert "the real images are read and encoded, because what is stored of them in" in again.err
    assert again.answer["estimates"]["frechet_distance"]["floor"] == believed["estimates"]["frechet_distance"]["floor"]


def test_edited_scores_and_samples_are_named_and_made_again_as_they_were(
    digits, shell: Shell, s3: Storage, client, tmp_path
):
    run_id, scores = digits.answer["run_id"], digits.answer["scores"]
    paths = [info.path for info in client.list_artifacts(run_id, "evaluation")]
    texts = {path: Path(client.download_artifacts(run_id, path, str(tmp_path))).read_text() for path in paths}
    (artifact,) = [path for path, text in texts.items() if json.loads(text) == scores]
    edited = json.loads(texts[artifact])
    edited["estimates"]["class_accuracy"]["value"] = 0.9999
    client.log_text(run_id, json.dumps(edited), artifact)
    rows = [entry.uri for entry in s3.list(scores["samples"]) if entry.uri.endswith(".safetensors")]
    s3.write(rows[0], s3.read(rows[1]))

    again = shell.ok("evaluate", f"runs:/{run_id}", *SHORT, "--json")
    assert f"scored again: the scores that the run has, {artifact}, are not believed: they were changed" in again.err
    assert f"{rows[0]} was made again: it is gone, or not what was stored" in again.err
    assert again.answer["estimates"] == scores["estimates"]
    read = shell.ok("evaluate", f"runs:/{run_id}", *SHORT, "--json")
    assert "scored with these settings already" in read.err
    assert read.answer["estimates"] == scores["estimates"]


def test_another_network_under_the_name_of_a_guide_makes_other_scores(digits, shell: Shell, tmp_path):
    weak = shutil.copytree("tests/fixtures/earlier/version/model", tmp_path / "weak")
    guided = ("guidance.kind=auto", f"guidance.weak={weak}", "guidance.scale=2")
    asked = ("evaluate", f"runs:/{digits.answer['run_id']}", *SHORT, *guided, *FEW, "--json")
    first = shell.ok(*asked)
    assert "scored with these settings already" in shell.ok(*asked).err
    weights = load_file(weak / "model.safetensors")
    save_file({name: 0.5 * tensor for name, tensor in weights.items()}, weak / "model.safetensors")
    swapped = shell.ok(*asked)
    assert "scored with these settings already" not in swapped.err
    assert swapped.answer["samples"] != first.answer["samples"]
    assert swapped.answer["estimates"] != first.answer["estimates"]
