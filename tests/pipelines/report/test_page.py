"""The page is complete in itself, escapes what it is told, and has a section for what is known and for nothing else."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipelines.presentation.images import Picture
from pipelines.registry import Verdict
from pipelines.report import Facts, sections
from pipelines.report.facts import FilmStrip, Tried
from pipelines.report.make import page as page_of
from tests.pipelines.report.facts import FULL, GOODPUT, SCORES, picture

EVERY = ["training", "data", "time", "curves", "scores", "gate", "samples", "growth", "film", "levels"]
EVERY += ["settings", "inpainting", "nearest", "notes"]
PARTS = {
    "training": {"training": (), "data": ()},
    "data": {"contents": ()},
    "time": {"goodput": None, "wall_s": None},
    "curves": {"curves": {}},
    "scores": {"scores": None},
    "gate": {"verdicts": ()},
    "samples": {"samples": None},
    "growth": {"growth": ()},
    "film": {"film": None},
    "levels": {"levels": None, "bound": ()},
    "settings": {"tried": ()},
    "inpainting": {"inpainting": None},
    "nearest": {"nearest": None, "copies": ""},
    "notes": {"notes": ()},
}
CHARTLESS = replace(FULL, curves={}, levels=None, bound=(), tried=())
"""Without what takes long to draw."""
EVIL = "<script>alert('x')</script>&\"><img src=http://evil/x>"


def page(facts: Facts) -> str:
    return page_of(facts, sections(facts))


class Reader(HTMLParser):
    """The elements of a page with their attributes, and the texts of a kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def full() -> Reader:
    return Reader(page(FULL))


def names(facts: Facts) -> list[str]:
    return [section.name for section in sections(facts)]


def test_known_facts_have_a_section_and_a_sentence_on_how_to_read_it(full):
    found = sections(FULL)
    assert [section.name for section in found] == EVERY
    assert [attributes["id"] for attributes in full.of("section")] == EVERY
    assert all(section.how.endswith(".") and len(section.how) > 40 for section in found)
    assert [attributes["href"] for attributes in full.of("a")][1:] == [f"#{name}" for name in EVERY]


@pytest.mark.parametrize("name", EVERY)
def test_unknown_facts_have_no_section(name):
    without = replace(FULL, **PARTS[name])
    assert names(without) == [other for other in EVERY if other != name]


def test_a_run_of_which_nothing_is_known_has_a_page():
    assert names(Facts("first", "first")) == []
    assert "<h1>first</h1>" in page(Facts("first", "first"))


def test_the_page_loads_nothing_and_leads_to_mlflow_alone(full):
    for _, attributes in full.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")) or value == FULL.link
    assert not full.of("link", "iframe", "object", "embed", "base", "form")
    text = full.text
    assert text.count("<script") == 1
    assert "@import" not in text
    assert not [address for address in re.findall(r"url\(([^)]*)\)", text) if not address.startswith("#")]
    assert set(re.findall(r"https?://[^\"'\s<)]+", text)) == {FULL.link}


def test_the_page_forbids_every_request_and_every_script_but_its_own(full):
    (policy,) = [a["content"] for a in full.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='$", policy)


def test_every_picture_has_its_text_and_its_size(full):
    shown = full.of("img")
    assert len(shown) == 7
    assert all(len(attributes["alt"] or "") > 20 for attributes in shown)
    assert all(int(attributes["width"] or 0) and int(attributes["height"] or 0) for attributes in shown)
    charts = full.of("svg")
    assert len(charts) == 8
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)
    assert "Loss: training loss by images seen. 1 at 100, 0.1 at 300, lowest 0.1 at 300." in charts[0]["aria-label"]
    # A chart that refers to an ID of another one would have its clips and marks.
    ids = [attributes["id"] for _, attributes in full.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > len(EVERY)
    assert set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", full.text)) <= set(ids)


def test_the_slider_has_a_grid_for_each_step_and_shows_the_last_one_without_a_script(full):
    grids = [attributes for attributes in full.of("figure") if "data-name" in attributes]
    assert [grid["data-name"] for grid in grids] == ["0 images seen", "500 images seen", "1,000 images seen"]
    assert ["hidden" in grid for grid in grids] == [True, True, False]
    (range_,) = full.of("input")
    assert (range_["type"], range_["min"], range_["max"], range_["value"]) == ("range", "0", "2", "2")


def test_names_captions_and_reasons_are_escaped_wherever_they_stand(full):
    tried = [Tried(EVIL, t.distance, t.evaluations, t.scale) for t in FULL.tried]
    facts = replace(
        CHARTLESS,
        name=EVIL,
        reference=EVIL,
        version=EVIL,
        training=((EVIL, EVIL),),
        data=((EVIL, EVIL),),
        scores=replace(SCORES, evaluator=EVIL, sampling={EVIL: EVIL}, real={EVIL: 3}),
        champion=(EVIL, SCORES),
        champion_note=EVIL,
        verdicts=(Verdict(False, EVIL, EVIL, EVIL, EVIL, champion=EVIL, at=EVIL),),
        film=FilmStrip(picture(3), EVIL),
        tried=tried[:2],
        copies=EVIL,
        notes=(EVIL,),
    )
    text = page(facts)
    told = Reader(text)
    assert len(told.of("script")) == 1
    assert len(told.of("img")) == len(full.of("img"))
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert") > 15


def test_the_champion_is_shown_with_the_scores_only_if_there_is_one(full):
    text = full.text
    assert re.search(r"<th scope=\"col\" class=\"n\">models:/digits/1</th>", text)
    assert '3.2 (3 to 3.4)</td><td class="n">2.9 (2.8 to 3)</td>' in text
    alone = page(replace(CHARTLESS, champion=None, champion_note="This version is the champion."))
    assert "models:/digits/1" not in alone
    assert "This version is the champion." in alone


def test_a_large_picture_is_kept_smaller_and_a_small_one_as_it_is():
    small = picture(1)
    assert Picture.of_file(small.data) == small
    assert small.url.startswith("data:image/png;base64,")
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(buffer, "PNG")
    large = Picture.of_file(buffer.getvalue())
    assert (large.width, large.height) == (300, 200)
    assert len(large.data) < len(buffer.getvalue()) / 2
    assert large.url.startswith("data:image/webp;base64,")


def test_every_part_of_a_runs_time_has_a_colour(full):
    for name in GOODPUT.parts():
        assert re.search(rf"\.part-{name} {{ background: #[0-9a-f]{{6}}; }}", full.text)
    bar = [a["class"] for a in full.of("span") if "style" in a]
    assert bar == ["part-productive", "part-data", "part-restart"]
