"""Facts about four kinds of sources and two machines, for plans that need neither."""

from __future__ import annotations

import math
from dataclasses import replace

from ddpm.image_size import ImageSize, as_setting, height_width
from pipelines.evaluation.evaluators.classifier import reduced_size
from pipelines.plan.facts import MachineFacts, Mirror, SourceFacts, Speed

DIGITS = SourceFacts(
    source="/data/digits",
    images=10_000,
    test_images=1_000,
    class_counts={str(digit): 1_000 for digit in range(10)},
    captions=0,
    shorter_sides=(28, 28, 28),
    one_size=(28, 28),
    grey=True,
    opened=1_000,
    write_s=0.001,
    mirror=Mirror(0.93, 500),
)
PICTOGRAMS = SourceFacts(
    source="pictograms",
    images=3_000,
    test_images=300,
    class_counts={},
    captions=3_000,
    shorter_sides=(64, 64, 64),
    one_size=(64, 64),
    grey=False,
    opened=1_000,
    mirror=Mirror(0.51, 500),
    encoder="sentence-transformers/all-MiniLM-L6-v2",
    encoder_width=384,
    caption_s=0.005,
)
PHOTOS = SourceFacts(
    source="s3://bucket/my photos",
    images=4_000,
    test_images=400,
    class_counts={"beach": 2_000, "forest": 2_000},
    captions=0,
    shorter_sides=(480, 1080, 3024),
    one_size=None,
    grey=False,
    opened=300,
    write_s=0.04,
    mirror=Mirror(0.52, 150),
)
UNLABELLED = SourceFacts(
    source="textures/",
    images=900,
    test_images=90,
    class_counts={},
    captions=0,
    shorter_sides=(200, 256, 400),
    one_size=None,
    grey=False,
    opened=900,
    mirror=Mirror(0.50, 450),
)
CATALOGUE = replace(
    PHOTOS,
    images=1_300_000,
    test_images=20_000,
    class_counts={f"kind {i}": 1_300 for i in range(1_000)},
    shorter_sides=(256, 375, 500),
)
"""As many photographs as ImageNet has."""
CARDS = replace(PHOTOS, shorter_sides=(48, 48, 48), one_size=(64, 48))
"""Pictures that are all 48 pixels high and 64 wide."""
SIZES: tuple[ImageSize, ...] = (8, 16, 24, 28, 32, 64, 128, 256, (24, 32), (48, 64))
SOURCES = {"digits": DIGITS, "pictograms": PICTOGRAMS, "photos": PHOTOS, "unlabelled": UNLABELLED, "cards": CARDS}


def machine(cores: int = 2, gpus: int = 0, factor: float = 1.0, together: float = 0.8) -> MachineFacts:
    """A machine whose speed at 32 pixels and below is that of a core, times a factor; larger images take longer."""
    together = 1.0 if gpus else together
    at_32 = {"narrow": (150, 0.9), "plain": (80, 2.6), "wide": (25, 6.5), "widest": (7, 26.0), "hand": (20, 8.0)}
    speeds = {}
    for size in SIZES:
        cost = max(math.prod(height_width(size)) / 32**2, 0.0625)
        for name, (rate, millions) in at_32.items():
            train = factor * rate / cost * together
            speeds[f"{name}@{as_setting(size)}"] = Speed(train, 4 * train, 2.5 * train, int(millions * 1e6))
    judge = {as_setting(size): 0.1 * math.prod(height_width(reduced_size(size))) / 32**2 / factor for size in SIZES}
    return MachineFacts("this machine", cores, gpus, "bf16", speeds, judge, together, start_s=5.0, looking_s=8.0)


LAPTOP = machine()
GPU = machine(cores=16, gpus=1, factor=150.0)
CLUSTER = machine(cores=1_024, gpus=64, factor=150.0)
CLUSTER = replace(CLUSTER, speeds={**CLUSTER.speeds, "jit_base@256": Speed(900.0, 3_600.0, 3_000.0, 131_000_000, 128)})
