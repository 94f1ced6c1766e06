"""Records that say who has made them: JSON with a signature, for the place where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config import RegistryConfig
from pipelines.signing.sign import SignatureError, Signer, Trust
from pipelines.storage import NotFoundError, Storage, join

RECORD = "record"


def seal(plain: Mapping[str, Any], place: str, signer: Signer, field: str = RECORD) -> bytes:
    """Return a record as the content of a file, signed.

    Args:
        plain: what is recorded, as JSON types.
        place: where it will lie, in words that stay the same wherever the storage root is moved to.
        field: of the file that holds the record.
    """
    text = json.dumps({**plain, "place": place}, sort_keys=True)
    return json.dumps({field: text, "signature": signer.sign_text(text)}).encode()


def unseal(content: bytes, place: str, trust: Trust, field: str = RECORD) -> dict[str, Any]:
    """Return what a file records, as `seal` has made it.

    Args:
        field: of the file that holds the record.

    Raises:
        SignatureError: it is damaged or not signed, nobody who is trusted has signed it, or it was signed for another
            place.
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
    """A folder of what was computed from named inputs: its files, and a signed record of them that is written last.

    Attributes:
        folder: its address.
        name: of the file of the record.
        place: what the record is signed for, in words that stay the same wherever the storage root is moved to.
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
        """Return what is recorded; None where nothing is.

        Raises:
            SignatureError: nobody who is trusted has signed it.
        """
        try:
            content = self.storage.read(self.uri)
        except NotFoundError:
            return None
        return unseal(content, self.place, trust)

    def sealed(self, plain: Mapping[str, Any], signer: Signer) -> bytes:
        """Return a record as the content of its file."""
        return seal(plain, self.place, signer)

    def record(self, plain: Mapping[str, Any], signer: Signer) -> None:
        """Write a record in the place of one that is there."""
        self.storage.write(self.uri, self.sealed(plain, signer))

    def read(self, name: str, digest: str | None) -> bytes | None:
        """Return a file of the folder that has this SHA-256; None where it is gone, or is another one.

        Args:
            digest: None where no such file is recorded.
        """
        if digest is None:
            return None
        try:
            data = self.storage.read(join(self.folder, name))
        except NotFoundError:
            return None
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def write(self, name: str, data: bytes) -> str:
        """Write a file of the folder, and return its SHA-256."""
        self.storage.write(join(self.folder, name), data)
        return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Authority:
    """Who signs here, and who is believed."""

    signer: Signer
    trust: Trust

    @classmethod
    def of(cls, config: RegistryConfig) -> Authority:
        """Return what the configuration names; the own key is made where it names none.

        Raises:
            ConfigError: a key or certificate is not there, or cannot be used.
        """
        signer = Signer.of(config)
        return cls(signer, Trust.of(config))
