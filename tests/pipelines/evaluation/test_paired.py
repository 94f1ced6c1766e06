"""One of two that are equal is called better no more often than is said, however many are compared."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.quality import Measured
from pipelines.evaluation.paired import LEVEL, holm, paired_test


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1), max_size=9))
def test_holm_lies_between_bonferroni_and_no_correction_and_rejects_the_smallest(p_values):
    rejected = holm(p_values)
    assert {n for n, p in p_values.items() if p <= LEVEL / len(p_values)} <= rejected
    assert rejected <= {n for n, p in p_values.items() if p <= LEVEL}
    assert all(p_values[a] <= p_values[b] for a in rejected for b in p_values.keys() - rejected)


def test_holm_takes_the_next_step_at_a_larger_level():
    assert holm({"a": LEVEL / 3, "b": LEVEL / 2, "c": LEVEL}) == {"a", "b", "c"}
    assert holm({"a": LEVEL / 2, "b": LEVEL / 2, "c": LEVEL / 2}) == set()
    assert holm({"a": LEVEL / 3, "b": LEVEL / 1.9, "c": 0.9}) == {"a"}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_what_cannot_be_tested_is_no_gain(value):
    z, p = paired_test(Measured(value, torch.zeros(100)))
    assert (z, p) == (0, 0.5)
    assert not holm({"a": p})


def test_a_gain_far_beyond_chance_has_a_small_p_value_and_not_0():
    influence = torch.tensor([1.0, -1.0]).repeat(50)
    z, p = paired_test(Measured(10 * Measured(0.0, influence).standard_error, influence))
    assert z == pytest.approx(10)
    assert p == pytest.approx(7.62e-24, rel=0.01)  # tables of the normal distribution


def test_a_margin_is_granted_in_the_units_of_the_score():
    influence = torch.tensor([1.0, -1.0]).repeat(50)
    loss = Measured(-2.0, influence)
    assert paired_test(loss, 2.0)[0] == 0
    assert paired_test(loss, 3.0)[0] == pytest.approx(1 / loss.standard_error)
