"""The tables of docs/experiments.md, from the composed configurations: `python docs/site/experiments.py` writes them.

Parameters, floating-point operations and activations are counted on PyTorch's meta device, where nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.image_size import as_setting
from ddpm.model import make_classifier
from ddpm.models.base import NetworkConfig
from ddpm.models.unet import UNetConfig
from pipelines.config import Config, compose, groups, network_config
from pipelines.training.loop.hardware import flops_per_image

PAGE = Path(__file__).parents[1] / "experiments.md"
NEEDED = {
    "folder32": ["name=mine", "data.source=photos", "data.num_classes=3"],
    "photos64": ["name=mine", "data.source=photos", "data.num_classes=3"],
    "photos128": ["name=mine", "data.source=photos", "data.num_classes=3"],
    "captions32": ["name=mine", "data.source=photos"],
    "captions32_classifier": ["name=mine-classifier", "data.uri=s3://ddpm/datasets/mine"],
    "digits_consistency": ["init_from=runs:/abc"],
    "mnist_consistency": ["init_from=runs:/abc"],
    "cifar10_consistency": ["init_from=runs:/abc"],
}
"""Settings that experiments leave to their user."""
IS = {
    "captions32": ("your own captioned pictures", "drawn by prompts, [measured](using-models.md#a-model-on-text)"),
    "captions32_classifier": ("a classifier of noisy pictures by caption", "trained, and used for guidance"),
    "cifar10": ("CIFAR-10 by DDPM (Ho et al. 2020, app. B)", ""),
    "cifar10_consistency": ("CIFAR-10 in 1 or 2 evaluations, by ECT (Geng et al. 2024), from `cifar10_edm`", ""),
    "cifar10_edm": ("CIFAR-10 like EDM (Karras et al. 2022, app. F)", ""),
    "cifar10_improved": ("CIFAR-10 by Improved DDPM (Nichol & Dhariwal 2021)", ""),
    "digits": ("scikit-learn's digits", "trained, [measured](evaluation.md#the-scores)"),
    "digits_classifier": ("a classifier of noisy digits", "trained, and used for guidance"),
    "digits_consistency": ("digits in 1 or 2 evaluations", "trained, [measured](few-steps.md#a-student-of-digits)"),
    "digits_inpainting": ("digits with known pixels", "trained, [shown](using-models.md#inpaint)"),
    "digits_learned_variance": ("digits with a learned variance", "trained for a few steps"),
    "digits_score": ("digits by Langevin dynamics", "trained for a few steps"),
    "dit_b": ("ImageNet 64x64 in pixels by DiT-B/4 (Peebles & Xie 2023, table 1)", ""),
    "dit_s": ("CIFAR-10 in pixels by DiT-S/2 (Peebles & Xie 2023, table 1)", ""),
    "folder32": ("your own class folders", ""),
    "imagenet256": ("ImageNet 256x256 in pixels by JiT-B/16 (Li & He 2025)", ""),
    "imagenet256_large": ("ImageNet 256x256 in pixels by JiT-L/16 (Li & He 2025)", ""),
    "imagenet64": ("ImageNet 64x64 by ADM (Dhariwal & Nichol 2021)", ""),
    "imagenet64_flow": ("ImageNet 64x64 by flow matching, with the network of `dit_b`", ""),
    "mnist": ("MNIST, or other grey pictures of 28x28", ""),
    "mnist_consistency": ("MNIST in 1 or 2 evaluations, from `mnist`", ""),
    "photos128": ("your own photographs, by JiT-B/8", ""),
    "photos64": ("your own photographs", ""),
}
"""Experiment -> what it is, and what it was checked on besides the tests."""
GOAL = {
    "cifar10": "3.17 (Ho et al. 2020, table 1)",
    "cifar10_improved": "about 3, in 4,000 steps (Nichol & Dhariwal 2021, table 2)",
    "cifar10_edm": "1.97 with the paper's network (Karras et al. 2022, table 2, unconditional)",
    "cifar10_consistency": "3.86 in 1 evaluation, 2.15 in 2 ([the authors' network](https://github.com/locuslab/ect))",
    "imagenet64": "2.07 ([the authors' network](https://github.com/openai/guided-diffusion#results))",
}
"""Experiment -> published FID of 50,000 samples."""
UTILIZATION = 0.2
"""Share of the bf16 peak that a training is assumed to reach; what it rests on is on the page."""
BF16_TFLOPS = 312.0
"""Dense bf16 peak of an A100 (its data sheet)."""
FP32_TFLOPS = 19.5
"""Peak of an A100 in float32 without tensor cores, of which half is assumed."""
STEP_GFLOPS = 40
"""Up to so many operations an image an experiment makes an optimizer step in the tests; else its shapes are checked."""
IMAGES = 32
"""Images on a GPU, of the estimate of memory."""


@dataclass(frozen=True)
class Counts:
    """What a network takes.

    Attributes:
        parameters: of the network.
        flops: of one image, forward and backward; all passes of consistency tuning included.
        activations: bytes per image that autograd keeps for the backward pass, in float32.
    """

    parameters: int
    flops: float
    activations: int


def composed(name: str) -> Config:
    """Return the configuration of an experiment."""
    return compose([f"+experiment={name}", *NEEDED.get(name, [])])


def build(config: Config) -> nn.Module:
    """Return the network that an experiment trains, on the meta device."""
    return _build(network_config(config), _classes(config))


def count(config: Config) -> Counts:
    """Return what an experiment's network takes."""
    of_network = _count(network_config(config), _classes(config), config.data.shape)
    return replace(of_network, flops=of_network.flops * (1 + _more_passes(config) / 3))


