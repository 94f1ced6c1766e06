"""The command line, `ddpm VERB [key=value …]`: a module per group of verbs, which call the modules that do the work."""

from pipelines.cli.app import main

__all__ = ["main"]
