"""Signatures by key or certificate, without any network, and records that carry one.

The verifier's configuration decides which signatures are trusted, never the signed data.
"""

from pipelines.signing.record import Authority, Derived, said, seal, unseal
from pipelines.signing.sign import SignatureError, Signer, Trust, check_signing

__all__ = ["Authority", "Derived", "SignatureError", "Signer", "Trust", "check_signing", "said", "seal", "unseal"]
