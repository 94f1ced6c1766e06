"""Records that say who has made them: JSON with a signature, for the place where they lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config import RegistryConfig
from pipelines.signing.sign import SignatureError, Signer, Trust

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
