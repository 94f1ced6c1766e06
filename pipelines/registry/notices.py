"""MLflow's notices that an alias was set or taken away: a receiver on the loopback interface, and its webhook.

A notice is only a reason to look: what it says is not read. Its address holds a random part and it is signed, so that
other users of the machine cannot keep the guard busy.
"""

from __future__ import annotations

import secrets
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from pipelines import tracking
from pipelines.display import Notice
from pipelines.errors import PipelineError
from pipelines.loopback import bypass_proxies, is_loopback
from pipelines.tracking import TrackingError, Webhook

NAME = "ddpm-guard"
"""Of the webhooks in MLflow."""
LARGEST = 1 << 20
"""Bytes of a notice that are read."""
TIMEOUT_S = 5.0
"""How long one request may take."""
CHECK_S = 30.0
"""Seconds between two looks whether the webhook is registered."""


class Notices:
    """Waits until an alias has changed; used as a context, at whose end the webhook is gone.

    Attributes:
        uri: address of the MLflow server, on this machine.
        say: called with the reason why no notices come.
        url: address of the receiver.
        webhook: the registered one; None while there is none.
    """

    def __init__(self, uri: str, say: Notice) -> None:
        self.uri, self.say = uri, say
        self.webhook: Webhook | None = None
        self._changed, self._secret = threading.Event(), secrets.token_urlsafe(32)
        self._path = f"/{secrets.token_urlsafe(32)}"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}{self._path}"
        self._check_at, self._said = 0.0, False

    def __enter__(self) -> Notices:
        """Start to listen."""
        threading.Thread(target=self._server.serve_forever, name="notices", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Remove the webhook, and stop listening; one that cannot be removed now is the next guard's to remove."""
        with suppress(PipelineError):
            if self.webhook is not None:
                tracking.delete_webhook(self.uri, self.webhook)
        self._server.shutdown()
        self._server.server_close()

    def come(self) -> bool:
        """Return whether every change is told; the webhook is registered where it is not, now and then.

        Just after it was registered the answer is no: what had changed until then was not told.
        """
        if time.monotonic() < self._check_at:
            return self.webhook is not None
        self._check_at = time.monotonic() + CHECK_S
        try:
            before = self.webhook
            self.subscribe()
            return self.webhook == before
        except TrackingError as error:
            if not self._said:
                self.say(f"MLflow does not tell of changes, which are looked for every few seconds: {error}")
            self._said = True
            return False

    def subscribe(self) -> None:
        """Register the webhook where it is not registered, and remove those whose guards are gone.

        Raises:
            TrackingError: the server has no webhooks, allows none to this address, or does not answer.
        """
        found = tracking.webhooks(self.uri, NAME)
        if self.webhook not in found:
            self.webhook = None
            self.webhook = tracking.add_webhook(self.uri, NAME, self.url, self._secret)
        for webhook in found:
            if webhook != self.webhook and not listens(webhook.url):
                tracking.delete_webhook(self.uri, webhook)

    def wait(self, timeout_s: float) -> bool:
        """Return True once there was a notice since the last call, or False after some seconds without one."""
        noticed = self._changed.wait(timeout_s)
        self._changed.clear()
        return noticed

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        path, secret, noticed = self._path, self._secret, self._changed.set

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.answer(204 if self.path == path else 404)

            def do_POST(self) -> None:
                signed = self.path == path and tracking.is_signed(self.headers, self.body(), secret)
                if signed:
                    noticed()
                self.answer(204 if signed else 404)

        return Handler


class _Handler(BaseHTTPRequestHandler):
    """Answers with a status and nothing else, and says nothing."""

    timeout = TIMEOUT_S

    def body(self) -> bytes:
        """Return the body of the request; an empty one where it is too large, or has no length."""
        length = self.headers.get("Content-Length", "")
        return self.rfile.read(int(length)) if length.isdecimal() and int(length) <= LARGEST else b""

    def answer(self, status: int) -> None:
        """Answer with a status."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def listens(url: str) -> bool:
    """Return whether a guard listens at an address of this machine; True where that cannot be told."""
    if not url.startswith("http://") or not is_loopback(url):
        return True  # whoever has registered that
    bypass_proxies(url)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return False  # another program has the port now
    except urllib.error.URLError as error:
        return not isinstance(error.reason, ConnectionRefusedError)
    except OSError:
        return True
