"""Who has sent the token sees the page; everybody else sees the form that asks for it, whatever they ask for."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from pipelines.serving import login
from pipelines.serving.login import COOKIE, Login
from pipelines.serving.token import digest_of

TOKEN = "a-token-of-enough-characters"


@pytest.fixture
def browser() -> TestClient:
    app = FastAPI()
    app.add_middleware(Login, digest=digest_of(TOKEN))

    @app.get("/page")
    def page() -> str:
        return "pictures"

    return TestClient(app, follow_redirects=False)


def test_a_stranger_sees_the_form_at_every_address(browser):
    for answer in (browser.get("/page"), browser.get("/elsewhere"), browser.delete("/page")):
        assert answer.status_code == 401
        assert "pictures" not in answer.text
        assert 'name="token"' in answer.text


def test_the_token_opens_the_page_where_it_was_asked_for(browser):
    answer = browser.post("/page", data={"token": TOKEN})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/page"
    assert browser.get("/page").json() == "pictures"


@pytest.mark.parametrize("token", ["", "wrong", digest_of(TOKEN), TOKEN * 1_000])
def test_another_token_opens_nothing(browser, token):
    answer = browser.post("/page", data={"token": token})
    assert answer.status_code == 401
    assert COOKIE not in answer.cookies
    assert "not the token" in answer.text


def test_the_cookie_is_out_of_reach_and_does_not_hold_the_token(browser):
    cookie = browser.post("/page", data={"token": TOKEN}).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert digest_of(TOKEN) not in cookie


def test_an_invented_cookie_opens_nothing(browser):
    browser.cookies.set(COOKIE, "x" * 43)
    assert browser.get("/page").status_code == 401


def test_a_websocket_of_a_stranger_is_closed(browser):
    with pytest.raises(WebSocketDisconnect), browser.websocket_connect("/page"):
        pass


def test_the_oldest_of_too_many_browsers_sends_the_token_again(browser, monkeypatch):
    monkeypatch.setattr(login, "MOST_SESSIONS", 2)
    browser.post("/page", data={"token": TOKEN})
    first = browser.cookies[COOKIE]
    for _ in range(2):
        browser.cookies.clear()
        browser.post("/page", data={"token": TOKEN})
    assert browser.get("/page").status_code == 200
    browser.cookies.clear()
    browser.cookies.set(COOKIE, first)
    assert browser.get("/page").status_code == 401
