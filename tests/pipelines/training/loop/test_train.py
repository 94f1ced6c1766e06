"""The loop of one rank in this process; what several ranks agree on is in test_invariance.py."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from ddpm import prediction
from ddpm.conditioning import Conditioning
from ddpm.model import load_classifier, load_model
from ddpm.objectives import Objective
from pipelines import checkpoints
from pipelines.checkpoints import ModelError, complete_checkpoints
from pipelines.evaluation.plots import MIN_TILE
from pipelines.shards.ingest.write import ingest
from pipelines.shards.order import SampleOrder
from pipelines.shards.source import ShardCorruptError
from pipelines.storage import Storage
from tests.forked import start_ranks
from tests.pipelines.shards.ingest.sources import jsonl, pictures, write_files
from tests.pipelines.training.loop.ranks import (
    NO_GRIDS,
    SMALL,
    last_checkpoint,
    run_ranks,
    tiny_config,
    trace,
    train_here,
)
from tests.times import ROOT

STEPS, BATCH = 6, 25


def run(folder, dataset, *overrides, **requests):
    folder.mkdir(exist_ok=True)
    return train_here(folder, dataset, tiny_config(folder, STEPS * BATCH, BATCH, *SMALL, *overrides), **requests)


def losses(folder):
    return torch.tensor(list(trace(folder).values()), dtype=torch.float64)


def test_from_the_loop_of_a_rank_to_its_loss_there_are_three_functions(digits, tmp_path, monkeypatch):
    ways = set()
    compute = Objective.losses

    def noted(self, *arguments, **options):
        frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        ways.add(tuple(f"{path.stem}.{name}" for path, name in frames if path.is_relative_to(ROOT / "pipelines")))
        return compute(self, *arguments, **options)

    monkeypatch.setattr(Objective, "losses", noted)
    run(tmp_path, digits, NO_GRIDS)
    assert ways == {("train.train_rank", "train.step", "losses.losses")}


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    """A model that predicts v, to be tuned."""
    folder = tmp_path_factory.mktemp("teacher")
    run(folder, digits, "objective.prediction=v", NO_GRIDS)
    return last_checkpoint(folder)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """The folder of a run that has ended and that nothing changes."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, digits)
    return folder


CONSISTENCY = ["objective=consistency", "objective.prediction=v", "optim=radam", "sampler=consistency"]


