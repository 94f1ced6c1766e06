"""Errors of storage, whose messages say which address, why, and how to fix it."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.presentation.errors import PipelineError
from pipelines.storage.retry import TransientError

_DISK_FULL = "free some, or set storage.root (and TMPDIR, where checkpoints are written first) to another disk"
_HINTS = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EACCES: "the user of this process may not: change the folder's owner, or storage.root",
    errno.EROFS: "set storage.root to a disk that can be written",
}


_NETWORK = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,  # a file on NFS whose server has restarted
    errno.ETIMEDOUT,
}


class StorageError(PipelineError):
    """Stored bytes could not be read or written; the message says which address, why, and how to fix it."""


class NotFoundError(StorageError):
    """There is nothing at the address."""


class ShortObjectError(StorageError):
    """The object ends before the requested bytes."""


class ConflictError(StorageError):
    """A conditional write found other bytes than it expected: another writer was faster."""


class TransientStorageError(StorageError, TransientError):
    """The server did not answer, or answered that it is busy: worth another try."""


def not_found(uri: str) -> NotFoundError:
    """Return the error for an address where nothing is stored."""
    return NotFoundError(f"{uri}: nothing is stored there")


def cut_short(uri: str) -> ShortObjectError:
    """Return the error for an object that ends too early."""
    return ShortObjectError(f"{uri} ends before the bytes that were asked for: it is cut short")


def is_network_error(error: BaseException) -> bool:
    """Return whether an error says that a connection broke or could not be made."""
    if isinstance(error, ConnectionError | TimeoutError | ssl.SSLError | socket.gaierror):
        return True
    return isinstance(error, OSError) and error.errno in _NETWORK


@contextmanager
def os_errors_as_storage_errors(uri: str) -> Iterator[None]:
    """Turn errors of the file system or a socket into a `StorageError` that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise not_found(uri) from error
    except OSError as error:
        if is_network_error(error):
            raise TransientStorageError(f"{uri}: {error}") from error
        hint = _HINTS.get(error.errno or 0)
        raise StorageError(f"{uri}: {error.strerror or error}{f': {hint}' if hint else ''}") from error
