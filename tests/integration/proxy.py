"""A TCP relay whose connections break as told: what real networks do to real stores."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from types import TracebackType
from urllib.parse import urlsplit


class Proxy:
    """Relays to `target`; cuts each connection after `cut_after` bytes of answer, and refuses while `down`.

    Attributes:
        url: where it listens.
        relayed: bytes of answers that went through.
        asked: paths of HTTP GET requests that went through, one for each.
    """

    def __init__(self, target: str, cut_after: int | None = None) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.cut_after, self.down, self.relayed, self.connections = cut_after, False, 0, 0
        self.asked: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        self.break_all()

    def break_all(self) -> None:
        """Cut what is open."""
        for connection in list(self._open):
            _close(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if self.down:
                _close(client)
                continue
            self.connections += 1
            server = socket.create_connection(self.target)
            self._open |= {client, server}
            threading.Thread(target=self._relay, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._relay, args=(server, client, self.cut_after), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        answers = limit is not None or source.getpeername()[1] == self.target[1]
        left = limit
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if left is not None:
                    data = data[:left]
                    left -= len(data)
                sink.sendall(data)
                if answers:
                    self.relayed += len(data)
                else:
                    self.asked += [path.decode() for path in re.findall(rb"^GET (\S+) HTTP/1", data, re.MULTILINE)]
                if left == 0:
                    break
        _close(source)
        _close(sink)
        self._open -= {source, sink}


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
