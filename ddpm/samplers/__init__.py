"""Samplers: generators that yield one `Sample` per step; each loop reads like its algorithm."""

from ddpm.samplers.ancestral import ancestral
from ddpm.samplers.common import Sample, initial_noise, last, step_noise
from ddpm.samplers.ddim import ddim
from ddpm.samplers.dpm_solver import dpm_solver
from ddpm.samplers.heun import heun
from ddpm.samplers.langevin import annealed_langevin, predictor_corrector

__all__ = [
    "Sample",
    "ancestral",
    "annealed_langevin",
    "ddim",
    "dpm_solver",
    "heun",
    "initial_noise",
    "last",
    "predictor_corrector",
    "step_noise",
]
