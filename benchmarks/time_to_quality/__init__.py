"""How good a model is after a time: this project's one command against diffusers' training loop, tuned."""
