"""Samplers, one algorithm per file: callable settings whose loop reads like the paper's algorithm."""

from ddpm.choices import Choices
from ddpm.samplers.ancestral import Ancestral
from ddpm.samplers.annealed_langevin import AnnealedLangevin
from ddpm.samplers.base import Sample, Sampler, StepNoise, initial_noise, last, step_noise
from ddpm.samplers.consistency import Consistency
from ddpm.samplers.ddim import DDIM
from ddpm.samplers.dpm2 import DPM2
from ddpm.samplers.dpm_solver import DPMSolver
from ddpm.samplers.generalized import GeneralizedSolver
from ddpm.samplers.heun import Heun
from ddpm.samplers.predictor_corrector import PredictorCorrector
from ddpm.samplers.unipc import UniPC

SAMPLERS: Choices[type[Sampler]] = Choices(
    "sampler",
    "ddpm.samplers",
    {
        "ddim": DDIM,
        "ancestral": Ancestral,
        "dpm_solver": DPMSolver,
        "heun": Heun,
        "predictor_corrector": PredictorCorrector,
        "dpm2": DPM2,
        "langevin": AnnealedLangevin,
        "unipc": UniPC,
        "consistency": Consistency,
        "generalized": GeneralizedSolver,
    },
)

__all__ = [
    "DDIM",
    "DPM2",
    "SAMPLERS",
    "Ancestral",
    "AnnealedLangevin",
    "Consistency",
    "DPMSolver",
    "GeneralizedSolver",
    "Heun",
    "PredictorCorrector",
    "Sample",
    "Sampler",
    "StepNoise",
    "UniPC",
    "initial_noise",
    "last",
    "step_noise",
]
