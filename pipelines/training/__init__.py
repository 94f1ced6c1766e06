"""Training on Ray Train: driver and rank loop."""
