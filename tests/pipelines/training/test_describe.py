"""The number of workers, as it is configured and described."""

from __future__ import annotations

import getpass
import os

import pytest

from pipelines.config import ConfigError, compose
from pipelines.training.describe import user_name, workers_text


def test_the_number_of_workers_is_one_or_a_range():
    fixed, elastic = (compose(["+experiment=digits", f"cluster.num_workers={n}"]) for n in ("3", "[1,4]"))
    assert (fixed.cluster.min_workers, fixed.cluster.max_workers) == (3, 3)
    assert (elastic.cluster.min_workers, elastic.cluster.max_workers) == (1, 4)
    assert (workers_text(fixed), workers_text(elastic)) == ("3 workers", "1 to 4 workers")
    assert fixed.identity() == elastic.identity()
    for wrong, why in (("[4,1]", "min <= max"), ("[1,200]", "exceeds batch_size"), ("0", "greater than 0")):
        with pytest.raises(ConfigError, match=why):
            compose(["+experiment=digits", f"cluster.num_workers={wrong}"])


def test_a_user_without_a_name_is_a_number(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    assert user_name() == "uid 12345"
    monkeypatch.setenv("USER", "ada")
    assert user_name() == "ada"
