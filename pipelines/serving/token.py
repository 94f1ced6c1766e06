"""The bearer token of a server: made on first use, known to servers by its digest only."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.environment.credentials import create_private
from pipelines.presentation.errors import ConfigError

VARIABLE = "DDPM_SERVE_TOKEN"
NAME = "serve-token"
SHORTEST = 16
"""Characters of a token; the one that is made here has 43."""


@dataclass(frozen=True)
class Token:
    """A token, and where it came from.

    Attributes:
        text: the token itself.
        source: the path of its file, or the name of its variable.

    Raises:
        ConfigError: it is too short.
    """

    text: str
    source: str

    def __post_init__(self) -> None:
        if len(self.text) < SHORTEST:
            raise ConfigError(f"the token of {self.source} has {len(self.text)} characters: use {SHORTEST} or more")

    @property
    def digest(self) -> str:
        """Digest by which a server recognises the token; Ray may show it."""
        return digest_of(self.text)


def server_token(file: str | None, home: Path, environ: Mapping[str, str] = os.environ) -> Token:
    """Return the token that a server asks for.

    Args:
        file: that holds it; None for the variable, or else the folder's own, which is made where it is missing.
        home: folder of local credentials.

    Raises:
        ConfigError: the file cannot be read, or the token is too short.
    """
    if file is None and environ.get(VARIABLE):
        return Token(environ[VARIABLE], VARIABLE)
    path = Path(file) if file is not None else home / NAME
    if file is None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            create_private(path, secrets.token_urlsafe(32))
    try:
        return Token(path.read_text().strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"serving.token_file = {file}: it cannot be read ({error})") from error


def client_token(given: str | None, home: Path) -> str | None:
    """Return the token that a client sends: the given one, else that of the local servers; None where there is none."""
    if given:
        return given
    try:
        return (home / NAME).read_text().strip()
    except OSError:
        return None


def digest_of(token: str) -> str:
    """Return the digest under which a server knows a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_allowed(authorization: str | None, digest: str) -> bool:
    """Return whether the value of a request's header `Authorization` has the token of this digest.

    The comparison takes as long for a wrong token as for the right one.
    """
    kind, _, token = (authorization or "").partition(" ")
    return hmac.compare_digest(digest_of(token.strip()), digest) and kind.lower() == "bearer"
