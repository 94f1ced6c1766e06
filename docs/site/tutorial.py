"""Run the code of the tutorial: every ```python block of every chapter, in order, in one namespace.

    python docs/site/tutorial.py FOLDER     # writes the pictures into FOLDER; docs/images/tutorial holds them

A ```text block right below one of code is what that prints. `differences` compares the two: words exactly, numbers
roughly, because another processor rounds otherwise.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUTORIAL = Path(__file__).parents[1] / "tutorial"
_BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@dataclass(frozen=True)
class Block:
    """A block of code of a chapter.

    Attributes:
        chapter: file name of the chapter.
        line: line of the chapter where the code begins.
        code: the code.
        expected: what the chapter says that it prints; None where it says nothing.
    """

    chapter: str
    line: int
    code: str
    expected: str | None


def chapters() -> list[Path]:
    """Return the files of the chapters, in order."""
    return sorted(TUTORIAL.glob("[0-9]*.md"))


def blocks(path: Path) -> Iterator[Block]:
    """Yield the code blocks of a chapter."""
    text = path.read_text()
    for found in _BLOCK.finditer(text):
        yield Block(path.name, text[: found.start(1)].count("\n") + 1, found[1], found[2])


def execute(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block in the current folder and return what it prints; an error has the chapter and its line."""
    code = compile("\n" * (block.line - 1) + block.code, block.chapter, "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def differences(expected: str, printed: str, *, share: float = 0.3) -> list[str]:
    """Return the lines of a printed text that are not what a chapter says.

    Args:
        share: how far a number may be from the expected one, as a share of it; a whole number may always be off by 2,
            another one by 0.03.
    """
    found = []
    one, other = expected.splitlines(), printed.splitlines()
    if len(one) != len(other):
        return [f"{len(other)} lines instead of {len(one)}: {printed}"]
    for line, actual in zip(one, other, strict=True):
        numbers, others = _NUMBER.findall(line), _NUMBER.findall(actual)
        same_words = _NUMBER.sub("#", line).split() == _NUMBER.sub("#", actual).split()
        if not same_words or not all(_near(a, b, share) for a, b in zip(numbers, others, strict=True)):
            found.append(f"expected {line!r}, printed {actual!r}")
    return found


def _near(expected: str, printed: str, share: float) -> bool:
    one, other = (float(text.replace(",", "")) for text in (expected, printed))
    return abs(one - other) <= max(0.03 if "." in expected else 2, share * abs(one))


def main(folder: Path) -> None:
    """Run all chapters in a folder and show what they print."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    namespace: dict[str, Any] = {}
    for path in chapters():
        for block in blocks(path):
            printed = execute(block, namespace)
            print(f"--- {block.chapter}:{block.line}\n{printed}", end="", flush=True)
            if block.expected is not None:
                for line in differences(block.expected, printed):
                    print(f"DIFFERS {line}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
