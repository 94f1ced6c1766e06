"""Samplers: generators that yield one `Sample` per step; each loop reads like its algorithm."""

from ddpm.samplers.ancestral import ancestral
from ddpm.samplers.common import Sample, initial_noise, last, step_noise
from ddpm.samplers.ddim import ddim

__all__ = ["Sample", "ancestral", "ddim", "initial_noise", "last", "step_noise"]
