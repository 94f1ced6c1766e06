"""Ingest: images from any source to shards with their indexes."""
