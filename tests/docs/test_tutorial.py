"""The tutorial's code runs as it stands, prints what its chapters say and draws their pictures."""

from __future__ import annotations

import re

import pytest
import torch

from tests.docs.modules import ROOT, load

DOCS = ROOT / "docs"
tutorial = load("tutorial")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.heavy
def test_every_block_runs_and_prints_what_its_chapter_says(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for chapter in tutorial.chapters():
        for block in tutorial.blocks(chapter):
            printed = tutorial.execute(block, namespace)
            differ = tutorial.differences(block.expected or "", printed)
            assert not differ, f"{block.chapter}, line {block.line}: {differ}"
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = {
        name
        for chapter in tutorial.chapters()
        for name in re.findall(r"\]\(\.\./images/tutorial/([\w-]+\.png)\)", chapter.read_text())
    }
    assert drawn == shown == {path.name for path in (DOCS / "images" / "tutorial").iterdir()}
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
