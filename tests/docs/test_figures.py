"""The measured figures of the pages are those of the files in benchmarks/results."""

from __future__ import annotations

import difflib
import re

import pytest

from benchmarks.pages import PAGES, figures, fixed, percent, results, updated
from tests.docs.modules import ROOT

PAGE = """They take 2.5 s of the
14, and 3.0 s of the 1,000.

<!-- table: speed -->

| | images/s |
|---|---|
| theirs | 7 |

Ours is ahead."""


@pytest.mark.parametrize("page", PAGES)
def test_the_figures_of_a_page_are_those_of_its_files(page):
    text, lines = (ROOT / "docs" / f"{page}.md").read_text(), figures(page)
    assert len(lines.splitlines()) >= 4
    there, wanted = (each.splitlines(keepends=True) for each in (text, updated(text, lines)))
    differences = "".join(difflib.unified_diff(there, wanted, f"docs/{page}.md", "what `make figures` writes there"))
    assert not differences, differences


def test_every_file_of_results_that_a_page_links_is_compared():
    linked = {
        (page.stem, name)
        for page in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"benchmarks/results/([\w-]+)\.json", page.read_text())
    }
    assert len(linked) > 8
    assert {page for page, _ in linked} == set(PAGES)


def test_what_is_no_convolution_attention_or_product_has_the_same_share_of_both_networks_steps():
    for name in ("step_profile", "step_profile_amx"):
        small, large = (percent(model["others"], 0) for model in results()[name]["models"].values())
        assert small == large


def test_the_faults_of_a_long_training_are_those_of_its_parts():
    soak = results()["soak"]
    assert sum(soak["faults"].values()) == sum(part["faults"] for part in soak["parts"])


def test_the_best_two_settings_of_the_study_of_guidance_differ_by_less_than_either_standard_error():
    first, second, _, _ = results()["studies"]["studies"]["guidance"]["confirmation"]["confirmed"]
    gap = second["distance"]["value"] - first["distance"]["value"]
    assert gap < min(each["scores"]["standard_error"] for each in (first, second))


def test_all_eight_trials_with_v_ended_and_had_the_same_schedule_and_timesteps_and_two_others_ended():
    trials = results()["studies"]["studies"]["training"]["trials"]
    by_v = [trial for trial in trials if trial["params"]["objective.prediction"] == "v"]
    ended = [trial for trial in trials if trial["state"] == "finished"]
    assert all(trial in ended and trial["params"]["schedule.kind"] == "cosine" for trial in by_v)
    assert all(trial["params"]["objective.timesteps"] == "stratified" for trial in by_v)
    assert (len(by_v), len(ended) - len(by_v), len(trials)) == (8, 2, 16)


def test_figures_are_written_where_their_words_are_and_rows_below_the_head_of_their_table():
    lines = "They take 2.75 s of the 14\n<!-- table: speed -->\n| ours | 8 |\n| theirs |  |"
    assert updated(PAGE, lines) == PAGE.replace("2.5", "2.75").replace("| theirs | 7 |", "| ours | 8 |\n| theirs | |")


def test_lines_with_the_same_words_are_in_the_order_of_the_page():
    lines = "1.25 s of the 15\n3 s of the 1,200\n<!-- table: speed -->\n| theirs | 7 |"
    assert updated(PAGE, lines).startswith("They take 1.25 s of the\n15, and 3 s of the 1,200.\n")


@pytest.mark.parametrize(
    "lines, message",
    [
        ("<!-- table: speed -->\nOurs took 3 s", "the page has 0 times, and not 1 times, the words of: Ours took 3 s"),
        ("<!-- table: speed -->\n3 s of the 14", "the page has 2 times"),
        ("<!-- table: cost -->", r"the page has the tables \['speed'\], and not \['cost'\]"),
    ],
)
def test_a_figure_without_its_place_in_the_page_is_refused(lines, message):
    with pytest.raises(ValueError, match=message):
        updated(PAGE, lines)


def test_numbers_are_rounded_as_people_do():
    assert fixed(25.95, 1) == "26.0"
    assert fixed([1234, 0.005, -0.001]) == "1,234 | 0.01 | -0.00"
    assert percent(0.0285, 1) == "2.9 %"
