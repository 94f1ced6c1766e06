"""The page in a browser: on a desk and on a phone, with the mouse and with the keyboard, without another address."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ddpm.model import load_model
from pipelines.inference.pictures import picture
from pipelines.inference.request import SampleRequest
from pipelines.serving.bodies import decode_png
from pipelines.serving.token import digest_of
from tests.browser import DESK, PHONE, browser
from tests.pipelines.drawing import model_folder
from tests.pipelines.serving.page_server import page_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOKEN = "a-token-of-enough-characters"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of random weights, or the folder that DDPM_PAGE_MODEL names, for pictures that are worth a look."""
    given = os.environ.get("DDPM_PAGE_MODEL")
    return Path(given) if given else model_folder(tmp_path_factory.mktemp("model") / "model", classes=("0", "1", "2"))


@pytest.fixture(scope="module")
def address(model) -> Iterator[str]:
    with page_of(model) as found:
        yield found


class Browser:
    """A browser on the page, with what a visitor does there."""

    def __init__(self, driver: webdriver.Chrome, name: str) -> None:
        self.driver, self.name = driver, name

    def until(self, found: Callable[[], Any], what: str) -> Any:
        return WebDriverWait(self.driver, 60).until(lambda _: found(), f"{what} did not come")

    def seen(self, selector: str) -> list[WebElement]:
        return [e for e in self.driver.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]

    def button(self, text: str) -> WebElement:
        path = f"//button[normalize-space()='{text}' and not(@role='tab') and not(@tabindex)]"
        return self.until(
            lambda: next((e for e in self.driver.find_elements(By.XPATH, path) if e.is_displayed()), None), text
        )

    def click(self, text: str) -> None:
        """Press a button once nothing lies over it: the page moves while it loads."""

        def pressed() -> bool:
            with suppress(ElementClickInterceptedException, StaleElementReferenceException):
                self.button(text).click()
                return True
            return False

        self.until(pressed, text)

    def open(self, tab: str) -> None:
        def found() -> WebElement | None:
            tabs = self.driver.find_elements(By.XPATH, f"//button[normalize-space()='{tab}' and not(@tabindex='-1')]")
            shown = [e for e in tabs if e.is_displayed() and "primary" not in str(e.get_attribute("class"))]
            if not shown:  # on a phone the last tabs are in a menu
                for menu in self.seen(".overflow-menu > button"):
                    menu.click()
            return shown[0] if shown else None

        self.until(found, tab).click()

    def pictures(self) -> list[str]:
        """Return the shown pictures as base64 texts."""
        return [str(e.get_attribute("src")).partition(",")[2] for e in self.seen(".pictures img")]

    def brushed_and_filled(self) -> list[str]:
        """Draw a line over the middle of the picture and have it filled; [] where the brush was not there yet."""
        canvas = self.seen("canvas")[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        stroke = ActionChains(self.driver).move_to_element(canvas).click_and_hold()
        for _ in range(6):
            stroke = stroke.move_by_offset(6, 0).pause(0.05)
        stroke.release().perform()
        self.click("Fill")
        self.until(lambda: self.pictures() or self.seen(".toast-body"), "an answer")
        return self.pictures()

    def screenshot(self) -> None:
        folder = os.environ.get("DDPM_PAGE_PICTURES")
        if folder:
            self.driver.save_screenshot(f"{folder}/{self.name}.png")

    def other_addresses(self) -> list[str]:
        """Return what was asked for elsewhere since the browser started."""
        messages: list[Any] = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if url.startswith(("http", "ws")) and "//127.0.0.1" not in url]


@contextmanager
def visit(address: str, width: int, profile: Path, name: str) -> Iterator[Browser]:
    with browser(width, profile) as opened:
        opened.get(address)
        yield Browser(opened, name)


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_label_is_sampled(address, model, tmp_path, width):
    with visit(address, width, tmp_path, f"page-sample-{width}") as page:
        page.click("Sample")
        drawn = page.until(page.pictures, "pictures")
        page.screenshot()
        loaded = load_model(model)
        wanted = picture(SampleRequest.of(labels=loaded.spec.classes[:10]), loaded).pixels
        assert np.abs(np.stack([decode_png(p) for p in drawn]).astype(int) - wanted).max() <= 1
        room = page.driver.execute_script("return [document.body.scrollWidth, window.innerWidth]")
        assert room[0] <= room[1], "the page is wider than the screen"
        assert page.other_addresses() == []


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_mask_is_brushed_and_filled(address, model, tmp_path, width):
    with visit(address, width, tmp_path, f"page-inpaint-{width}") as page:
        page.click("Sample")
        given = decode_png(page.until(page.pictures, "pictures")[0])
        page.open("Inpaint")
        page.click("Take the first sampled picture")
        page.until(lambda: page.seen("[data-testid='image-editor'] canvas, .pixi-target canvas, canvas"), "a canvas")
        brush = page.until(lambda: page.seen("button[aria-label='Brush'], button[title='Brush']"), "the brush")
        brush[0].click()
        filled = decode_png(page.until(page.brushed_and_filled, "a picture")[0])
        page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", page.button("Fill"))
        page.screenshot()
        changed = (filled.astype(int) != given).any(-1)
        assert changed.any(), "nothing was filled"
        assert not changed.all(), "everything was filled"
        corners = changed[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert not corners.any(), "what was not brushed must stay"


def test_the_keyboard_is_enough(address, tmp_path):
    with visit(address, DESK, tmp_path, "page-keyboard") as page:
        page.button("Sample")
        for _ in range(60):
            focused = page.driver.switch_to.active_element
            if focused.text.strip() == "Sample" and focused.get_attribute("role") != "tab":
                break
            focused.send_keys(Keys.TAB)
        page.driver.switch_to.active_element.send_keys(Keys.ENTER)
        page.until(page.pictures, "pictures")
        assert all(e.get_attribute("alt") for e in page.seen(".pictures img"))


def test_the_film_and_the_card_are_shown(address, tmp_path):
    with visit(address, DESK, tmp_path, "page-film") as page:
        page.open("Film")
        page.click("Show the way")
        page.until(lambda: page.seen(".film img"), "a film")
        page.screenshot()
        page.open("About this model")
        page.until(lambda: any("What it is" in e.text for e in page.seen("h1")), "the card")


def test_a_visitor_sends_the_token_once(model, tmp_path):
    with page_of(model, digest_of(TOKEN)) as address, visit(address, DESK, tmp_path, "page-token") as page:
        field = page.driver.find_element(By.NAME, "token")
        page.screenshot()
        field.send_keys(TOKEN, Keys.ENTER)
        page.click("Sample")
        assert base64.b64decode(page.until(page.pictures, "pictures")[0])
        page.driver.get(address)
        page.button("Sample")