@pytest.mark.parametrize(
    "objective",
    [
        ["objective=hybrid", "model.learned_variance=true", "objective.timesteps=stratified"],
        ["objective=min_snr", "objective.prediction=v", "schedule.zero_terminal_snr=true"],
        ["objective.loss=vlb"],
        ["model.inpainting=true", "model.class_conditional=false"],
        ["objective.timesteps=importance", "schedule.num_steps=4", "sampler.steps=2"],
        CONSISTENCY,
        [*CONSISTENCY, "objective.consistency_guidance=2"],
        [
            *("objective=edm", "objective.prediction=x0_skip", "objective.learned_weight=true"),
            *("objective.noise_candidates=3", "optim.kind=muon"),
        ],
    ],
    ids=["hybrid", "min_snr", "vlb", "inpainting", "importance", "consistency", "guided consistency", "methods"],
)
def test_every_objective_trains_with_a_trace_that_is_the_same_in_parts(digits, teacher, tmp_path, objective):
    objective = [*objective, f"init_from={teacher}"] if "objective=consistency" in objective else objective
    run(tmp_path / "whole", digits, *objective)
    run(tmp_path / "parts", digits, "micro_batch_size=7", NO_GRIDS, *objective)
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-3, atol=0)
    model = load_model(last_checkpoint(tmp_path / "whole"))
    labels = torch.tensor([3]) if model.spec.classes else None
    assert model.generate(labels, count=1).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["objective.timesteps=importance", "schedule.num_steps=4", "sampler.steps=2"],
        [*CONSISTENCY, "objective.consistency_guidance=2"],
        ["objective.prediction=v", "objective.learned_weight=true", "objective.noise_candidates=3", "optim.kind=muon"],
    ],
    ids=["simple", "importance", "guided consistency", "learned weight and muon"],
)
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(digits, teacher, tmp_path, extra):
    extra = [*extra, "optim.power_ema=[0.05,0.1]"]
    extra += [f"init_from={teacher}"] if "objective=consistency" in extra else []
    run(tmp_path / "whole", digits, *extra)
    first, _ = run(tmp_path / "parts", digits, *extra, NO_GRIDS, stop_after=3)
    assert [r.images_seen for r in first.reports] == [25, 50, 75, 75]  # and once more at its end
    second, _ = run(tmp_path / "parts", digits, *extra, NO_GRIDS)
    assert {r.resumed_at for r in second.reports} == {75}
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    one, other = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    for name in ("model.safetensors", "training.safetensors", "power_ema.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    state = json.loads((other / "state.json").read_text())
    assert (state["images_seen"], state["optimizer_steps"], state["skipped"]) == (STEPS * BATCH, STEPS, 0)


def test_a_run_that_has_seen_all_its_images_does_nothing_more(digits, finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")}
    shell, tracker = run(finished, digits)
    assert (shell.reports, tracker.points) == ([], {})
    assert {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")} == before


def test_a_requested_checkpoint_is_saved_at_the_step_boundary_and_training_goes_on(digits, tmp_path, caplog):
    shell, _ = run(tmp_path / "r", digits, NO_GRIDS, checkpoint_after=2)
    assert caplog.messages.count("a node is about to be taken away: a checkpoint is saved at 50 images") == 1
    complete = complete_checkpoints(Storage(), f"file://{tmp_path}/r/runs/digits")
    assert [state.images_seen for _, state in complete] == [STEPS * BATCH, 50]
    assert len(shell.reports) == STEPS + 1  # and once more at its end


def test_the_seconds_of_an_attempt_add_up_and_what_is_stored_is_counted(digits, tmp_path):
    shell, _ = run(tmp_path / "r", digits, "tracking.grid_every=50", checkpoint_after=2)
    last = shell.reports[-1]
    assert set(last.seconds) == {"startup", "step", "data", "checkpoint", "grid"}
    assert all(last.seconds[kind] > 0 for kind in ("startup", "step", "data", "checkpoint", "grid"))
    saved = (tmp_path / "r" / "runs" / "digits").glob("checkpoint_*/*")
    assert last.uploaded_bytes == sum(f.stat().st_size for f in saved if f.is_file())
    assert last.upload_s > 0


def test_curves_are_by_images_seen_and_have_speed_and_health(digits, tmp_path):
    shell, tracker = run(tmp_path / "r", digits, "tracking.log_every=75", NO_GRIDS, "cluster.peak_tflops=0.1")
    assert sorted(tracker.points) == [75, 150]
    first = tracker.points[75]
    assert list(first)[:2] == ["train/loss", "train/images_per_s"]  # MLflow lists them so
    assert first["train/loss"] == pytest.approx(sum(r.loss for r in shell.reports[:3]) / 3)
    assert first["train/images_per_s"] > 0
    assert first["updates/grad_norm"] > 0
    assert first["worker/memory_gib"] > 0
    assert 0 <= first["worker/data_wait_share"] <= 1
    assert 0 < first["worker/mfu"] < 1
    assert first["updates/skipped"] == 0


def test_grids_of_a_model_that_is_served_compiled_are_not(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "_compiled_call", lambda: pytest.fail("a network was compiled for a grid"))
    run(tmp_path / "r", digits, "tracking.grid_every=50", "sampler.compile=true")
    assert load_model(last_checkpoint(tmp_path / "r")).spec.sampling.arithmetic.compile


def test_grids_are_drawn_from_averaged_weights_and_leave_training_as_it_was(digits, tmp_path):
    def grids(name, *overrides):
        return run(tmp_path / name, digits, "optim.lr=0.05", "optim.warmup_images=0", *overrides)[0].shown

    grids("without", "tracking.grid_every=null")
    short, long = (grids(f"{h}", "tracking.grid_every=25", f"optim.ema_half_life={h}") for h in (1, 100_000))
    assert len(short) == len(long) == STEPS
    assert not (short[-1] == long[-1]).all()
    for name in ("1", "100000"):
        assert trace(tmp_path / name) == trace(tmp_path / "without")


@pytest.mark.parametrize(
    "conditions, rows, columns, header",
    [([], 1, 6, 18), (["model.inpainting=true"], 3, 2, 0)],  # captions and known pixels are no columns of a class
    ids=["classes", "inpainting"],
)
def test_a_grid_costs_no_more_images_than_asked_for(digits, tmp_path, conditions, rows, columns, header):
    shell, tracker = run(tmp_path / "r", digits, "tracking.grid_images=6", *conditions)
    assert [step for step, _ in tracker.images] == [BATCH, STEPS * BATCH]  # after the first step and after the last
    tile = MIN_TILE + 4
    assert [images.shape for images in shell.shown] == [(6, 8, 8, 1)] * 2
    assert [shape for _, shape in tracker.images] == [(header + rows * tile + 4, columns * tile + 4, 3)] * 2


def test_a_profile_of_the_steps_that_were_asked_for_is_kept(digits, tmp_path):
    _, tracker = run(tmp_path / "r", digits, "tracking.profile_at=50", "tracking.profile_steps=2", NO_GRIDS)
    events = json.loads(tracker.texts["profile/000000000050.json"])["traceEvents"]
    assert sum(e.get("name", "").startswith("Optimizer.step") for e in events) == 2


def test_updates_that_are_not_finite_are_left_out_and_too_many_in_a_row_stop_the_run(digits, tmp_path):
    bad = ["optim.lr=1e30", "optim.grad_clip=null", "optim.warmup_images=0", "optim.max_skipped=3"]
    with pytest.raises(FloatingPointError, match=r"3 updates in a row .* on samples \d+\.\.\d+ of the stream"):
        run(tmp_path / "nan", digits, *bad)


def test_fine_tuning_starts_from_the_averaged_weights_of_a_model(digits, finished, tmp_path):
    base = last_checkpoint(finished)
    tuned = [f"init_from={base}", "optim.lr=1e-30", NO_GRIDS]
    run(tmp_path / "tuned", digits, *tuned)
    run(tmp_path / "inpaint", digits, *tuned, "model.inpainting=true")
    weights = load_model(base).network.state_dict()
    for name in ("tuned", "inpaint"):
        network = load_model(last_checkpoint(tmp_path / name)).network.state_dict()
        network["conv_in.weight"] = network["conv_in.weight"][:, :1]
        assert all(torch.equal(network[k], v) for k, v in weights.items())
    with pytest.raises(ModelError, match=r"another network than the configuration's:\n  channels: \(8,\) there"):
        run(tmp_path / "other", digits, *tuned, "model.channels=[64]")
    with pytest.raises(ModelError, match="names no model"):
        run(tmp_path / "none", digits, "init_from=/nowhere")


def test_a_teacher_changes_what_is_learned_and_has_to_be_the_one_that_the_run_began_with(digits, teacher, tmp_path):
    tuned = [*CONSISTENCY, f"init_from={teacher}", NO_GRIDS]
    run(tmp_path / "plain", digits, *tuned)
    run(tmp_path / "followed", digits, *tuned, "objective.consistency_guidance=1")
    run(tmp_path / "guided", digits, *tuned, "objective.consistency_guidance=2")
    traces = [losses(tmp_path / name) for name in ("plain", "followed", "guided")]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(traces, 2))
    with pytest.raises(ModelError, match=r"names other weights \(\w{12}\) than when the run began \(0000"):
        run(tmp_path / "moved", digits, *tuned, lineage={"init_from_digest": "0" * 64})


def test_a_model_of_x0_is_tuned_with_a_skip_connection(digits, tmp_path):
    run(tmp_path / "x0", digits, "objective.prediction=x0", NO_GRIDS)
    base = f"init_from={last_checkpoint(tmp_path / 'x0')}"
    run(tmp_path / "tuned", digits, *CONSISTENCY, base, "objective.prediction=x0_skip")
    assert load_model(last_checkpoint(tmp_path / "tuned")).spec.prediction == "x0_skip"
    with pytest.raises(ModelError, match=r"predicts x0, and objective\.prediction = v"):
        run(tmp_path / "wrong", digits, *CONSISTENCY, base)


@pytest.mark.heavy
def test_a_classifier_of_noisy_images_is_trained_by_the_same_loop(digits, tmp_path):
    settings = ["task=classifier", "optim.lr=1e-2", "optim.warmup_images=0", "optim.ema_half_life=400"]
    config = tiny_config(tmp_path / "c", 5000, 50, *settings, "tracking.grid_every=5000")
    _, tracker = train_here(tmp_path / "c", digits, config)
    keys = [f"test/accuracy_t{t:04d}" for t in (50, 250, 500, 750)]
    first, last = ([tracker.points[n][key] for key in keys] for n in (50, 5000))
    assert max(first) < 0.2
    assert last[0] > 0.25
    assert last[0] > last[-1]
    spec, classifier = load_classifier(last_checkpoint(tmp_path / "c"))
    assert classifier(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape == (2, len(spec.classes))
    with pytest.raises(ValueError, match="holds a classifier, which cannot sample"):
        load_model(last_checkpoint(tmp_path / "c"))


def encoder(captions):
    """Four numbers a letter, of the letter alone."""
    text = torch.zeros(len(captions), max(map(len, captions)), 4)
    mask = torch.zeros(text.shape[:2], dtype=torch.bool)
    for i, caption in enumerate(captions):
        for j, letter in enumerate(caption):
            text[i, j] = torch.tensor([ord(letter) % 7, ord(letter) % 5, ord(letter) % 3, 1.0])
            mask[i, j] = True
    return Conditioning(text=text, text_mask=mask, pooled=text.sum(1))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Pictures with captions of different lengths."""
    root = tmp_path_factory.mktemp("captioned")
    files = {name.replace("/", "-"): data for name, data in pictures(40).items()}
    rows = [{"file_name": name, "text": "x" * (i % 4 + 1) + name[-5:]} for i, name in enumerate(files)]
    source = write_files(root / "source", {**files, "metadata.jsonl": jsonl(rows)})
    options = {"image_size": 8, "channels": 1, "shard_samples": 16, "test_fraction": 0.2, "text_encoder": encoder}
    return ingest(str(source), f"file://{root}/dataset", Storage(), **options).dataset


TEXT = ["data.num_classes=0", "model.class_conditional=false", "model.text_dim=4"]


def test_a_network_is_conditioned_on_captions(captioned, tmp_path):
    run(tmp_path / "whole", captioned, *TEXT)
    run(tmp_path / "parts", captioned, *TEXT, "micro_batch_size=7", NO_GRIDS)
    run(tmp_path / "blind", captioned, *TEXT, "objective.label_drop=1", NO_GRIDS)
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-3, atol=0)
    assert not torch.equal(losses(tmp_path / "blind"), losses(tmp_path / "whole"))
    assert load_model(last_checkpoint(tmp_path / "whole")).spec.network.text_dim == 4


@pytest.mark.heavy
def test_a_classifier_of_captions_is_trained_by_the_same_loop(captioned, tmp_path):
    config = ["task=classifier", *TEXT, "optim.lr=1e-2", "optim.warmup_images=0", "optim.ema_half_life=200"]
    _, tracker = run(tmp_path / "c", captioned, *config, "images=3000", "tracking.grid_every=3000")
    keys = [f"test/accuracy_t{t:04d}" for t in (50, 250, 500, 750)]
    assert set(keys) <= tracker.points[25].keys() & tracker.points[3000].keys()
    found = losses(tmp_path / "c")
    assert found[-10:].mean() < found[:10].mean()
    spec, classifier = load_classifier(last_checkpoint(tmp_path / "c"))
    assert (spec.classes, classifier.text, spec.network.text_dim) == ((), True, 4)
    assert classifier.log_temperature.requires_grad is False


def test_its_loss_does_not_depend_on_the_parts_of_a_batch(captioned, tmp_path):
    run(tmp_path / "whole", captioned, "task=classifier", *TEXT)
    run(tmp_path / "parts", captioned, "task=classifier", *TEXT, "micro_batch_size=7")
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-3, atol=0)


@pytest.mark.integration
def test_consistency_tuning_has_the_same_trace_on_any_number_of_ranks(digits, teacher, tmp_path):
    runs, images = {}, 4 * BATCH
    for world, parallel, parts in ((1, "ddp", 25), (2, "ddp", 7), (2, "fsdp", 13)):
        folder = tmp_path / f"{world}-{parallel}"
        folder.mkdir()
        asked = [*SMALL, *CONSISTENCY, f"init_from={teacher}", f"micro_batch_size={parts}"]
        asked += ["objective.consistency_guidance=2", f"cluster.parallel={parallel}", "optim.precision=fp64"]
        runs[world, parallel] = folder, tiny_config(folder, images, BATCH, *asked)
    train_here(runs[1, "ddp"][0], digits, runs[1, "ddp"][1])
    both = [runs[2, "ddp"], runs[2, "fsdp"]]
    start_ranks(run_ranks, (2, tmp_path / "rendezvous", digits, both), 2)
    for folder, _ in both:
        torch.testing.assert_close(losses(folder), losses(runs[1, "ddp"][0]), rtol=1e-9, atol=0)


@pytest.mark.integration
def test_its_loss_does_not_depend_on_the_number_of_ranks(captioned, tmp_path):
    runs, images = {}, 4 * 25
    for world, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        folder = tmp_path / f"{world}-{parallel}"
        folder.mkdir()
        asked = ["task=classifier", *TEXT, f"cluster.parallel={parallel}", "optim.precision=fp64"]
        runs[world, parallel] = folder, tiny_config(folder, images, 25, *asked)
    train_here(runs[1, "ddp"][0], captioned, runs[1, "ddp"][1])
    both = [runs[2, "ddp"], runs[2, "fsdp"]]
    start_ranks(run_ranks, (2, tmp_path / "rendezvous", captioned, both), 2)
    for folder, _ in both:
        torch.testing.assert_close(losses(folder), losses(runs[1, "ddp"][0]), rtol=1e-9, atol=0)


def test_text_embeddings_of_another_width_are_refused(captioned, tmp_path):
    with pytest.raises(ValueError, match=r"text_dim = 5, and the samples' text embeddings have 4 numbers"):
        run(tmp_path / "wide", captioned, *TEXT, "model.text_dim=5")


@pytest.mark.slow
def test_a_compiled_network_has_the_same_trace_and_is_kept_on_disk(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    run(tmp_path / "plain", digits)
    run(tmp_path / "compiled", digits, "cluster.compile=true", "micro_batch_size=13")
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-3, atol=0)
    assert any((tmp_path / "inductor").rglob("*.so"))
    assert last_checkpoint(tmp_path / "compiled").joinpath("model.json").exists()


def test_a_damaged_shard_stops_the_run_by_name_after_a_checkpoint_of_what_came_before(tmp_path):
    uri, one_by_one = f"file://{tmp_path}/digits", ["data.lanes=1", "data.window=1"]
    dataset = ingest("digits", uri, Storage(), image_size=8, channels=1, shard_samples=128).dataset
    run(tmp_path / "whole", dataset, *one_by_one, NO_GRIDS)
    counts = [shard.samples for shard in dataset.shards("train")]
    order = SampleOrder(counts, lanes=1, window=1, seed=0, digest=dataset.digest)
    victim = dataset.shards("train")[order.batch(STEPS * BATCH - 1, 1).shards[0]].name
    data = bytearray((tmp_path / "digits" / victim).read_bytes())
    data[600::1024] = bytes(b ^ 255 for b in data[600::1024])  # in every sample of it
    (tmp_path / "digits" / victim).write_bytes(data)
    with pytest.raises(ShardCorruptError, match=victim.replace(".", r"\.")):
        run(tmp_path / "broken", dataset, *one_by_one, NO_GRIDS)
    whole, seen = trace(tmp_path / "whole"), (STEPS - 1) * BATCH
    assert trace(tmp_path / "broken") == {n: loss for n, loss in whole.items() if n <= seen}
    state = json.loads((last_checkpoint(tmp_path / "broken") / "state.json").read_text())
    assert state["images_seen"] == seen


def ranks_with_a_slow_store(*arguments):
    """As `run_ranks`, with a store that takes longer than an error takes to end the run."""
    save = checkpoints.save_checkpoint

    def slow(folder, checkpoint):
        time.sleep(9)
        return save(folder, checkpoint)

    checkpoints.save_checkpoint = slow
    run_ranks(*arguments)


@pytest.mark.integration
def test_where_one_of_two_ranks_meets_a_damaged_shard_both_save_and_end(tmp_path):
    uri, images = f"file://{tmp_path}/digits", 40 * BATCH
    dataset = ingest("digits", uri, Storage(), image_size=8, channels=1, shard_samples=128).dataset
    order = SampleOrder(
        [shard.samples for shard in dataset.shards("train")], lanes=5, window=1, seed=0, digest=dataset.digest
    )
    first = order.batch(0, BATCH).shards.tolist()
    number = next(i for i in range(images // BATCH) if set(order.batch(i * BATCH, BATCH).shards.tolist()) - set(first))
    pieces = [set(order.piece(number * BATCH, BATCH, rank, 2).shards) for rank in range(2)]
    new = min(pieces[1] - pieces[0] - set(first))  # rank 1 alone meets it, and rank 0 stores the checkpoint
    victim = dataset.shards("train")[new].name
    data = bytearray((tmp_path / "digits" / victim).read_bytes())
    data[600::1024] = bytes(b ^ 255 for b in data[600::1024])
    (tmp_path / "digits" / victim).write_bytes(data)
    folder = tmp_path / "broken"
    folder.mkdir()
    runs = [(folder, tiny_config(folder, images, BATCH, "data.window=1"))]
    with pytest.raises(ProcessRaisedException, match=victim.replace(".", r"\.")):
        start_ranks(ranks_with_a_slow_store, (2, tmp_path / "rendezvous", dataset, runs), 2)
    state = json.loads((last_checkpoint(folder) / "state.json").read_text())
    assert state["images_seen"] == number * BATCH


@pytest.mark.heavy
def test_a_rank_imports_what_it_needs_by_itself(tmp_path):
    """Where ranks are forked, from here or from what tests fork workers from, somebody has imported all there is."""
    command = [sys.executable, "-m", "tests.pipelines.training.loop.fresh", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr[-3000:]
