"""The description of a run on its MLflow page: what it trains, its newest score, and links to its model and reports.

Training, evaluation and registration each write their own lines and keep the others, including text of the user.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from pipelines.tracking import links
from pipelines.tracking.run import Tracker

Part = Literal["Training", "Warnings", "Score", "Registered", "Goodput", "Samples", "Commands"]
_PARTS: tuple[Part, ...] = ("Training", "Warnings", "Score", "Registered", "Goodput", "Samples", "Commands")
"""In display order; the page shows only the first lines unless expanded."""
NOTE_TAG = "mlflow.note.content"
_WRITING = threading.Lock()  # a driver scores checkpoints in a separate thread
_SEEN = re.compile(r"at ([\d,]+) images\b")
# The whole description of a run of an earlier release.
_EARLIER = re.compile(r"[\d,]+ images of `.*; sample with `ddpm sample runs:/\w+ --out DIR`\.")


def describe(tracker: Tracker, parts: Mapping[Part, str]) -> None:
    """Rewrite parts of a run's description, and show the newest picture in it.

    Args:
        parts: name of a part -> Markdown in one line.
    """
    experiment_id, newest = tracker.experiment_id(), newest_picture(tracker.names("images"))
    shown = dict(parts)
    if newest is not None:
        name, key, step = newest
        page = links.run_page(experiment_id, tracker.run_id, "model-metrics")
        shown["Samples"] = (
            f"{key} at {step:,} images; all are at the end of [*Model metrics*]({page}), whose steps are images seen.  "
            f"![{key}]({links.artifact(tracker.run_id, name)})"
        )
    with _WRITING:
        tracker.tags({NOTE_TAG: with_parts(tracker.tag(NOTE_TAG) or "", shown)})


def with_parts(note: str, parts: Mapping[Part, str]) -> str:
    """Return a description with some parts replaced; text that is not ours is kept, above our parts.

    A part that starts with "at N images" is not replaced by one with fewer images, because checkpoints are not always
    scored in order.

    Args:
        parts: name of a part -> Markdown in one line.
    """
    ours: dict[Part, str] = {}
    others = []
    for line in note.splitlines():
        part = next((part for part in _PARTS if line.startswith(_label(part))), None)
        if part is not None:
            ours[part] = line.removeprefix(_label(part)).strip()
        elif not _EARLIER.fullmatch(line.strip()):
            others.append(line.rstrip())
    ours |= {part: text for part, text in parts.items() if _seen(text) >= _seen(ours.get(part, ""))}
    # Two spaces break a line in Markdown.
    lines = [f"{_label(part)}{ours[part]}" for part in _PARTS if part in ours]
    above = re.sub(r"\n{3,}", "\n\n", "\n".join(others)).strip()
    return "\n\n".join(text for text in (above, "  \n".join(lines)) if text)


def newest_picture(names: Iterable[str]) -> tuple[str, str, int] | None:
    """Return (artifact, key, step) of the picture with the most images seen, preferably of an evaluation.

    Args:
        names: artifacts, as MLflow names its pictures: images/KEY+step+STEP+timestamp+….png.
    """
    found = ((step, key == "evaluation", name, key) for name, key, step in _pictures(names))
    step, _, name, key = max(found, default=(0, False, "", ""))
    return (name, key, step) if name else None


def pictures_at(names: Iterable[str], images_seen: int) -> dict[str, str]:
    """Return key -> artifact of the pictures of a number of images seen; the newest of each key.

    Args:
        names: artifacts, as for `newest_picture`.
    """
    return {key: name for name, key, step in sorted(_pictures(names)) if step == images_seen}


def pictures_of(names: Iterable[str], key: str) -> dict[int, str]:
    """Return images seen -> artifact of the pictures of a key, in order of images seen; the newest of each.

    Args:
        names: artifacts, as for `newest_picture`.
    """
    return dict(sorted((step, name) for name, of, step in sorted(_pictures(names)) if of == key))


def _pictures(names: Iterable[str]) -> Iterator[tuple[str, str, int]]:
    """Yield (artifact, key, step) of every picture; by name, those of the same key and step are in order of time."""
    for name in names:
        key, word, at, *_ = f"{name.removeprefix('images/')}+++".split("+")
        if word == "step" and name.endswith(".png"):
            yield name, key, int(at)


def _seen(text: str) -> int:
    """Return the number of images at the start of a part; -1 if there is none."""
    found = _SEEN.match(text)
    return int(found[1].replace(",", "")) if found else -1


def _label(part: str) -> str:
    return f"**{part}.** "
