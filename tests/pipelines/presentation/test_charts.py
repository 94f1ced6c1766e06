import math
import re
from xml.etree import ElementTree

import pytest

from pipelines.presentation.charts import MOST_POINTS, Chart, Point, Series, number, thinned


def points(*values: float) -> list[Point]:
    return [Point(float(i), value) for i, value in enumerate(values)]


@pytest.mark.parametrize("style", ["line", "marked", "marks"])
@pytest.mark.parametrize("log_y", [False, True])
def test_a_chart_is_an_element_in_the_colours_of_the_page(style, log_y):
    with_intervals = [Point(p.x, p.y, p.y / 2, p.y * 2) for p in points(3.0, 2.0, 1.0)]
    chart = Chart(
        "A <title>", "x & y", "value", [Series("one", with_intervals, style), Series("two", points(1.0))], log_y
    )
    text = chart.svg()
    assert text.startswith("<svg ")
    ElementTree.fromstring(text)  # well formed, names and all
    assert "A &lt;title&gt;" in text
    assert "x &amp; y" in text
    assert {"var(--faint)", "var(--line)", "var(--series-1)", "var(--series-2)"} <= set(
        re.findall(r"var\([\w-]+\)", text)
    )
    colours = set(re.findall(r"#[0-9a-f]{6}\b", text))
    assert not colours - {"#000000", "#ffffff"}
    assert "http" not in text
    assert "<metadata" not in text


def test_the_same_chart_is_the_same_text_and_two_charts_share_no_id():
    def ids(text: str) -> set[str]:
        return {found for found in re.findall(r'\bid="(\w+)"', text) if re.match(r"[mp][0-9a-f]{8,}", found)}

    one, other = (Chart(title, "x", "y", [Series("", points(1.0, 2.0), "marked")]) for title in ("one", "other"))
    assert one.svg() == one.svg()
    assert ids(one.svg())
    assert not ids(one.svg()) & ids(other.svg())


def test_points_that_cannot_be_shown_are_left_out():
    chart = Chart("t", "x", "y", [Series("", points(math.nan, 2.0, 0.0, -1.0, math.inf, 4.0))], log_y=True)
    assert chart.summary == "Chart. t: y by x. 2 at 1, 4 at 5, lowest 2 at 1."


def test_a_long_curve_is_thinned_to_means_and_a_short_one_stays():
    short = points(1.0, 2.0)
    assert thinned(short, 2) == short
    long = points(*(float(i % 7) for i in range(5 * MOST_POINTS + 3)))
    found = thinned(long, MOST_POINTS)
    assert MOST_POINTS / 2 < len(found) <= MOST_POINTS
    assert found[0].y == pytest.approx(sum(p.y for p in long[:6]) / 6)
    assert [p.x for p in found] == sorted(p.x for p in found)


@pytest.mark.parametrize(
    "value, text",
    [(0.0213, "0.0213"), (3.0, "3"), (999.0, "999"), (5120.0, "5,120"), (51_200.0, "51.2 k"), (1.5e6, "1.5 M")],
)
def test_numbers_are_as_short_as_they_can_be(value, text):
    assert number(value) == text
