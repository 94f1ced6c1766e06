"""Scan tars: index those that other tools wrote, and check every byte of a dataset against its index."""
