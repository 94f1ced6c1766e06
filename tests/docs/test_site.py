"""The site: its navigation, and the whole of it built strictly."""

from __future__ import annotations

import re

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.docs.modules import ROOT, load

reference = load("reference")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without what its tags for Python name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def paths(nav):
    if isinstance(nav, str):
        return [nav]
    return [path for part in (nav.values() if isinstance(nav, dict) else nav) for path in paths(part)]


def test_the_navigation_names_pages_that_there_are_and_every_made_one():
    named = paths(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    made = reference.pages().keys() | set(reference.COPIED.values()) | notebooks
    assert len(named) == len(set(named))
    assert made <= set(named)
    for path in set(named) - made:
        assert (ROOT / "docs" / path).is_file(), path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of a site built strictly: a link without a target is an error."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.mark.heavy
def test_no_page_loads_anything_from_another_server(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 35
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        assert not loaded, (page.name, loaded)


@pytest.mark.heavy
def test_pages_with_diagrams_have_the_script_that_draws_them(site):
    page = (site / "architecture.html").read_text()
    assert 'class="mermaid"' in page
    assert '<script src="assets/mermaid.min.js">' in page
    assert (site / "assets" / "mermaid.min.js").stat().st_size > 1_000_000


@pytest.mark.heavy
def test_links_out_of_the_docs_lead_to_pages_or_to_copies_of_files(site):
    page = (site / "architecture.html").read_text()
    assert 'href="contributing.html#adding-a-choice"' in page
    assert 'href="files/pyproject.toml"' in page
    assert (site / "files" / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text()


@pytest.mark.heavy
def test_a_function_of_the_mathematics_has_its_docstring_on_its_page(site):
    page = (site / "reference" / "python" / "noise-and-data.html").read_text()
    assert 'id="ddpm.gaussian.q_sample"' in page
    assert "a sample of q(x_t | x_0) if eps is standard normal" in page


@pytest.mark.heavy
def test_a_notebook_is_a_page_with_what_it_drew_and_links_to_pages(site):
    page = (site / "notebooks" / "plane.html").read_text()
    pictures = re.findall(r'src="(plane-[^"]+\.png)"', page)
    assert len(pictures) == 2
    for picture in pictures:
        assert (site / "notebooks" / picture).read_bytes().startswith(b"\x89PNG")
    assert 'href="../guides/a-search.html"' in page
    assert 'href="plane.html"' in (site / "notebooks" / "index.html").read_text()
