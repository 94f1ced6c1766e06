"""Benchmark of a training step: this project, diffusers and lucidrains, with the same shapes and threads.

    python -m benchmarks.train_step [--quick] [--json] [--threads N]
    python -m benchmarks.train_step --methods   # our step alone, by arithmetic, memory layout and compiling
    python -m benchmarks.train_step --models DiT-S/2 --name train_step_transformer

It needs torch only; peers are measured if installed and otherwise listed as missing. Systems alternate in one process
and medians are reported. Ours and diffusers' network start from the same weights and their outputs are compared.
lucidrains' network is another one, with the same widths at the same levels but fewer parameters; the result has both
numbers. Every loop clips gradients and averages weights.

| system | meaning |
|---|---|
| ours | the loop of the training worker, with the fastest method on this machine, `method` in the result |
| ours_float32 | of a transformer: the same in float32, where ours is bf16 |
| stock | diffusers' network in the loop of its train_unconditional.py, float32 |
| bf16 | the same under bf16 autocast, as by its --mixed_precision=bf16 |
| lucidrains | denoising-diffusion-pytorch's Unet in the loop of its Trainer, float32 |
| diffusers | on CUDA, and of a transformer: stock with all optimizations of ours: bf16, torch.compile, fused AdamW |
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Before torch is imported: spinning threads slow a step down as soon as another process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import Size, commit, make_parser, publish
from ddpm.conditioning import Conditioning
from ddpm.ema import EMA
from ddpm.models import NetworkConfig
from ddpm.models.dit import DiT, DiTConfig
from ddpm.models.unet import UNet, UNetConfig
from ddpm.noise import Purpose, normal
from ddpm.objectives import Objective
from ddpm.prediction import computes_bf16
from ddpm.schedule import make_schedule
from ddpm.timesteps import UniformTimesteps

Step = Callable[[], float]
"""Do one optimizer step and return its loss."""
SIZE = 32
UPDATE = "update"
"""What a profile calls the part of our step that works on parameters alone."""
PEAK_BF16 = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 FLOP/s by part of a device's name, for the MFU; the first match is used."""


@dataclass(frozen=True)
class Model:
    """A network to train.

    Attributes:
        config: configuration of our network, from which diffusers' is derived.
        lucidrains: options of lucidrains' network with the same widths; None where there is none.
        batch: images per step on a CPU, on a CPU where it is not all measured, and on CUDA.
    """

    config: NetworkConfig
    lucidrains: dict[str, Any] | None
    batch: tuple[int, int, int]


MODELS = {
    "6.5M": Model(
        UNetConfig(channels=(64, 128, 128), attention=(False, True, False), head_dim=64),
        {"dim": 64, "dim_mults": (1, 2, 2)},
        (32, 8, 512),
    ),
    # the network of google/ddpm-cifar10-32
    "35.7M": Model(UNetConfig(head_dim=None), {"dim": 128, "dim_mults": (1, 2, 2, 2)}, (16, 2, 256)),
    # Peebles & Xie 2023, table 1, on pixels
    "DiT-S/2": Model(DiTConfig(num_classes=1000), None, (8, 2, 512)),
}
UNETS = ("6.5M", "35.7M")
"""What is measured without --models."""


