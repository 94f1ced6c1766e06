"""Hyperparameter search: over what needs training, and over guidance and samplers of one trained model."""
