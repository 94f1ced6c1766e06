"""Who may see the page: whoever has sent the token once, in a form, and whose browser holds the cookie for it."""

from __future__ import annotations

import hmac
import secrets
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.serving.token import digest_of

COOKIE = "ddpm-page"
MOST_SESSIONS = 1_000
"""Browsers that are known at a time; the oldest one has to send the token again."""
LONGEST = 1_000
"""Bytes of a form that are read."""
POLICY_VIOLATION = 1008
"""Code with which a WebSocket is closed that may not be opened."""
FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>ddpm serve</title>
<style>
body {{ font: 16px system-ui, sans-serif; max-width: 24rem; margin: 4rem auto; padding: 0 1rem; }}
input, button {{ font: inherit; padding: .5rem; width: 100%; box-sizing: border-box; margin-top: .5rem; }}
</style></head>
<body><h1>Token</h1><p>{message}</p>
<form method="post"><label>Token of the server
<input name="token" type="password" autocomplete="current-password" autofocus required></label>
<button>Open the page</button></form></body></html>
"""
ASKED = "The command <code>ddpm serve</code> has printed where the token is."
WRONG = "That is not the token of this server. The command <code>ddpm serve</code> has printed where it is."


class Login:
    """Lets through who has sent the token; to others every address is the form that asks for it.

    The cookie holds a random number and not the token: browsers send cookies of 127.0.0.1 to all its ports. The numbers
    are kept in this process.

    Args:
        app: behind it.
        digest: of the token.
    """

    def __init__(self, app: ASGIApp, digest: str) -> None:
        self.app, self.digest = app, digest
        self.sessions: dict[str, None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the form."""
        if scope["type"] == "lifespan" or self._known(HTTPConnection(scope).cookies.get(COOKIE)):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        await (await self._ask(Request(scope, receive)))(scope, receive, send)

    def _known(self, session: str | None) -> bool:
        return session is not None and session in self.sessions

    async def _ask(self, request: Request) -> Response:
        if request.method != "POST":
            return HTMLResponse(FORM.format(message=ASKED), status_code=401)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LONGEST:
                break
        token = parse_qs(body[:LONGEST].decode(errors="replace")).get("token", [""])[0].strip()
        if not hmac.compare_digest(digest_of(token), self.digest):
            return HTMLResponse(FORM.format(message=WRONG), status_code=401)
        session = secrets.token_urlsafe(32)
        self.sessions[session] = None
        if len(self.sessions) > MOST_SESSIONS:
            del self.sessions[next(iter(self.sessions))]
        answer = RedirectResponse(str(request.url.path), status_code=303)
        answer.set_cookie(COOKIE, session, httponly=True, samesite="strict", path=request.scope.get("root_path") or "/")
        return answer
