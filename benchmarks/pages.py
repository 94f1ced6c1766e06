"""Write the measured figures of `docs/*.md` into the pages: `python -m benchmarks.pages`.

`templates/PAGE.md.jinja` has the lines of a page with figures; files of `results/` have their own names there. A number
that is no integer is rounded to two decimals unless the template says otherwise; of several each is a cell of a table.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from benchmarks.digits import page as digits_page
from benchmarks.results import ROOT

TEMPLATES = Path(__file__).parent / "templates"
PAGES = sorted(path.name.removesuffix(".md.jinja") for path in TEMPLATES.iterdir())
_NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
_MARKER = r"<!-- table: (.+) -->"
_TABLE = re.compile(rf"({_MARKER}\n\n\|.*\n\|[-|]+\n)((?:\|.*\n)*)")


def results() -> dict[str, Any]:
    """Return what the files of results have, by their names."""
    return {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}


def figures(page: str) -> str:
    """Return the lines of a page with measured figures."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=fixed
    )
    environment.filters |= FILTERS
    environment.globals["SOLVERS"] = {"ddim": "DDIM", "dpm_solver": "DPM-Solver++", "unipc": "UniPC"}
    return environment.get_template(f"{page}.md.jinja").render(results())


def updated(text: str, lines: str) -> str:
    """Return the text of a page with these figures in it.

    Args:
        text: a line `<!-- table: NAME -->` and an empty one stand above the head of each measured table.
        lines: such a line and the rows of its table, or a sentence or a part of one. Its place in the page is where its
            words are, whichever numbers stand there; lines with the same words are in the order of the page.

    Raises:
        ValueError: the page has other tables, or the words of a line more or less often.
    """
    tables: dict[str, str] = {}
    sentences: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, lines.splitlines())):
        if marker := re.fullmatch(_MARKER, line):
            name = marker[1]
            tables[name] = ""
        elif line.startswith("|"):
            tables[name] += re.sub(r"\| +(?=\|)", "| ", line) + "\n"
        else:
            words = r"\s+".join(map(re.escape, re.sub(_NUMBER, "0", line).split())).replace("0", _NUMBER)
            sentences.setdefault(words, []).append(line)
    if (there := sorted(found[2] for found in _TABLE.finditer(text))) != sorted(tables):
        raise ValueError(f"the page has the tables {there}, and not {sorted(tables)}")
    text = _TABLE.sub(lambda found: found[1] + tables[found[2]], text)
    for words, same in sentences.items():
        text = _with_numbers(text, words, list(dict.fromkeys(same)))
    return text


def _with_numbers(text: str, words: str, sentences: list[str]) -> str:
    """Return a page with the numbers of these sentences in the places that have their words."""
    if (places := len(re.findall(words, text))) != len(sentences):
        raise ValueError(f"the page has {places} times, and not {len(sentences)} times, the words of: {sentences[0]}")
    numbers = iter(re.findall(_NUMBER, " ".join(sentences)))
    return re.sub(words, lambda place: re.sub(_NUMBER, lambda _: next(numbers), place[0]), text)


# --- filters of the templates --------------------------------------------------------------------------------


def fixed(value: Any, digits: int = 2, between: str = " | ", times: int = 1, unit: str = "") -> str:
    """Return a number, or several, rounded as people do: 25.95, which no binary number is, to 26.0."""
    if isinstance(value, str):
        return value
    if isinstance(value, Iterable):
        return between.join(fixed(each, digits, between, times, unit) for each in value)
    exact = Decimal(1).scaleb(0 if isinstance(value, int) else -digits)
    return f"{(times * Decimal(repr(value))).quantize(exact, ROUND_HALF_UP):,}{unit}"


def percent(share: Any, digits: int = 1, between: str = " | ") -> str:
    """Return a share, or several, in percent."""
    return fixed(share, digits, between, 100, " %")


def interval(found: Mapping[str, float], digits: int = 2, times: int = 1, unit: str = "") -> str:
    """Return a value with the ends of its interval."""
    ends = fixed(pick(found, "low", "high"), digits, " to ", times)
    return f"{fixed(found['value'], digits, times=times, unit=unit)} ({ends})"


def with_error(found: Mapping[str, float], key: str = "distance", sign: int = 1) -> str:
    """Return a mean over seeds, and its standard error where there are several."""
    error = found.get(f"{key}_standard_error")
    return fixed(found[key], times=sign) + ("" if error is None else f" ± {fixed(error)}")


def pick(found: Any, *keys: str) -> list[Any]:
    """Return some values of an object, or a column of rows."""
    return [found[key] for key in keys] if isinstance(found, Mapping) else [row[key] for row in found for key in keys]


def where(rows: Iterable[Any], **values: Any) -> list[Any]:
    """Return the rows that have these values; of an object, these among others."""

    def has(found: Any, value: Any) -> bool:
        return value.items() <= found.items() if isinstance(value, dict) else found == value

    return [row for row in rows if all(has(row[key], value) for key, value in values.items())]


def drawn(rows: Iterable[Any], model: str, sampler: str, *evaluations: int) -> list[Any]:
    """Return the rows of `benchmarks.few_steps` with these numbers of evaluations, as far as there are such."""
    return [row for count in evaluations for row in where(rows, model=model, sampler=sampler, evaluations=count)]


def difference_at(rows: Iterable[Any], power: float) -> float:
    """Return the difference that the gate tells with this power, interpolated between those of `benchmarks.gate`."""
    points = sorted((row["power"], row["difference"]) for row in rows)
    return float(np.interp(power, *np.transpose(points)))


FILTERS = {
    **{each.__name__: each for each in (fixed, percent, interval, with_error, pick, where, drawn, difference_at)},
    "median": lambda rows, key: statistics.median(pick(rows, key)),
    "mean": lambda rows, key: statistics.mean(pick(rows, key)),
    "first_and_mean": lambda values: fixed([values[0], statistics.fmean(values)], 0, ", "),
    "significant": lambda value: f"{float(f'{value:.3g}'):,g}",
    "cell": digits_page.cell,
    "by_method": lambda rows: digits_page.table("", rows).split("\n", 2)[2],
    "by_budget": lambda rows, score: digits_page.by_budget(rows, score).split("\n", 2)[2],
}

if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / "docs" / f"{name}.md"
        path.write_text(updated(path.read_text(), figures(name)))