@dataclass(frozen=True)
class Method:
    """The optimizations used for our training step.

    Attributes:
        bf16: whether bf16 autocast is on.
        compile: whether torch.compile is used.
        channels_last: whether network and images have the channels-last memory format.
    """

    bf16: bool
    compile: bool
    channels_last: bool

    @property
    def title(self) -> str:
        """Its name in a table."""
        parts = ("bf16" if self.bf16 else "float32", "channels-last" if self.channels_last else "contiguous")
        return ", ".join([*parts, *(["compiled"] if self.compile else [])])


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    parser = make_parser("train_step", __doc__, quick="small batches, few turns, nothing compiled")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every system; default: all cores")
    parser.add_argument("--methods", action="store_true", help="compare the methods for our own step instead")
    parser.add_argument("--models", default=",".join(UNETS), help=f"of {', '.join(MODELS)}; separated by commas")
    parser.add_argument("--name", help="of the result's file; default: train_step, or train_step_methods")
    options = parser.parse_args(arguments)
    names = options.models.split(",")
    if len({type(MODELS[name].config) for name in names if name in MODELS}) > 1:
        parser.error("--models takes UNets or transformers: their fastest methods differ, and a result has one")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}; allowed: {', '.join(MODELS)}")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")  # TF32, for every system; no effect on a CPU without it
    measure, name = (compare_methods, "train_step_methods") if options.methods else (run, "train_step")
    publish(measure(options.size, options.threads, names), options.name or name, options)


def run(size: Size, threads: int, names: Sequence[str]) -> dict[str, Any]:
    """Return the measurements of the models of these names."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {
        "benchmark": "train_step",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "machine": machine(device),
        "threads": threads,
        "torch": torch.__version__,
        "method": {},
        "models": {},
    }
    for name, model in models(size, names).items():
        method = best_method(device, size, model.config)
        result["models"][name] = measure(model, method, device, size)
        result["method"] |= vars(method)
        say(
            f"{name}: " + ", ".join(f"{k} {v}" for k, v in result["models"][name]["images_per_s"].items()) + " images/s"
        )
    return result


def compare_methods(size: Size, threads: int, names: Sequence[str]) -> dict[str, Any]:
    """Return the rates of our own step on the first of these models, by every method that the machine can compute."""
    device, (name, model) = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        next(iter(models(size, names).items())),
    )
    network, x_0 = prepared(model, device, size)
    bf16 = computes_bf16(device) or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    choices = (bf16, size is Size.FULL, True)
    methods = [
        Method(*each) for each in itertools.product(*[(False, True) if there else (False,) for there in choices])
    ]
    systems = {method.title: ours(network, x_0, method) for method in methods}
    first = {title: round(timed(step, 1, device), 2) for title, step in systems.items()}
    seconds = alternate(systems, size.of(5, 2, 1), 20 if device.type == "cuda" else 1, device)
    return {
        "benchmark": "train_step_methods",
        "commit": commit(),
        "machine": machine(device),
        "threads": threads,
        "torch": torch.__version__,
        "model": name,
        "batch": len(x_0),
        "first_step_s": first,
        "images_per_s": {title: round(len(x_0) / statistics.median(s), 2) for title, s in seconds.items()},
        "seconds": seconds,
    }


def models(size: Size, names: Sequence[str]) -> dict[str, Model]:
    """Return the networks to train, by name."""
    unet = UNetConfig(channels=(32, 32), layers_per_block=1, attention=(False, True), head_dim=32)
    dit = DiTConfig(width=32, depth=2, heads=2, patch_size=4, num_classes=10)
    small = {
        **dict.fromkeys(UNETS, ("small", Model(unet, {"dim": 32, "dim_mults": (1, 1)}, (2, 2, 2)))),
        "DiT-S/2": ("small transformer", Model(dit, None, (2, 2, 2))),
    }
    whole = {name: MODELS[name] for name in names}
    return size.of(whole, whole, dict(small[name] for name in names))


def prepared(model: Model, device: torch.device, size: Size) -> tuple[nn.Module, Tensor]:
    """Return our network with its first weights, and a batch of images in [-1, 1], the same in every call.

    A fresh transformer has output 0 whatever it computes: its zeros are replaced by small numbers.
    """
    batch = model.batch[2 if device.type == "cuda" else 0 if size is Size.FULL else 1]
    torch.manual_seed(0)
    network = model.config.build().to(device)
    if isinstance(network, DiT):
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return network, (torch.rand(batch, 3, SIZE, SIZE) * 2 - 1).to(device)


def alternate(systems: dict[str, Step], turns: int, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of a step of each system in each turn, in which every system has one."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(turns):
        for name, step in systems.items():
            seconds[name].append(timed(step, steps, device) / steps)
        say(f"  turn {turn + 1} of {turns}: " + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in seconds.items()))
    return seconds


def best_method(device: torch.device, size: Size, network: NetworkConfig) -> Method:
    """Return the fastest method for a network on this machine.

    Emulated bf16 is slower than float32, and so is that of Intel's processors without AMX. With AMD's AVX512-BF16, bf16
    in the contiguous format without compiling is the fastest: 1.19 s per step of the 6.5 M model; channels-last takes
    1.37 s, compiled 1.38 s, both 1.31 s. A transformer has no convolutions, and is faster compiled.
    """
    if device.type == "cuda":
        return Method(bf16=computes_bf16(device), compile=size is Size.FULL, channels_last=True)
    amx = torch.cpu._is_amx_tile_supported()
    if isinstance(network, DiTConfig):
        return Method(bf16=computes_bf16(device), compile=size is Size.FULL, channels_last=False)
    return Method(bf16=computes_bf16(device), compile=amx and size is Size.FULL, channels_last=amx)


def machine(device: torch.device) -> str:
    """Return a description of the device, with its support for bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    units = [n for n, there in {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "AVX512": torch.cpu._is_avx512_supported(),
        "AVX2": torch.cpu._is_avx2_supported(),
    }.items() if there]  # fmt: skip
    return f"CPU ({platform.machine()}; {', '.join(units) or 'no vector units known of'})"


