"""Evaluation while training goes on, on the stack: one worker leaves a core for it."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoints import list_published
from pipelines.shards.ingest.write import ingest
from pipelines.tracking import Tracker
from tests.integration.workers import slow_steps
from tests.networks import TINY_UNET

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core holds a worker and nothing beside it"),
]
EVERY = 2_560
SETTINGS = [
    "+experiment=digits", "name=scored", "data.uri=s3://ddpm/datasets/scored", *TINY_UNET,
    "optim.decay=constant", "cluster.num_workers=1",
    "checkpoint.every=1000000", f"evaluation.every={EVERY}", "tracking.grid_every=null", "sampler.steps=2",
    "evaluation.n=90", "evaluation.seeds=1", "evaluation.likelihood_images=0", "evaluation.evaluator_passes=5",
]  # fmt: skip


def test_checkpoints_are_scored_on_the_run_and_on_their_logged_models_before_the_training_ends(shell, s3, local_stack):
    ingest("digits", "s3://ddpm/datasets/scored", s3, image_size=8, channels=1, shard_samples=600)
    client = MlflowClient(tracking_uri=local_stack.tracking_uri)
    process = shell.start("train", *SETTINGS, "images=100000000", "--json")
    try:
        with slow_steps(local_stack.home):
            tracker = scored(client, deadline=time.monotonic() + 400)
            assert client.get_run(tracker.run_id).info.status == "RUNNING"
            assert process.poll() is None
            os.kill(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    stopped = json.loads(out.strip().splitlines()[-1])
    assert stopped["status"] == "stopped"
    assert "images: distance Frechet" in err, err

    published = {p.images_seen: p for p in list_published(tracker)}
    assert list(published) == [EVERY * (i + 1) for i in range(len(published))]
    curve = dict(tracker.metric("eval/frechet_distance"))
    recorded = {seen: p.scores["eval/frechet_distance"] for seen, p in published.items() if p.scores}
    assert curve == recorded
    assert 0 < len(curve) <= stopped["images_seen"] // EVERY
    experiment = client.get_run(tracker.run_id).info.experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{tracker.run_id}'")
    at = sorted(int(model.tags["ddpm.images_seen"]) for model in models)
    assert at == sorted(set(at))
    assert set(curve) <= set(at) <= set(published)
    for seen, model in tracking.checkpoint_models(tracker).items():
        stored = client.get_logged_model(model.model_id)
        assert (str(stored.status), model.tags["ddpm.uri"]) == ("READY", published[seen].uri)
        distances = [(m.step, m.value) for m in stored.metrics or [] if m.key == "eval/frechet_distance"]
        assert distances == ([(seen, curve[seen])] if seen in curve else [])
    assert {name.split("/")[1][:12] for name in tracker.names("evaluation")} == {f"{seen:012d}" for seen in curve}
    assert all(tracker.has_picture("evaluation", seen) for seen in curve)


def scored(client: MlflowClient, deadline: float) -> Tracker:
    """Wait until a checkpoint of the run has scores."""
    while True:
        assert time.monotonic() < deadline
        time.sleep(0.5)
        experiment = client.get_experiment_by_name("ddpm")
        runs = client.search_runs([experiment.experiment_id], "tags.`ddpm.run` = 'scored'") if experiment else []
        if runs and "eval/frechet_distance" in runs[0].data.metrics:
            tracker = Tracker(client.tracking_uri, runs[0].info.run_id)
            if any(p.scores for p in list_published(tracker)):
                return tracker
