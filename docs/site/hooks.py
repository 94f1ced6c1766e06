"""What MkDocs does besides building docs/*.md as they are.

- Pages that are made from the code (`reference.py`), from notebooks, and from files elsewhere in the repository, such
  as README.md.
- Links that leave docs/ lead to those pages, or to a copy of the file that they name.
- Pages that the navigation does not name are put at the end of its guides.
- Pages with a diagram get Mermaid, from an installed package: nothing is loaded from other servers.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def _load(name: str) -> Any:
    """Import a module beside this one, which is no package."""
    spec = importlib.util.spec_from_file_location(f"ddpm_site_{name}", Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ROOT = Path(__file__).parents[2]
reference = _load("reference")
UNNAMED = "Guides"
"""Group of the navigation for pages that it does not name."""
NOTEBOOKS = "notebooks"
"""Folder of the notebooks, below docs/; each is a page, and a file to download."""
MERMAID = "assets/mermaid.min.js"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages that the navigation does not name."""
    named = set(_paths(config.nav))
    there = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    unnamed = sorted(path for path in there - named if not path.startswith("site/"))
    for group in config.nav or []:
        if UNNAMED in group:
            group[UNNAMED] += unnamed
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made from the code and from the rest of the repository."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    for source, path in reference.COPIED.items():
        files.append(File.generated(config, path, content=(ROOT / source).read_text()))
    for notebook in sorted((ROOT / "docs" / NOTEBOOKS).glob("*.ipynb")):
        _add_notebook(notebook, files, config)
    origins = {path: source for source, path in reference.COPIED.items()}
    for file in list(files.documentation_pages()):
        origin = origins.get(file.src_uri, f"docs/{file.src_uri}")
        for target in _targets(file.content_string):
            path = _repository_path(origin, target)
            outside = not path.startswith("docs/") and path not in reference.COPIED and (ROOT / path).is_file()
            if outside and files.get_file_from_path(f"files/{path}") is None:
                files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links right that leave docs/, and lists that GitHub shows as such without an empty line before them."""
    origins = {path: source for source, path in reference.COPIED.items()}
    origin = origins.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = _FENCE.split(markdown)
    for i in range(0, len(parts), 2):
        parts[i] = _LINK.sub(lambda found: _relinked(found, origin, page.file.src_uri), parts[i])
        parts[i] = re.sub(r"(^(?![-*#>|\s]|\d+\.).+\n)(?=([-*]|\d+\.) )", r"\1\n", parts[i], flags=re.MULTILINE)
    return "".join(parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Give pages with diagrams the script that draws them."""
    if 'class="mermaid"' not in output:
        return output
    address = posixpath.relpath(MERMAID, posixpath.dirname(page.url) or ".")
    return output.replace("</body>", f'<script src="{address}"></script></body>', 1)


def on_post_build(config: MkDocsConfig) -> None:
    """Copy Mermaid into the site."""
    target = Path(config.site_dir) / MERMAID
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(mermaid().read_bytes())


def _add_notebook(path: Path, files: Files, config: MkDocsConfig) -> None:
    """Add the page of a notebook, with what its cells printed and drew."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(path))
    for name, picture in resources["outputs"].items():
        own = f"{path.stem}-{name}"
        text = text.replace(f"]({name})", f"]({own})")
        files.append(File.generated(config, f"{NOTEBOOKS}/{own}", content=picture))
    text = text.replace("![png](", "![drawn by the code above](")
    files.append(File.generated(config, f"{NOTEBOOKS}/{path.stem}.md", content=text))


def mermaid() -> Path:
    """Return Mermaid's script, of the package that carries it."""
    return Path(str(importlib.resources.files("mermaidx") / "assets" / "mermaid.js"))


def _paths(nav: Any) -> list[str]:
    """Return the pages that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav or []
    return [path for part in parts for path in _paths(part)]


def _targets(markdown: str) -> list[str]:
    """Return the relative links of a page."""
    outside = "".join(_FENCE.split(markdown)[::2])
    return [
        found[2] for found in _LINK.finditer(outside) if "://" not in found[2] and not found[2].startswith("mailto:")
    ]


def _repository_path(origin: str, target: str) -> str:
    """Return the path in the repository that a link in one of its files leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def _relinked(found: re.Match[str], origin: str, page: str) -> str:
    """Return a link of a repository file as a link of the page that is made of it."""
    target = found[2]
    if "://" in target or target.startswith("mailto:"):
        return found[0]
    path = _repository_path(origin, target)
    if path.startswith("docs/"):
        there = path.removeprefix("docs/")
        if there.startswith(NOTEBOOKS):
            there = there.replace(".ipynb", ".md")
    elif path in reference.COPIED:
        there = reference.COPIED[path]
    elif (ROOT / path).is_file():
        there = f"files/{path}"
    else:
        return found[0]
    return f"{found[1]}{os.path.relpath(there, posixpath.dirname(page) or '.')}{found[3] or ''}{found[4]}"