def measure(model: Model, method: Method, device: torch.device, size: Size) -> dict[str, Any]:
    """Return the measurements of all systems on one model, with runs alternating."""
    turns, steps = size.of(7, 3, 1), (20 if device.type == "cuda" else 1)
    network, x_0 = prepared(model, device, size)
    batch = len(x_0)
    flops = step_flops(network, x_0)
    systems: dict[str, Step] = {"ours": ours(network, x_0, method)}
    if isinstance(network, DiT) and method.bf16:
        systems["ours_float32"] = ours(network, x_0, dataclasses.replace(method, bf16=False))
    twin, missing, not_measured = diffusers_twin(network), [], {}
    networks = {"ours": {"parameters": count(network), "gflop_per_image": round(flops / batch / 1e9, 2)}}
    row: dict[str, Any] = {"batch": batch, "size": networks}
    labels = labels_of(network, x_0)
    if twin is None:
        missing.append("diffusers")
    else:
        row["largest_difference"] = difference(network, twin, x_0, bf16=method.bf16)
        row["largest_difference_float32"] = difference(network, twin, x_0, bf16=False)
        systems["stock"] = diffusers_(copy.deepcopy(twin), x_0, labels, bf16=False, tuned=False)
        if method.bf16:
            systems["bf16"] = diffusers_(copy.deepcopy(twin), x_0, labels, bf16=True, tuned=False)
        else:
            not_measured["bf16"] = "this machine only emulates bf16: a step takes more than ten times stock's"
            row["speedup_bf16"] = None
        if device.type == "cuda" or (method.compile and not method.channels_last):
            systems["diffusers"] = diffusers_(copy.deepcopy(twin), x_0, labels, bf16=True, tuned=size is Size.FULL)
    peer = lucidrains_network(model, device)
    if peer is None and model.lucidrains is not None:
        missing.append("lucidrains")
    elif peer is not None:
        per_image = round(step_flops(peer, x_0) / batch / 1e9, 2)
        networks["lucidrains"] = {"parameters": count(peer), "gflop_per_image": per_image}
        systems["lucidrains"] = lucidrains(peer, x_0)
    row["first_step_s"] = {name: round(timed(step, 1, device), 2) for name, step in systems.items()}
    seconds = alternate(systems, turns, steps, device)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    row["images_per_s"] = {name: round(batch / s, 2) for name, s in median.items()}
    peers = {name: s for name, s in median.items() if not name.startswith("ours")}
    row |= {f"speedup_{name}": round(s / median["ours"], 3) for name, s in peers.items()}
    if "stock" in median and isinstance(network, DiT):
        row["speedup_float32"] = round(median["stock"] / median.get("ours_float32", median["ours"]), 3)
    row["tflop_per_s"] = {name: round(flops / median[name] / 1e12, 3) for name in median if name != "lucidrains"}
    row["mfu"] = mfu(flops / median["ours"], device)
    return row | {"seconds": seconds, "missing": missing, "not_measured": not_measured}


