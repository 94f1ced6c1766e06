"""Orchestration of diffusion training: data, training, evaluation, search and registry on Ray, S3 and MLflow."""
