"""Which pictures a model was trained on: where a picture is in the datasets, and what has seen it (`ddpm seen`)."""