def timed(step: Step, steps: int, device: torch.device) -> float:
    """Return the seconds for `steps` steps."""
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}: there is nothing to measure")
    return seconds


def labels_of(network: nn.Module, x_0: Tensor) -> Tensor | None:
    """Return classes of a batch for a network that knows some."""
    classes = network.config.num_classes if isinstance(network, DiT) else 0
    return torch.arange(len(x_0), device=x_0.device) % classes if classes else None


def ours(network: nn.Module, x_0: Tensor, method: Method) -> Step:
    """Return the step of the training worker, for one process and without micro-batches."""
    network = copy.deepcopy(network)
    if method.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward: Any = torch.compile(network) if method.compile else network
    schedule, objective, ema = make_schedule("linear"), Objective(prediction="eps"), EMA(network, half_life=500_000)
    timesteps = UniformTimesteps().make(schedule, 1, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    batch, seen, labels = len(x_0), 0, labels_of(network, x_0)
    cond = None if labels is None else Conditioning(label=labels)

    def step() -> float:
        nonlocal seen
        n = torch.arange(seen, seen + batch, device=x_0.device)
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=method.bf16):
            t, _ = timesteps.sample(n)
            eps = normal(0, n, Purpose.NOISE, tuple(x_0.shape[1:]))
            loss = objective.losses(forward, schedule, x_0, t, eps, cond).sum() / batch
        loss.backward()
        seen += batch
        with record_function(UPDATE):
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(network, seen, batch)
        return loss.item()

    return step


def diffusers_twin(network: nn.Module) -> nn.Module | None:
    """Return diffusers' network with the same weights, or None if it is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None
    if isinstance(network, DiT):
        return dit_twin(network, SIZE).to(next(network.parameters()).device)
    assert isinstance(network, UNet)
    config = network.config
    twin = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in config.attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)],
        attention_head_dim=config.head_dim,
    )
    twin.load_state_dict(network.state_dict())
    return twin.to(next(network.parameters()).device)


def dit_twin(network: DiT, size: int) -> nn.Module:
    """Return diffusers' DiT with the same weights; it embeds time and class in every block again."""
    from diffusers import DiTTransformer2DModel

    config = network.config
    twin = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    ours = network.state_dict()
    renamed = {
        **{f"pos_embed.proj.{k}": ours[f"patch_embedding.{k}"] for k in ("weight", "bias")},
        **{f"proj_out_1.{k}": ours[f"modulation_out.{k}"] for k in ("weight", "bias")},
        **{f"proj_out_2.{k}": ours[f"linear_out.{k}"] for k in ("weight", "bias")},
    }
    for i, block in enumerate(twin.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the code of the paper
        to = f"transformer_blocks.{i}."
        renamed[f"{to}norm1.emb.class_embedder.embedding_table.weight"] = ours["class_embedding.weight"]
        for k in ("weight", "bias"):
            for layer in (1, 2):
                name = f"{to}norm1.emb.timestep_embedder.linear_{layer}.{k}"
                renamed[name] = ours[f"time_embedding.linear_{layer}.{k}"]
            renamed[f"{to}norm1.linear.{k}"] = ours[f"blocks.{i}.modulation.{k}"]
            for name, part in zip("qkv", ours[f"blocks.{i}.attention.to_qkv.{k}"].chunk(3), strict=True):
                renamed[f"{to}attn1.to_{name}.{k}"] = part
            renamed[f"{to}attn1.to_out.0.{k}"] = ours[f"blocks.{i}.attention.to_out.{k}"]
            renamed[f"{to}ff.net.0.proj.{k}"] = ours[f"blocks.{i}.mlp.0.{k}"]
            renamed[f"{to}ff.net.2.{k}"] = ours[f"blocks.{i}.mlp.2.{k}"]
    twin.load_state_dict(renamed)
    return twin


def diffusers_(twin: nn.Module, x_0: Tensor, given: Tensor | None, *, bf16: bool, tuned: bool) -> Step:
    """Return a step of diffusers' train_unconditional.py --use_ema, of images of classes where some are given.

    Args:
        twin: their network.
        x_0: the images.
        given: their classes.
        bf16: whether bf16 autocast is on.
        tuned: channels-last, compiled, and with the fused AdamW.
    """
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    if tuned:
        twin = twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(twin) if tuned else twin
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
    optimizer = torch.optim.AdamW(twin.parameters(), fused=True if tuned else None, **options)
    ema = EMAModel(twin.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    labels = () if given is None else (given,)

    def step() -> float:
        noise = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device)
        timesteps = torch.randint(0, 1000, (len(x_0),), device=x_0.device).long()
        noisy = scheduler.add_noise(x_0, noise, timesteps)
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=bf16):
            output = forward(noisy, timesteps, *labels).sample
            loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(twin.parameters())
        return loss.item()

    return step


