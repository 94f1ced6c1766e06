"""Evaluate a stub model with many samples in a process of its own, and print the peaks of its memory.

    python -m tests.integration.evaluation_memory DATASET_URI ROOT N

The dataset's features are computed first if they are not stored, so that what is measured is the evaluation alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import ray

from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec
from ddpm.models import UNetConfig
from pipelines.config import compose
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.evaluators.base import Evaluator
from pipelines.evaluation.evaluators.classifier import Classifier
from pipelines.evaluation.measure import evaluate
from pipelines.evaluation.samples import SampledModel, SampleSpec
from pipelines.shards.index import read_dataset
from pipelines.storage import Storage


def peak(process: psutil.Process) -> int:
    """Return the largest resident set of a process so far, in KiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main(dataset_uri: str, root: str, n: int) -> None:
    storage = Storage()
    dataset = read_dataset(dataset_uri, storage)
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    network = UNetConfig(
        in_channels=1,
        out_channels=1,
        channels=(8,),
        attention=(False,),
        layers_per_block=1,
        head_dim=8,
        norm_groups=4,
        num_classes=len(dataset.classes),
    )
    spec = ModelSpec(network, {"kind": "cosine", "num_steps": 8}, "v", dataset.image_size, dataset.classes)
    model = Model(spec, network.build().eval())
    judge = Classifier(dataset.channels, dataset.image_size, len(dataset.classes)).eval()
    evaluator = Evaluator(judge, "classifier", "stub", "untrained", "none", labels=True, accuracy=None)
    own = ["evaluation.actors=2", f"data.cache_dir={root}/cache", "data.cache_gib=1"]
    config = compose(["+experiment=digits", *own])
    data = EvaluationData(dataset, config)
    vars(data)["evaluator"] = evaluator
    peaks = {"actors": 0}

    def watch(done: int, total: int) -> None:
        """Note the peaks of the actors, which end with the drawing."""
        for process in psutil.Process().children(recursive=True):
            try:
                if "_SamplingActor" in " ".join(process.cmdline()):
                    peaks["actors"] = max(peaks["actors"], peak(process))
            except psutil.Error:
                continue

    asked = [f"evaluation.n={n}", "evaluation.seeds=1", "evaluation.batch_size=500", "evaluation.likelihood_images=0"]
    asked += [f"storage.root=file://{root}/{n}"]
    request = SampleSpec.of(compose(["+experiment=digits", *asked]))
    done = evaluate(SampledModel(model, f"stub-{n}", Sampling.of(steps=1)), request, data, progress=watch)
    assert done.scores.n == n
    print(json.dumps({"n": n, "driver_kib": peak(psutil.Process()), "actor_kib": peaks["actors"]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
