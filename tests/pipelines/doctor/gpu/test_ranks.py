"""Processes of the selftest: results, errors and deaths."""

from __future__ import annotations

import pytest

from pipelines.doctor.gpu import ranks_of_machine
from pipelines.doctor.gpu.ranks import Ranks, RanksError
from tests.pipelines.doctor.gpu.planted import fail, outlive


def test_the_error_of_a_rank_ends_all_and_is_named():
    with pytest.raises(RanksError, match="fallen off the bus"):
        Ranks(2, "cpu").run(fail)


def test_ranks_that_outlive_another_one_for_too_long_are_seen_and_ended():
    seconds, codes = Ranks(2, "cpu").seconds_after_death(outlive, within_s=0.5)
    assert seconds is None
    assert None in codes


def test_more_ranks_than_cards_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("multiprocessing.context.ForkServerContext.set_forkserver_preload", lambda *_: None)
    assert ranks_of_machine(None) == Ranks(2, "cuda")
    with pytest.raises(ValueError, match="3 ranks need as many GPUs, and this machine has 2"):
        ranks_of_machine(3)
