"""Signatures by key or certificate, without any network, and records that carry one.

Whose signatures are believed is decided by the configuration of whoever verifies, never by what is signed.
"""

from pipelines.signing.record import Authority, Derived, said, seal, unseal
from pipelines.signing.sign import SignatureError, Signer, Trust, check_signing

__all__ = ["Authority", "Derived", "SignatureError", "Signer", "Trust", "check_signing", "said", "seal", "unseal"]
