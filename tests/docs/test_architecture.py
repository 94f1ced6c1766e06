"""The page on the architecture says what the contracts of imports say, and names files that are there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
CONTRACT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]


def _boxes() -> dict[str, list[str]]:
    """Return the parts in each box of the diagram, by the box's name in its source."""
    boxes = re.findall(r'^    (\w+)\["(.*)"\]$', PAGE, flags=re.MULTILINE)
    return {name: re.findall(r"<b>(\w+)</b>", text) for name, text in boxes}


def test_the_diagram_draws_the_layers_of_the_import_contract_from_top_to_bottom() -> None:
    arrows = [line.split(" --> ") for line in re.findall(r"^    (\w+(?: --> \w+)+)$", PAGE, flags=re.MULTILINE)]
    order = [arrows[0][0]] + [box for line in arrows for box in line[1:]]
    boxes = _boxes()
    assert [set(boxes[name]) for name in order] == [
        {part.removeprefix("pipelines.") for part in layer.split(" | ")} for layer in CONTRACT["layers"]
    ]
    assert set(order) == set(boxes)


def test_every_room_of_the_package_is_in_a_layer() -> None:
    rooms = {path.parent.name for path in (ROOT / "pipelines").glob("*/__init__.py")}
    loose = {path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"__init__"}
    layered = {part.removeprefix("pipelines.") for layer in CONTRACT["layers"] for part in layer.split(" | ")} - {
        "ddpm"
    }
    assert rooms == layered
    assert loose == {"served_model"}, "it is stored with models by this name; everything else lives in a room"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_that_a_page_for_developers_names_is_there(page: str) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", (ROOT / page).read_text())
    named = [name for name in named if not re.search(r"NAME|PAGE|^build/", name)]
    places = (ROOT, ROOT / "pipelines", ROOT / "pipelines/training")
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    assert len(named) > 10
    assert not missing