@cache  # several experiments train one network, and counting it takes most of a second
def _count(network: NetworkConfig, classes: int | None, shape: tuple[int, int, int]) -> Counts:
    """Return what a network takes, in one pass of an image forward and backward."""
    built = _build(network, classes)
    return Counts(
        parameters=sum(p.numel() for p in built.parameters()),
        flops=flops_per_image(built, shape),
        activations=_kept(built, shape),
    )


def _build(network: NetworkConfig, classes: int | None) -> nn.Module:
    """Return a network on the meta device: a classifier of so many classes, or the one itself where that is None."""
    with torch.device("meta"):
        if classes is None:
            return network.build()
        assert isinstance(network, UNetConfig)
        return make_classifier(network, classes)


def _classes(config: Config) -> int | None:
    """Return how many classes an experiment's classifier tells apart; None where it trains none."""
    return config.data.num_classes if config.task == "classifier" else None


def _more_passes(config: Config) -> int:
    """Return the forward passes of an image besides the one that has a backward pass, which counts as two more."""
    if config.objective.loss != "consistency":
        return 0
    scale = config.objective.consistency_guidance
    return 1 + (0 if scale is None else 1 if scale == 1 else 2)  # of the target, and of its teacher, guided or not


def takes_a_step(counts: Counts) -> bool:
    """Return whether the tests make a real optimizer step of an experiment on the CPU."""
    return counts.flops <= STEP_GFLOPS * 1e9


def hours(config: Config, counts: Counts) -> float:
    """Return the estimated A100-hours of an experiment."""
    full = config.optim.precision in ("fp32", "fp64")
    speed = FP32_TFLOPS / 2 if full else BF16_TFLOPS * UTILIZATION
    return config.images * counts.flops / (speed * 1e12) / 3600


def memory_gib(config: Config, counts: Counts) -> float:
    """Return the estimated GiB of a GPU: state of the training, and the activations of `IMAGES` images."""
    share = 1.0 if config.optim.precision in ("fp32", "fp64") else 0.5
    state = 5 * 4 * counts.parameters  # weight, gradient, two moments of Adam, average
    return (state + IMAGES * share * counts.activations) / 2**30


def count_all() -> dict[str, Counts]:
    """Return what the network of each shipped experiment takes."""
    return {name: count(composed(name)) for name in groups()["experiment"]}


def tables(found: Mapping[str, Counts]) -> str:
    """Return both tables of the page, of what `count_all` found."""
    what = ["| `+experiment=` | what it is | size | parameters | batch | images | checked on |", "|---" * 7 + "|"]
    costs = ["| `+experiment=` | GFLOPs an image | A100-hours | GiB a GPU | published FID |", "|---" * 5 + "|"]
    for name, counts in found.items():
        config, (is_, besides) = composed(name), IS[name]
        size = f"{as_setting(config.data.image_size)}, {'grey' if config.data.channels == 1 else 'colour'}"
        step = "one optimizer step" if takes_a_step(counts) else "shapes"
        checked = "; ".join(filter(None, [step, besides]))
        what.append(
            f"| `{name}` | {is_} | {size} | {millions(counts.parameters)} | {config.batch_size:,} "
            f"| {config.images:,} | {checked} |"
        )
        costs.append(
            f"| `{name}` | {digits(counts.flops / 1e9)} | {digits(hours(config, counts))} | "
            f"{digits(memory_gib(config, counts))} | {GOAL.get(name, '')} |"
        )
    return "\n".join(what) + "\n\n@\n\n" + "\n".join(costs)


def millions(parameters: int) -> str:
    """Return a number of parameters in millions."""
    return f"{parameters / 1e6:.1f} M"


def digits(value: float) -> str:
    """Return a number with two digits, in full."""
    if value < 0.1:
        return "< 0.1"
    places = max(0, 1 - math.floor(math.log10(value)))
    return f"{round(value, 1 - math.floor(math.log10(value))):,.{places}f}"


def page_with(text: str, found: str) -> str:
    """Return the page's text with these tables between its markers."""
    for part, table in zip(("what", "costs"), found.split("\n\n@\n\n"), strict=True):
        head, _, rest = text.partition(f"<!-- {part} -->\n")
        tail = rest.partition("<!-- end -->")[2]
        text = f"{head}<!-- {part} -->\n{table}\n<!-- end -->{tail}"
    return text


def _kept(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return the bytes that autograd keeps of one more image."""
    one, two = (_kept_of(network, torch.empty(batch, *shape, device="meta")) for batch in (1, 2))
    return two - one


def _kept_of(network: nn.Module, images: Tensor) -> int:
    """Return the bytes that autograd keeps of a batch; views count once, with what they are views of."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(images, torch.empty(len(images), device="meta"))
    del output
    return sum(t.numel() * t.element_size() for t in kept.values())


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(), tables(count_all())))
