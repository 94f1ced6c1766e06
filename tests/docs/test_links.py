"""Every link between the Markdown files of the repository leads somewhere, as GitHub resolves it."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.docs.modules import ROOT

PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "infra/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@cache
def prose(path):
    """Return the text of a page without code."""
    return re.sub(r"`[^`\n]*`", lambda code: "x" * len(code[0]), FENCE.sub("", (ROOT / path).read_text()))


@cache
def anchors(path):
    """Return the anchors that GitHub gives to the headings of a page."""
    found, seen = set(), {}
    for heading in re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", (ROOT / path).read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = seen.get(slug, 0)
        seen[slug] = number + 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_to_a_file_and_a_heading_that_there_is(page):
    for target in LINK.findall(prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page.parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.relative_to(ROOT)), f"{page}: {target}"


def test_all_pages_are_looked_at():
    assert len(PAGES) > 25
    assert sum(len(LINK.findall(prose(page))) for page in PAGES) > 100
