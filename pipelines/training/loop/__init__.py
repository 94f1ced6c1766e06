"""The training loop of one rank, on torch.distributed alone: it never imports Ray."""
