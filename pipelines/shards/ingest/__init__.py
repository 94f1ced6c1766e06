"""Ingest: write images from any source as WebDataset shards with sidecars and dataset.json."""
