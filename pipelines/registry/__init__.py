"""The model registry: versions that carry signed evidence, and aliases that move through a gate.

`package` makes a version, `evidence` is what it carries, `sign` says by whom, `gate` decides whether an alias may move,
`verdict` is what it decided and the log of all decisions, `promote` moves the alias. `guard` puts an alias back that
was moved otherwise, `notices` has MLflow tell it at once. `card` describes a version on its page.
"""

from pipelines.registry.card import describe
from pipelines.registry.evidence import Evidence, EvidenceError
from pipelines.registry.gate import gate
from pipelines.registry.guard import Guard, Logs, watch
from pipelines.registry.notices import Notices
from pipelines.registry.package import RegistryError, digest_of, register
from pipelines.registry.sign import SignatureError, Signer, Trust
from pipelines.registry.verdict import Row, Verdict, VerdictLog
from pipelines.registry.versions import find_version, promote, scores_of

__all__ = [
    "Evidence",
    "EvidenceError",
    "Guard",
    "Logs",
    "Notices",
    "RegistryError",
    "Row",
    "SignatureError",
    "Signer",
    "Trust",
    "Verdict",
    "VerdictLog",
    "describe",
    "digest_of",
    "find_version",
    "gate",
    "promote",
    "register",
    "scores_of",
    "watch",
]
