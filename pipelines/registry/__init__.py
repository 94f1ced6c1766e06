"""The model registry: versions that carry signed evidence, and aliases that move through a gate.

`package` makes a version, `scored` scores a model first, `evidence` is what it carries, `sign` says by whom, `gate`
decides whether an alias may move, `verdict` is what it decided and the log of all decisions, `promote` moves the alias.
"""

from pipelines.registry.evidence import Evidence, EvidenceError
from pipelines.registry.gate import gate
from pipelines.registry.package import RegistryError, digest_of, register
from pipelines.registry.scored import check_registrable, register_scored
from pipelines.registry.sign import SignatureError, Signer, Trust
from pipelines.registry.verdict import Row, Verdict, VerdictLog
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
    "check_registrable",
    "digest_of",
    "find_version",
    "gate",
    "promote",
    "register",
    "register_scored",
    "scores_of",
]
