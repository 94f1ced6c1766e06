"""A headless browser, as wide as a desk's screen or a phone's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

DESK, PHONE = 1280, 390
"""Widths of a screen in pixels."""
QUIET = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-unsafe-swiftshader"]  # fmt: skip


@contextmanager
def browser(width: int, profile: Path) -> Iterator[webdriver.Chrome]:
    """Open Chromium with a fresh profile folder; what it asks for is in its log "performance"."""
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is missing: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    for argument in [*QUIET, f"--window-size={width},1000", f"--user-data-dir={profile}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    opened = webdriver.Chrome(options, Service(driver))
    try:
        if width < 500:
            screen = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": True}
            opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        yield opened
    finally:
        opened.quit()
