"""Code of the documentation with fewer updates and samples: it runs, and has learned too little to be right."""

from __future__ import annotations

import re
from collections.abc import Mapping

_ASSERTION = re.compile(r"^( *)assert .*$", re.MULTILINE)


def with_fewer(code: str, fewer: Mapping[str, str]) -> str:
    """Return code with the texts in place of others that `fewer` names."""
    for text, shorter in fewer.items():
        code = code.replace(text, shorter)
    return code


def without_assertions(code: str) -> str:
    """Return code that does not ask whether what it has learned is right; its assertions are lines of their own."""
    return _ASSERTION.sub(r"\1pass", code)
