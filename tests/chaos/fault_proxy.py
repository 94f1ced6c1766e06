"""An HTTP proxy whose answers fail as told: what networks, gateways and busy servers do to real clients.

It stands between a client and SeaweedFS or MLflow. The Host header goes through as it came, because S3's signatures
cover it.

    with FaultProxy(endpoint) as proxy:
        proxy.start(Fault("slow_down", seconds=3))
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
TRICKLE_S, TRICKLE_BYTES = 0.1, 40
"""A trickle is so many bytes every so many seconds."""


def s3_error(code: str, message: str) -> bytes:
    """The body of an error of S3."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
        "<RequestId>0</RequestId></Error>"
    ).encode()


ANSWERS = {
    "slow_down": (503, s3_error("SlowDown", "Please reduce your request rate.")),
    "denied": (403, s3_error("AccessDenied", "Access Denied")),
    "expired_token": (400, s3_error("ExpiredToken", "The provided token has expired.")),
    "unavailable": (503, b"<html><body><h1>503 Service Temporarily Unavailable</h1></body></html>"),
    "unauthorized": (401, b"You are not authenticated."),
    "forbidden": (403, b"Permission denied"),
    "too_large": (413, b"<html><body><h1>413 Request Entity Too Large</h1></body></html>"),
}
"""Faults that are answers of their own: status and body."""
BROKEN = ("stall", "reset", "short_body", "trickle", "refuse")
"""Faults of the connection. Where an answer has no body, it stalls or breaks before the answer: the server has done
what it was asked, and the client does not learn of it. `refuse` breaks before the server is asked."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, for how long and where.

    Attributes:
        kind: of `ANSWERS` or `BROKEN`.
        seconds: how long, from when it is switched on; None for as long as `count` lasts.
        waits: whether the period begins with the first request that it meets: on a busy machine whoever is to be
            disturbed may ask for nothing in the first seconds.
        count: how many requests at most.
        methods: of the requests that it meets; all where empty.
        path: a regular expression that their paths contain.
        share: which part of them it meets, drawn with the proxy's seed.
        after: bytes of the body before a connection breaks or stalls; half of it where not given.
    """

    kind: str
    seconds: float | None = None
    waits: bool = False
    count: int | None = None
    methods: tuple[str, ...] = ()
    path: str = ""
    share: float = 1.0
    after: int | None = None

    def __post_init__(self) -> None:
        assert self.kind in ANSWERS or self.kind in BROKEN, self.kind


class Active:
    """A fault that is switched on.

    Attributes:
        hits: the requests that it met, as "METHOD PATH".
        over: set when it has been switched off.
    """

    def __init__(self, fault: Fault) -> None:
        self.fault, self.hits, self.over = fault, list[str](), threading.Event()
        self.ends = float("inf")
        if not fault.waits:
            self._begin()

    def _begin(self) -> None:
        if self.fault.seconds is not None and self.ends == float("inf"):
            self.ends = time.monotonic() + self.fault.seconds

    def meet(self, request: str) -> None:
        """Note a request that it met."""
        self._begin()
        self.hits.append(request)

    @property
    def on(self) -> bool:
        left = self.fault.count is None or len(self.hits) < self.fault.count
        return left and not self.over.is_set() and time.monotonic() < self.ends

    def wait(self) -> None:
        """Until the period has ended; some seconds where it has none."""
        self.over.wait(max(min(self.ends - time.monotonic(), 60.0), 0.0) if self.ends < float("inf") else 10.0)


class FaultProxy:
    """Passes requests on to `target`, except for what the faults that are switched on do to them.

    Attributes:
        url: where it listens.
        relayed: bytes of bodies that went through to clients.
        asked: paths of GET requests, one for each.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.active: list[Active] = []
        self.relayed = 0
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, client_address: None  # clients go away, as connections break
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self.server.shutdown()
        self.server.server_close()

    def start(self, fault: Fault) -> Active:
        """Switch a fault on."""
        active = Active(fault)
        with self.lock:
            self.active.append(active)
        return active

    def stop(self) -> None:
        """Switch all faults off."""
        with self.lock:
            for active in self.active:
                active.over.set()
            self.active.clear()

    def fault_of(self, method: str, path: str) -> Active | None:
        """Note a request, and return the fault that it meets."""
        with self.lock:
            if method == "GET":
                self.asked.append(path)
            for active in self.active:
                fault = active.fault
                meets = (not fault.methods or method in fault.methods) and re.search(fault.path, path)
                if active.on and meets and self.random.random() < fault.share:
                    active.meet(f"{method} {path}")
                    return active
        return None

    def ask(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> Answer:
        """Return what the target answers."""
        connection = http.client.HTTPConnection(*self.target, timeout=300)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in HOP_BY_HOP | {"content-length"}:
                    connection.putheader(name, value)
            if body or method in ("PUT", "POST", "PATCH"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            got = connection.getresponse()
            return Answer(got.status, got.reason, got.getheaders(), got.read())
        finally:
            connection.close()


@dataclass(frozen=True)
class Answer:
    """An answer of the target, whole."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


def handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    """The class that serves the requests of one connection after another."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self._body()
            active = proxy.fault_of(self.command, self.path)
            kind = active.fault.kind if active else ""
            if kind in ANSWERS:
                status, text = ANSWERS[kind]
                self._answer(Answer(status, "", [("Content-Type", "text/html")], text))
                return
            if kind == "refuse":
                self._reset()
            try:
                answer = proxy.ask(self.command, self.path, self.headers.items(), body)
            except OSError:
                self._reset()
            self._answer(answer, active)

        def _answer(self, answer: Answer, active: Active | None = None) -> None:
            """Send an answer, as far as its fault lets it go."""
            bodiless = self.command == "HEAD" or answer.status in (204, 304) or not answer.body
            fault = active.fault if active else None
            if fault is not None and bodiless and fault.kind != "trickle":
                self._break(active)
            named = {name.lower(): value for name, value in answer.headers}
            self.send_response(answer.status, answer.reason or None)
            for name, value in answer.headers:
                if name.lower() not in HOP_BY_HOP | {"content-length", "date", "server"}:
                    self.send_header(name, value)
            length = named.get("content-length", "0") if self.command == "HEAD" else str(len(answer.body))
            if answer.status not in (204, 304):
                self.send_header("Content-Length", length)
            self.end_headers()
            if bodiless:
                return
            if fault is None:
                self._send(answer.body)
            elif fault.kind == "trickle":
                rest = memoryview(answer.body)
                while rest and active is not None and not active.over.is_set() and time.monotonic() < active.ends:
                    self._send(rest[:TRICKLE_BYTES])
                    rest = rest[TRICKLE_BYTES:]
                    active.over.wait(TRICKLE_S)
                self._send(rest)
            else:
                end = len(answer.body) // 2 if fault.after is None else fault.after
                self._send(answer.body[:end])
                if end < len(answer.body):
                    self._break(active)

        def _send(self, data: bytes | memoryview) -> None:
            self.wfile.write(data)
            proxy.relayed += len(data)

        def _break(self, active: Active | None) -> None:
            """Stall, and end the connection: with a reset, or as if all had been sent."""
            if active is not None and active.fault.kind == "stall":
                active.wait()
            if active is not None and active.fault.kind == "reset":
                self._reset()
            self.close_connection = True
            raise ConnectionAbortedError

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
            raise ConnectionAbortedError

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, *arguments: object) -> None:
            pass

    handle: Callable[[Handler], None] = Handler.handle_any
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", handle)
    return Handler
