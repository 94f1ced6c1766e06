"""The model registry: versions that carry signed evidence, and aliases that move through a gate.

`package` makes a version and `scored` scores a model first, `evidence` is what it carries, signed, `contents` whether
all is as it was then, and `verify` looks at a version as a whole, its data and the pictures that it draws included;
`card` describes it on its page. `gate` moves an alias, or refuses to: `comparison` draws samples of two versions on the
same noise, `decision` says what every version has to be and whether one is better than the other, and `verdict` is what
was decided and the log of all decisions. `guard` puts an alias back that was moved otherwise.
"""

from pipelines.registry.card import describe
from pipelines.registry.contents import check_version
from pipelines.registry.evidence import Evidence, EvidenceError
from pipelines.registry.gate import Gate
from pipelines.registry.guard import Guard, Logs, watch
from pipelines.registry.package import (
    RegistryError,
    bundled_encoder,
    find_version,
    is_candidate,
    register,
    register_once,
    register_scored,
    write_version,
)
from pipelines.registry.verdict import Verdict, VerdictLog, VerdictRow
from pipelines.registry.verify import Verification, verify
from pipelines.signing import SignatureError, Signer, Trust, check_signing

__all__ = [
    "Evidence",
    "EvidenceError",
    "Gate",
    "Guard",
    "Logs",
    "RegistryError",
    "SignatureError",
    "Signer",
    "Trust",
    "Verdict",
    "VerdictLog",
    "VerdictRow",
    "Verification",
    "bundled_encoder",
    "check_signing",
    "check_version",
    "describe",
    "digest_of",
    "find_version",
    "is_candidate",
    "register",
    "register_once",
    "register_scored",
    "verify",
    "watch",
    "write_version",
]
