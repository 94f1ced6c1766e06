"""Evaluation of models: features of an evaluator network, scores, and grids of samples."""
