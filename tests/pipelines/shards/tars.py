"""Tars as others write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from typing import Any


def tar_bytes(entries: Iterable[tuple[str, bytes]], **options: Any) -> bytes:
    """A tar of (name, bytes) in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
