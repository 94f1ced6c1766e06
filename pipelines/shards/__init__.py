"""WebDataset shards: writing, indexing, the order of samples, and reading."""
