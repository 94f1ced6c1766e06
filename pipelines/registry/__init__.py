"""The model registry: versions that carry signed evidence, and aliases that move through a gate.

`package` makes a version, `evidence` is what it carries, `sign` says by whom, `contents` whether all is as it was then,
and `verify` looks at a version as a whole, its data and the pictures that it draws included. `bounds` is what every
version has to be, `comparison` draws samples of two of them on the same noise, `gate` decides, `verdict` is what was
decided and the log of all decisions, and `promote` records a decision and moves the alias.
"""

from pipelines.registry.contents import check_version
from pipelines.registry.evidence import Evidence, EvidenceError
from pipelines.registry.package import RegistryError, digest_of, register, write_version
from pipelines.registry.promote import CANDIDATE, PREVIOUS, Gate
from pipelines.registry.sign import SignatureError, Signer, Trust, check_signing
from pipelines.registry.verdict import Row, Verdict, VerdictLog
from pipelines.registry.verify import Verification, verify

__all__ = [
    "CANDIDATE",
    "PREVIOUS",
    "Evidence",
    "EvidenceError",
    "Gate",
    "RegistryError",
    "Row",
    "SignatureError",
    "Signer",
    "Trust",
    "Verdict",
    "VerdictLog",
    "Verification",
    "check_signing",
    "check_version",
    "digest_of",
    "register",
    "verify",
    "write_version",
]
