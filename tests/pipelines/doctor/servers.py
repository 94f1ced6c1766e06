"""Small servers with faults: an S3 in memory, an MLflow that refuses, and one that never answers."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve, and yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """Accept connections at a port, and never say anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]


def closed_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Quiet(BaseHTTPRequestHandler):
    """Answers by a table, with a clock that may be wrong, and does not log."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its header
    skew_s = 0.0

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + self.skew_s, usegmt=True)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


def fixed(status: int, body: bytes = b"{}", skew_s: float = 0.0) -> type[Quiet]:
    """A server that gives the same answer to everything."""

    class Fixed(Quiet):
        def do_GET(self) -> None:
            self.body()
            self.answer(status, body)

        do_POST = do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815

    Fixed.skew_s = skew_s
    return Fixed


def s3_error(code: str, status: int = 403) -> type[Quiet]:
    """An S3 that answers everything with an error."""
    return fixed(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())


def s3(holds: Callable[[str], bool] = lambda condition: True, lists: bool = True) -> type[Quiet]:
    """An S3 in memory.

    Args:
        holds: whether it heeds a condition, "If-None-Match" or "If-Match".
        lists: whether it lists what it has.
    """
    stored: dict[str, bytes] = {}
    parts: dict[int, bytes] = {}
    lock = threading.Lock()

    def tag(data: bytes) -> str:
        return f'"{hashlib.md5(data).hexdigest()}"'

    class Memory(Quiet):
        def do_PUT(self) -> None:
            data, query = self.body(), parse_qs(urlsplit(self.path).query)
            if "partNumber" in query:
                parts[int(query["partNumber"][0])] = data
                self.answer(200, ETag=tag(data))
                return
            with lock:
                there = stored.get(self.path)
                wanted = self.headers.get("If-Match")
                exists = self.headers.get("If-None-Match") == "*" and there is not None
                differs = wanted is not None and (there is None or tag(there).strip('"') != wanted.strip('"'))
                refused = (exists and holds("If-None-Match")) or (differs and holds("If-Match"))
                if not refused:
                    stored[self.path] = data
            if refused:
                self.answer(412, b"<Error><Code>PreconditionFailed</Code><Message>no</Message></Error>")
            else:
                self.answer(200, ETag=tag(data))

        def do_POST(self) -> None:
            self.body()
            if self.path.endswith("?uploads"):
                self.answer(200, b"<R><UploadId>1</UploadId></R>")
            else:
                stored[urlsplit(self.path).path] = b"".join(parts[n] for n in sorted(parts))
                self.answer(200, b"<R><ETag>x</ETag></R>")

        def do_GET(self) -> None:
            path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
            if "list-type" in query:
                prefix = f"{path.rstrip('/')}/{query['prefix'][0]}"
                keys = [key for key in stored if lists and key.startswith(prefix)]
                listed = ""
                for key in keys:
                    name = key.removeprefix(path.rstrip("/") + "/")
                    about = f"<Key>{name}</Key><Size>{len(stored[key])}</Size>"
                    listed += f"<Contents>{about}<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
                self.answer(200, f"<ListBucketResult>{listed}</ListBucketResult>".encode())
            elif path in stored:
                self.answer(200, stored[path], ETag=tag(stored[path]))
            else:
                self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>no</Message></Error>")

        do_HEAD = do_GET  # noqa: N815

        def do_DELETE(self) -> None:
            stored.pop(self.path, None)
            self.answer(204)

    return Memory
