"""The site in a browser, on a desk and on a phone, light and dark: nothing is serious to axe, and nothing is cut off.

axe-core comes from npm: `npm pack axe-core@4` is all that is asked of the network.
"""

from __future__ import annotations

import mimetypes
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from selenium import webdriver

from tests.browser import DESK, PHONE, browser
from tests.docs.modules import ROOT
from tests.http_server import Answer, Request, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAGES = ["index", "your-own-pictures", "tutorial/01-noise", "tutorial/12-one-step", "notebooks/plane",
         "using-models", "guides/captions", "reference/configuration", "reference/command-line",
         "reference/python/sampling", "architecture", "performance", "comparison", "experiments",
         "failures", "training-methods", "digits"]  # fmt: skip
SCREENS = [(size, scheme) for size in ("desk", "phone") for scheme in ("light", "dark")]
WIDTHS = {"desk": DESK, "phone": PHONE}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the site on loopback."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))

    def answer(request: Request) -> Answer:
        file = folder / urlsplit(request.path).path.lstrip("/")
        if not file.is_file():
            return Answer(404)
        return Answer(200, file.read_bytes(), {"Content-Type": mimetypes.guess_type(file)[0] or "text/plain"})

    with serving(answer) as server:
        yield server.url


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the script that looks for what keeps people out."""
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    assert npm, "install npm: the check is npm's package axe-core"
    command = [npm, "pack", "axe-core@4", "--silent", "--pack-destination", str(folder)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (packed,) = folder.glob("axe-core-*.tgz")
    with tarfile.open(packed) as tar:
        script = tar.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


@pytest.fixture(scope="module", params=SCREENS, ids="-".join)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    size, scheme = request.param
    with browser(WIDTHS[size], tmp_path_factory.mktemp("profile")) as opened:
        prefer(opened, scheme)
        opened.screen = f"{size}-{scheme}"  # type: ignore[attr-defined]
        yield opened


def prefer(driver: webdriver.Chrome, scheme: str) -> None:
    """Let the browser say that the system's colours are light or dark."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_serious_finding_and_fits_its_screen(driver: webdriver.Chrome, address: str, axe: str, page: str):
    driver.get(f"{address}/{page}.html")
    scheme = driver.execute_script("return document.body.dataset.mdColorScheme")
    assert scheme == ("slate" if driver.screen.endswith("dark") else "default")  # type: ignore[attr-defined]
    driver.execute_script(axe)
    found = driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    serious = [
        f"{finding['impact']} {finding['id']}: {finding['help']}: {[node['html'] for node in finding['nodes'][:3]]}"
        for finding in found["violations"]
        if finding["impact"] in ("serious", "critical")
    ]
    if folder := os.environ.get("DDPM_SCREENSHOTS"):
        name = f"{page.replace('/', '-')}-{driver.screen}"  # type: ignore[attr-defined]
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))
    assert not serious, "\n".join(serious)
    wide = driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{wide} pixels are beyond the right edge"


def test_colours_follow_the_system_until_one_is_chosen(address: str, tmp_path: Path):
    with browser(DESK, tmp_path) as opened:

        def shown(system: str) -> str:
            prefer(opened, system)
            opened.get(f"{address}/index.html")
            return opened.execute_script("return document.body.dataset.mdColorScheme")

        assert [shown(system) for system in ("light", "dark", "light")] == ["default", "slate", "default"]
        for _ in range(2):  # light, then dark
            opened.execute_script("document.querySelector('[data-md-component=palette] label:not([hidden])').click()")
        assert shown("light") == "slate"