def lucidrains_network(model: Model, device: torch.device) -> nn.Module | None:
    """Return denoising-diffusion-pytorch's network, or None if it is not installed."""
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError:
        return None
    return None if model.lucidrains is None else Unet(**model.lucidrains).to(device)


def lucidrains(network: nn.Module, x_0: Tensor) -> Step:
    """Return a step of denoising-diffusion-pytorch's Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA as TheirEMA  # noqa: N811

    diffusion = GaussianDiffusion(network, image_size=SIZE, timesteps=1000).to(x_0.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = TheirEMA(diffusion, beta=0.995, update_every=10).to(x_0.device)
    images = (x_0 + 1) / 2

    def step() -> float:
        loss = diffusion(images)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return loss.item()

    return step


@torch.no_grad()
def difference(network: nn.Module, twin: nn.Module, x_0: Tensor, *, bf16: bool) -> float:
    """Return the largest difference of the networks' outputs before training, relative to the largest of theirs.

    Args:
        network: ours.
        twin: diffusers', always in float32.
        x_0: images.
        bf16: whether ours computes under bf16 autocast.
    """
    t, labels = torch.linspace(0, 999, len(x_0), device=x_0.device), labels_of(network, x_0)
    cond = () if labels is None else (Conditioning(label=labels),)
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=bf16):
        output = copy.deepcopy(network).eval()(x_0, t, *cond)
    expected = copy.deepcopy(twin).eval()(x_0, t, *(() if labels is None else (labels,))).sample
    return float((output - expected).abs().max() / expected.abs().max())


def step_flops(network: nn.Module, x_0: Tensor) -> float:
    """Return the floating-point operations of a step's forward and backward pass, with direct convolutions."""
    with FlopCounterMode(display=False) as counter:
        network(x_0[:1], torch.zeros(1, device=x_0.device)).sum().backward()
    network.zero_grad()
    return float(counter.get_total_flops()) * len(x_0)


def mfu(flop_per_s: float, device: torch.device) -> float | None:
    """Return the share of the device's peak FLOP/s, or None if the peak is unparser."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((p for part, p in PEAK_BF16.items() if part in name), None)
    return None if peak is None else round(flop_per_s / peak, 3)


def count(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in network.parameters())


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
