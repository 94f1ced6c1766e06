"""Budgets of time as people write them, 90s, 30m, 1h30m, and spans of time in words."""

from __future__ import annotations

import re

from pipelines.presentation.errors import ConfigError

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
MOST_DAYS = 1_000
_PART = re.compile(r"(\d+(?:\.\d+)?)([dhms])")


def parse_budget(text: str) -> float:
    """Return a budget in seconds.

    Args:
        text: numbers with the units d, h, m, s, such as 90s, 10m, 1h or 1h30m.

    Raises:
        ConfigError: it has another form, is zero, or is longer than `MOST_DAYS`.
    """
    compact = text.strip().lower().replace(" ", "")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(compact))
    if _PART.sub("", compact) or not seconds:
        raise ConfigError(f"budget = {text}: write a time such as budget=90s, budget=30m, budget=2h or budget=1h30m")
    if seconds > MOST_DAYS * _UNITS["d"]:
        shown = text if len(text) <= 20 else f"{text[:20]}…"
        raise ConfigError(f"budget = {shown}: at most {MOST_DAYS}d can be planned for")
    return seconds


def format_duration(seconds: float) -> str:
    """Return a span of time for people: 45 s, 9 m 30 s, 2 h 10 m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} m" + (f" {whole % 60} s" if whole % 60 else "")
    if whole < 86_400:
        return f"{whole // 3_600} h" + (f" {whole % 3_600 // 60} m" if whole % 3_600 // 60 else "")
    return f"{whole // 86_400} d" + (f" {whole % 86_400 // 3_600} h" if whole % 86_400 // 3_600 else "")


def written(seconds: float) -> str:
    """Return a budget as `parse_budget` reads it, in its largest whole units: 90s, 30m, 1h30m."""
    left, text = round(seconds), ""
    for unit, size in _UNITS.items():
        count, left = divmod(left, size)
        text += f"{count}{unit}" if count else ""
    return text
