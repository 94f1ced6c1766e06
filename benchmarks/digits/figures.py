"""The figures of the page `docs/digits.md`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm.bound import vlb_weight
from ddpm.gaussian import ReverseVariance
from ddpm.generate import to_uint8
from ddpm.schedule import make_schedule

mpl.use("Agg")
ZOOM, GAP, LABEL = 5, 3, 290


def strips(path: Path, rows: list[tuple[str, Tensor]]) -> None:
    """Write a PNG with one row of images [K, 1, H, W] per name."""
    side = rows[0][1].shape[-1] * ZOOM
    columns = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (LABEL + columns * (side + GAP) + GAP, len(rows) * (side + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for row, (name, images) in enumerate(rows):
        top = GAP + row * (side + GAP)
        draw.text((6, top + side // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(to_uint8(images).numpy()):
            tile = Image.fromarray(image[..., 0]).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (LABEL + GAP + column * (side + GAP), top))
    canvas.save(path, optimize=True)


def weights(path: Path) -> None:
    """Plot L_simple's weight relative to the bound's, by timestep, for two schedules and both fixed variances."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    t = torch.arange(2, 1001)
    for kind, colour in (("linear", "tab:blue"), ("cosine", "tab:orange")):
        for variance in get_args(ReverseVariance):
            line = {"small": "-", "large": "--"}[variance]
            relative = 1 / vlb_weight(make_schedule(kind), t, variance)
            axes.semilogy(t, relative, line, color=colour, label=f"{kind}, {variance} variance")
    axes.set(xlabel="timestep t", ylabel="weight in L_simple / weight in L_vlb", ylim=(0.1, None))
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bound_terms(path: Path, terms: dict[str, list[float]]) -> None:
    """Plot the bound's terms by timestep."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, values in terms.items():
        axes.loglog(range(1, len(values) + 1), values, label=name.removeprefix("bound, "))
    axes.set(xlabel="timestep t (1 is the decoder)", ylabel="bits per dimension")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def two_modes() -> tuple[Tensor, Tensor]:
    """Return a grid of points and a density with two modes on it."""
    x = torch.linspace(-2, 2, 8001, dtype=torch.float64)
    density = torch.exp(-((x + 0.8) ** 2) / 0.08) + torch.exp(-((x - 0.8) ** 2) / 0.08)
    return x, density / torch.trapezoid(density, x)


def reverse_posterior(beta: float, x_t: float) -> tuple[Tensor, Tensor, float]:
    """Return (q(x_{t-1} | x_t), the Gaussian with its mean and variance, their total variation) for `two_modes`."""
    x, prior = two_modes()
    posterior = prior * torch.exp(-((x_t - math.sqrt(1 - beta) * x) ** 2) / (2 * beta))
    posterior = posterior / torch.trapezoid(posterior, x)
    mean = torch.trapezoid(posterior * x, x)
    variance = torch.trapezoid(posterior * (x - mean) ** 2, x)
    gaussian = torch.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance).sqrt()
    return posterior, gaussian, torch.trapezoid((posterior - gaussian).abs(), x).item() / 2


BETAS = (0.5, 0.2, 0.05, 0.01)


def reverse_steps(path: Path, x_t: float = 0.1) -> dict[float, float]:
    """Plot q(x_{t-1} | x_t) for decreasing beta and return beta -> its distance from a Gaussian."""
    x, prior = two_modes()
    figure, axes = plt.subplots(1, len(BETAS), figsize=(11, 2.6), layout="constrained")
    distances = {}
    for axis, beta in zip(np.atleast_1d(axes), BETAS, strict=True):
        posterior, gaussian, distances[beta] = reverse_posterior(beta, x_t)
        axis.fill_between(x, prior / prior.max() * posterior.max(), color="0.9", label="q(x_{t-1}), scaled")
        axis.plot(x, posterior, label="q(x_{t-1} | x_t)")
        axis.plot(x, gaussian, "--", label="Gaussian")
        axis.set(title=f"beta = {beta:g}, distance {distances[beta]:.3f}", yticks=[], xlim=(-1.6, 1.6))
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return distances
