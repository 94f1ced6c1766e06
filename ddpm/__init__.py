"""Denoising diffusion models in pure torch: schedules, objectives, guidance, samplers, likelihoods, networks."""
