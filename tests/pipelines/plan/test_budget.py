import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import ConfigError
from pipelines.plan.budget import format_duration, parse_budget, written


@pytest.mark.parametrize(
    "text, seconds", [("90s", 90), ("10m", 600), ("1h", 3600), ("1h30m", 5400), ("2d", 172_800), ("0.5h", 1800)]
)
def test_budgets_are_times(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "ten minutes", "10x", "-5m", "0m", "m10", "1h-3m"])
def test_malformed_budgets_are_refused_with_examples(text):
    with pytest.raises(ConfigError, match="write a time such as budget=90s"):
        parse_budget(text)


@given(st.integers(1, 10**7))
def test_a_budget_is_written_as_it_is_read(seconds):
    assert parse_budget(written(seconds)) == seconds
    assert format_duration(seconds)
