"""The page of a model folder, served as `ddpm serve --page` does it, but without Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from pipelines.config import compose
from pipelines.serving.limits import Limits
from pipelines.serving.page import make_page
from pipelines.serving.served import Served, load


@contextmanager
def page_of(folder: Path, token_digest: str | None = None) -> Iterator[str]:
    """Serve the page of a model, and give its address."""
    config = compose([])
    limits = Limits.of(config.serving)
    drawing = ThreadPoolExecutor(1, "draw", torch.set_num_threads, (1,))
    loaded: list[Served] = []

    async def ask(body: dict[str, Any]) -> Mapping[str, Any]:
        if not loaded:  # belongs to the loop that asks it
            loaded.append(load(str(folder), config, drawing))
        return await loaded[0].ask(body)

    told = {**load(str(folder), config, drawing).describe(), "id": "digits@champion", "card": "# What it is"}
    server = uvicorn.Server(
        uvicorn.Config(
            make_page([told], ask, limits, token_digest),
            port=0,
            log_level="warning",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
        drawing.shutdown()
