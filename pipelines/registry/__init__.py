"""The model registry: versions that carry signed evidence, and aliases that move through a gate.

`package` makes a version, `evidence` is what it carries, `sign` says by whom, `contents` whether all is as it was then,
`gate` decides whether an alias may move, `verdict` is what it decided and the log of all decisions, `promote` moves the
alias. `verify` looks at a version as a whole, its data and the pictures that it draws included.
"""

from pipelines.registry.contents import check_version
from pipelines.registry.evidence import Evidence, EvidenceError
from pipelines.registry.gate import gate
from pipelines.registry.package import RegistryError, digest_of, register, write_version
from pipelines.registry.sign import SignatureError, Signer, Trust, check_signing
from pipelines.registry.verdict import Row, Verdict, VerdictLog
from pipelines.registry.verify import Verification, verify
from pipelines.registry.versions import find_version, promote, scores_of

__all__ = [
    "Evidence",
    "EvidenceError",
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
    "find_version",
    "gate",
    "promote",
    "register",
    "scores_of",
    "verify",
    "write_version",
]
