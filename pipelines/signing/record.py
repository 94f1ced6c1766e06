"""Signed records: JSON with a signature that is valid only for one place in storage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config import RegistryConfig
from pipelines.signing.sign import SignatureError, Signer, Trust
from pipelines.storage import Storage, join

RECORD = "record"


def seal(plain: Mapping[str, Any], place: str, signer: Signer, field: str = RECORD) -> bytes:
    """Return a record as the content of a file, signed.

    Args:
        plain: content of the record, as JSON types.
        place: place of the file, independent of the storage root.
        field: field of the file with the record.
    """
    text = json.dumps({**plain, "place": place}, sort_keys=True)
    return json.dumps({field: text, "signature": signer.sign_text(text)}).encode()


def unseal(content: bytes, place: str, trust: Trust, field: str = RECORD) -> dict[str, Any]:
    """Return the record in the content of a file written by `seal`, after checking it.

    Args:
        field: field of the file with the record.

    Raises:
        SignatureError: it is damaged, not signed, not signed by a trusted key, or signed for another place.
    """
    try:
        entry = json.loads(content)
        text, signature = str(entry[field]), str(entry["signature"])
    except (ValueError, KeyError, TypeError) as error:
        raise SignatureError("it is damaged, or not signed") from error
    trust.check_text(text, signature)
    plain: dict[str, Any] = json.loads(text)
    found = plain.pop("place", None)
    if found != place:
        raise SignatureError(f"it is a copy of {found}")
    return plain


def said(content: bytes, field: str = RECORD) -> dict[str, Any]:
    """Return the content of a record without checking its signature; empty if it is damaged."""
    try:
        plain = json.loads(content)
        plain = json.loads(plain[field]) if field in plain else plain
    except (ValueError, TypeError):
        return {}
    return plain if isinstance(plain, dict) else {}


@dataclass(frozen=True)
class Derived:
    """A folder of files computed from named inputs, with a signed record of them that is written last.

    Attributes:
        folder: address of the folder.
        name: file name of the record.
        place: place for which the record is signed, independent of the storage root.
    """

    storage: Storage
    folder: str
    name: str
    place: str

    @property
    def uri(self) -> str:
        """Address of the record."""
        return join(self.folder, self.name)

    def find(self, trust: Trust) -> dict[str, Any] | None:
        """Return the record; None if there is none.

        Raises:
            SignatureError: it is not signed by a trusted key.
        """
        content = self.storage.find(self.uri)
        return None if content is None else unseal(content, self.place, trust)

    def sealed(self, plain: Mapping[str, Any], signer: Signer) -> bytes:
        """Return a record as the content of its file."""
        return seal(plain, self.place, signer)

    def record(self, plain: Mapping[str, Any], signer: Signer) -> None:
        """Write a record, replacing an existing one."""
        self.storage.write(self.uri, self.sealed(plain, signer))

    def read(self, name: str, digest: str | None) -> bytes | None:
        """Return a file of the folder with this SHA-256; None if it is missing or differs.

        Args:
            digest: SHA-256 of the file; None if it is not recorded.
        """
        data = None if digest is None else self.storage.find(join(self.folder, name))
        return None if data is None or hashlib.sha256(data).hexdigest() != digest else data

    def write(self, name: str, data: bytes) -> str:
        """Write a file of the folder, and return its SHA-256."""
        self.storage.write(join(self.folder, name), data)
        return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Authority:
    """The signer of this process, and the keys that it trusts."""

    signer: Signer
    trust: Trust

    @classmethod
    def of(cls, config: RegistryConfig) -> Authority:
        """Return the authority of a configuration; without a key in it, the own key is created.

        Raises:
            ConfigError: a key or certificate is missing or cannot be used.
        """
        signer = Signer.of(config)
        return cls(signer, Trust.of(config))
