"""The tutorial's code runs as it stands, prints what its chapters say and draws their pictures."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from tests.docs.modules import ROOT, load
from tests.docs.shortened import with_fewer, without_assertions

DOCS = ROOT / "docs"
tutorial = load("tutorial")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


FEWER = {
    "train(Network(), 2500)": "train(Network(), 25)",
    "Ancestral(steps=200)(denoiser, schedule, x_T, noise": "Ancestral(steps=20)(denoiser, schedule, x_T, noise",
    "train(Network(), 3000, with_label_drop)": "train(Network(), 30, with_label_drop)",
    "Ancestral(steps=200)(denoiser, schedule, x_T, Conditioning(label=asked)": (
        "Ancestral(steps=20)(denoiser, schedule, x_T, Conditioning(label=asked)"
    ),
    "Ancestral(steps=200)(denoiser, schedule, x_T, None": "Ancestral(steps=20)(denoiser, schedule, x_T, None",
    "for _ in range(800):": "for _ in range(8):",
    "Ancestral(steps=100)(guided": "Ancestral(steps=10)(guided",
    "RePaint(steps=100, resamplings=1)": "RePaint(steps=10, resamplings=1)",
    "RePaint(steps=100, jump_length=5, resamplings=10)": "RePaint(steps=10, jump_length=5, resamplings=2)",
    "AnnealedLangevin(steps=40, steps_per_level=4)": "AnnealedLangevin(steps=4, steps_per_level=4)",
    "UPDATES = 2500": "UPDATES = 25",
}
"""Texts of the chapters that decide how long their code takes, and what stands there in the short form."""


def run_all(folder, fewer):
    """Run all chapters in a folder, and compare what they print and draw with what they say.

    From the first block on that is shorter than in its chapter, words are compared and numbers are not.
    """
    namespace, exact = {}, True
    for chapter in tutorial.chapters():
        for block in tutorial.blocks(chapter):
            exact = exact and not any(text in block.code for text in fewer)
            expected = block.expected or ""
            if exact:
                printed = tutorial.execute(block, namespace)
            else:
                code = without_assertions(with_fewer(block.code, fewer))
                printed = tutorial.execute(replace(block, code=code), namespace)
                expected, printed = (re.sub(r"-?\d[\d,]*\.?\d*", "0", text) for text in (expected, printed))
            differ = tutorial.differences(expected, printed)
            assert not differ, f"{block.chapter}, line {block.line}: {differ}"
    drawn = {path.name for path in folder.iterdir()}
    shown = {
        name
        for chapter in tutorial.chapters()
        for name in re.findall(r"\]\(\.\./images/tutorial/([\w-]+\.png)\)", chapter.read_text())
    }
    assert drawn == shown == {path.name for path in (DOCS / "images" / "tutorial").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_block_runs_and_prints_what_its_chapter_says(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    run_all(tmp_path, {})


@pytest.mark.heavy
def test_every_block_runs_with_fewer_updates_and_prints_the_words_of_its_chapter(tmp_path, monkeypatch, one_thread):
    whole = "".join(chapter.read_text() for chapter in tutorial.chapters())
    assert {text: whole.count(text) for text in FEWER} == dict.fromkeys(FEWER, 1)
    monkeypatch.chdir(tmp_path)
    run_all(tmp_path, FEWER)


def test_the_pictures_of_the_tutorial_are_small():
    assert all(path.stat().st_size < 60_000 for path in (DOCS / "images" / "tutorial").iterdir())


def test_every_chapter_is_listed_and_leads_to_the_next():
    names = [path.name for path in tutorial.chapters()]
    index = (DOCS / "tutorial" / "index.md").read_text()
    assert re.findall(r"\]\((\d\d-[\w-]+\.md)\)", index) == names
    for path, following in zip(tutorial.chapters(), names[1:], strict=False):
        assert f"({following})" in path.read_text().splitlines()[-1] + path.read_text().splitlines()[-2]


@pytest.mark.parametrize(
    "expected, printed, same",
    [
        ("mean 0.50\n", "mean 0.55\n", True),
        ("mean 0.50\n", "mean 0.90\n", False),
        ("97% right\n", "33% right\n", False),
        ("97% right\n", "97% wrong\n", False),
        ("", "something\n", False),
        ("mean -0.00\n", "mean 0.01\n", True),
    ],
)
def test_words_are_compared_exactly_and_numbers_roughly(expected, printed, same):
    assert (not tutorial.differences(expected, printed)) is same
