"""The model registry: versions that carry signed evidence, and aliases that move through a gate.

`package` makes a version, `evidence` is what it carries, `sign` says by whom. `bounds` is what every version has to be,
`comparison` draws samples of two of them on the same noise, `gate` decides, `verdict` is what was decided and the log
of all decisions, and `promote` records a decision and moves the alias.
"""

from pipelines.registry.evidence import Evidence, EvidenceError
from pipelines.registry.package import RegistryError, digest_of, register
from pipelines.registry.promote import CANDIDATE, PREVIOUS, Gate, find_version
from pipelines.registry.sign import SignatureError, Signer, Trust
from pipelines.registry.verdict import Row, Verdict, VerdictLog

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
    "digest_of",
    "find_version",
    "register",
]
