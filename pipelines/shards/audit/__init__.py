"""Scanning of tars: index those written by other tools, and check every byte of a dataset against its index."""
