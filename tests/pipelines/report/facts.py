"""Facts that are made up, with something in every part."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ddpm.generate import Sampling
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.presentation.charts import Point
from pipelines.presentation.images import Picture
from pipelines.registry import Verdict, VerdictRow
from pipelines.report.facts import Facts, FilmStrip, Levels, Tried
from pipelines.shards.audit.contents import SourceContents
from pipelines.training.goodput import Attempt, Session, measure

SCORES = Scores(
    estimates={
        "frechet_distance": Estimate(3.2, 3.0, 3.4, floor=2.7, ceiling=52.0),
        "class_accuracy": Estimate(0.97, 0.96, 0.98),
        "bits_per_dim": Estimate(4.8, 4.6, 5.0),
    },
    n=359,
    seeds=(1, 2),
    evaluator="classifier",
    evaluator_digest="e" * 64,
    features=8,
    real_accuracy=0.994,
    dataset_digest="d" * 64,
    stream_digest="s" * 64,
    real={"train": 1438, "test": 359},
    sampling=Sampling.of(kind="ddim", steps=50, scale=1.5).to_json(),
)
BETTER = replace(SCORES, estimates={"frechet_distance": Estimate(2.9, 2.8, 3.0)})
VERDICT = Verdict(
    passed=False,
    reason="not distinguishable",
    model="digits",
    alias="champion",
    version="2",
    champion="1",
    attempt=2,
    n=5000,
    rows=(
        VerdictRow("better than version 1", "z = 1.10", "z >= 2.50", passed=False),
        VerdictRow("finite", "all", "all", passed=True),
    ),
    at="2026-01-01T00:00:00+00:00",
)
CONTENTS = SourceContents(
    name="",
    uri="s3://ddpm/datasets/digits",
    digest="s" * 64,
    changed=False,
    images={"train": 1438, "test": 359},
    classes={"zero": 800, "one": 600, "": 38},
    captions=12,
    licences={"CC0": 700},
    hosts={"a.example": 5},
    copies=2,
    near_duplicates=3,
    left_out={"decode": 4},
    erased=1,
)
GOODPUT = measure([Session(0.0, 100.0, (Attempt(5.0, 95.0, 0, 1000, {"step": 70.0, "data": 5.0, "startup": 15.0}),))])


def picture(level: int, width: int = 12) -> Picture:
    return Picture.of_pixels(np.full((8, width, 3), level, np.uint8))


def curve(*values: float) -> tuple[Point, ...]:
    return tuple(Point(100.0 * i, value) for i, value in enumerate(values, 1))


FULL = Facts(
    name="digits",
    reference="models:/digits/2",
    made_at="2026-01-01 12:00 UTC",
    images_seen=1000,
    version="models:/digits/2",
    link="http://127.0.0.1:5000/#/experiments/1/runs/abc",
    training=(("network", "unet, 1,234 parameters"), ("batch size", "128")),
    data=(("address", "s3://ddpm/datasets/digits"), ("images", "1,438 train, 359 test; grey 8 x 8")),
    contents=(CONTENTS,),
    goodput=GOODPUT,
    wall_s=GOODPUT.wall_s,
    curves={
        "train/loss": curve(1.0, 0.3, 0.1, math.nan),
        "updates/grad_norm": curve(2.0, 1.0, 0.5),
        "train/images_per_s": curve(900.0, 1000.0),
        "eval/frechet_distance": (Point(500, 6.0, 5.5, 6.5), Point(1000, 3.2, 3.0, 3.4)),
    },
    scores=SCORES,
    champion=("models:/digits/1", BETTER),
    verdicts=(VERDICT,),
    samples=picture(10),
    growth=((0, picture(20)), (500, picture(21)), (1000, picture(22))),
    film=FilmStrip(picture(30), "ddim, 50 steps, guidance scale 1.5"),
    levels=Levels(32, (Point(1, 0.9, 0.8, 1.0), Point(500, 0.1, 0.09, 0.11), Point(1000, 0.01, 0.009, 0.011))),
    bound=(Point(1, 2.0), Point(500, 0.01), Point(1000, 0.001), Point(1000, 0.0001)),
    tried=tuple(
        Tried("study one, 359 samples", Point(0, 9.0 - i, 8.5 - i, 9.5 - i), 10.0 * i, 0.5 * i) for i in range(1, 6)
    ),
    inpainting=picture(40),
    nearest=picture(50),
    copies="none found: 1.1% of 359 samples are as near to a training image as 0.8% of real test images are",
    notes=("the index of the dataset could not be read: it is away",),
)
