"""The base class of every error whose message is written for a user of the pipeline."""

from __future__ import annotations


class PipelineError(Exception):
    """An expected failure: its message says what happened, why, and what to do.

    Attributes:
        exit_code: with which the command line ends: 1 (failed), or 2 (bad usage or configuration, nothing has started).
    """

    exit_code = 1


class ConfigError(PipelineError, ValueError):
    """A configuration that cannot run: says where, what is allowed and how to fix it."""

    exit_code = 2
