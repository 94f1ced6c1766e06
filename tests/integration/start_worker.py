"""What a raylet of the tests starts in place of Ray's `setup_worker.py`: asks for a worker process, and is there as
long as it.

It imports the standard library only, and little of it: see `workers.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

VARIABLE = "DDPM_TEST_WORKERS"
"""Names the address at which workers are forked."""


def main() -> None:
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[VARIABLE])
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, lambda number, _: connection.sendall(bytes([number])))
        status = connection.recv(1)  # when the worker has ended
    os._exit(status[0] if status else 1)


if __name__ == "__main__":
    main()
