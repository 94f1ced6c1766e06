"""Evaluation: features, scores, pictures."""
