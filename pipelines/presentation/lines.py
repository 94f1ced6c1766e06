"""Lines of plain text, for outputs that are no terminal."""

from __future__ import annotations


def check_line(status: str, name: str, found: str, fix: str | None) -> str:
    """Return a check in one line: status, subject, finding, and what fixes it."""
    return f"{status:>8}  {name}: {found}" + (f"; fix: {fix}" if fix else "")
