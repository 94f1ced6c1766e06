"""Blocks as Markdown, for descriptions in MLflow."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.presentation.blocks import Block, Code, Image, Items, Link, Listing, Section, Strong, Table, Text, Words

_SPECIAL = re.compile(r"([\\`*\[\]>|#]|(?<!\w)_|_(?!\w))")  # an underscore within a word means nothing


def section(shown: Section) -> str:
    """Return a section under its title; without a title, its blocks alone."""
    heading = [f"### {shown.title}"] if shown.title else []
    how = [words(shown.how)] if shown.how else []
    return "\n\n".join([*heading, *how, *map(block, shown.blocks)])


def block(shown: Block) -> str:
    """Return a block.

    Raises:
        TypeError: Markdown has no form of it.
    """
    match shown:
        case Text():
            return words(shown.words)
        case Items():
            return "\n".join(f"- {words(item)}" for item in shown.items)
        case Listing():
            return f"```{shown.language}\n{shown.text}\n```"
        case Table():
            return _table(shown)
        case Image():
            caption = f"{words(shown.caption)}:\n\n" if shown.caption else ""
            return f"{caption}![{shown.alt}]({shown.url})"
    raise TypeError(f"a block of the kind {shown.kind!r} has no form in Markdown")


def words(shown: Words) -> str:
    """Return text within a line; plain strings are escaped."""
    match shown:
        case str():
            return _SPECIAL.sub(r"\\\1", " ".join(shown.split())).replace("<", "&lt;")
        case Code():
            return f"`{' '.join(shown.text.replace('`', '').split())}`"
        case Strong():
            return f"**{words(shown.text)}**"
        case Link():
            return f"[{words(shown.text)}]({shown.url})"
    return "".join(_kept_spaces(part) for part in shown)


def _kept_spaces(part: str | Code | Strong | Link) -> str:
    if not isinstance(part, str):
        return words(part)
    before, after = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
    return f"{before and ' '}{words(part)}{after and ' ' if part.strip() else ''}"


def _table(shown: Table) -> str:
    """Return a table; MLflow's page has no space of its own between columns."""
    rows: Sequence[Sequence[Words]] = [shown.head, *shown.rows]
    cells = [[words(row[0]), *(f"&emsp;{words(cell)}" if cell else "" for cell in row[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], ["---"] * len(shown.head), *cells[1:]])
