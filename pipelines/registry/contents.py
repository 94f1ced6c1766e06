"""Checks of a version by its files alone: who signed it, and whether they are as the evidence says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ddpm.generate import Sampling
from ddpm.inference import parameters
from ddpm.model import read_spec
from pipelines.registry.evidence import (
    CODE,
    COMPILED,
    MODEL,
    SERVED,
    SIGNATURE,
    Evidence,
    EvidenceError,
    code_files,
    file_digests,
    requirements,
)
from pipelines.registry.verdict import VerdictRow
from pipelines.signing import SignatureError, Trust
from pipelines.signing.sign import differences, files_below
from pipelines.storage import layout

ARTIFACTS = "artifacts"
WRITTEN = ("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta")
"""The files that MLflow writes."""
_LOADER = {"loader_module": "mlflow.pyfunc.loaders.code_model", "code": PurePosixPath(CODE).parts[0]}
_ARTIFACTS = {"model": f"{ARTIFACTS}/{MODEL}", "signature": f"{ARTIFACTS}/{SIGNATURE}"}


def model_folder(pyfunc: Path) -> Path:
    """Return the signed folder in that of a pyfunc."""
    return pyfunc / ARTIFACTS / MODEL


def signature_file(pyfunc: Path) -> Path:
    """Return the signature in the folder of a pyfunc."""
    return pyfunc / ARTIFACTS / SIGNATURE


def differing_envelope(pyfunc: Path, evidence: Evidence) -> list[str]:
    """Return in words what of a pyfunc, outside its signed folder, is not as the evidence says.

    MLflow writes these files after the folder was signed: the code, how it is loaded, and what it requires. They decide
    what a version does when it is served, so they are compared with the evidence, which is signed.
    """
    return [
        *differing_code(pyfunc, evidence),
        *_foreign_files(pyfunc),
        *_unless_damaged("MLmodel", lambda: _differing_loader(pyfunc)),
        *_unless_damaged("requirements", lambda: _differing_requirements(pyfunc, requirements(evidence.packages))),
    ]


def differing_code(pyfunc: Path, evidence: Evidence) -> list[str]:
    """Return which files of the code that travels with a version are not those of the evidence, in words."""
    if not (pyfunc / SERVED).is_file():
        return [f"{SERVED} is missing"]
    return differences(evidence.code, code_files(pyfunc / CODE, pyfunc / SERVED))


def _unless_damaged(name: str, look: Callable[[], Iterator[str]]) -> list[str]:
    try:
        return list(look())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"{name} cannot be read: {error!r}"]


def _foreign_files(pyfunc: Path) -> Iterator[str]:
    """Yield what lies in a pyfunc and belongs to no version."""
    compiled, known = set[str](), {*WRITTEN, SERVED, _ARTIFACTS["signature"]}
    for name in files_below(pyfunc):
        parts = PurePosixPath(name).parts
        if COMPILED in parts:
            compiled.add(str(PurePosixPath(*parts[: parts.index(COMPILED) + 1])))
        elif not (name.startswith((f"{_ARTIFACTS['model']}/", f"{CODE}/")) or name in known):
            yield f"{name} is new"
    yield from (f"{folder} holds compiled code, which Python would run: delete it" for folder in sorted(compiled))


def _differing_loader(pyfunc: Path) -> Iterator[str]:
    """Yield what MLmodel says of how the model is loaded, where that is not how ours is."""
    described = _yaml(pyfunc / "MLmodel")
    flavors = described.get("flavors") or {}
    if list(flavors) != ["python_function"]:
        yield f"MLmodel has the flavors {', '.join(flavors) or 'none'}"
        return
    flavor = flavors["python_function"]
    found = {name: flavor.get(name) for name in _LOADER}
    yield from (f"MLmodel has {name} {found[name]}" for name, value in _LOADER.items() if found[name] != value)
    code = PurePosixPath(str(flavor.get("model_code_path"))).name
    if code != SERVED:
        yield f"MLmodel has the model code {code}"
    artifacts = {name: str(entry.get("path")) for name, entry in (flavor.get("artifacts") or {}).items()}
    if artifacts != _ARTIFACTS:
        yield f"MLmodel has the artifacts {artifacts}"
    unknown = flavor.keys() - {"artifacts", "cloudpickle_version", "env", "model_code_path", "python_version"}
    unknown -= {"streamable", *_LOADER}
    yield from (f"MLmodel has the unknown setting {name}" for name in sorted(unknown))
    params = (described.get("signature") or {}).get("params") or "[]"
    # Releases differ in what a request may set. What nobody sets has to leave the model's own settings as they are.
    neutral = {name: default for name, (_, default) in parameters().items()}
    defaults = {entry["name"]: entry["default"] for entry in json.loads(params)}
    changing = {name: value for name, value in defaults.items() if value not in (None, [], neutral.get(name))}
    if changing:
        yield f"MLmodel has the defaults {changing}"


def _differing_requirements(pyfunc: Path, wanted: tuple[str, ...]) -> Iterator[str]:
    """Yield which of the files that say what to install ask for something else."""
    path = pyfunc / "requirements.txt"
    lines = path.read_text().split("\n") if path.is_file() else []
    if [line.strip() for line in lines if line.strip()] != list(wanted):
        yield "requirements.txt is another"
    conda = _yaml(pyfunc / "conda.yaml")
    dependencies = conda.get("dependencies") or []
    named = [str(entry).partition("=")[0].rstrip("<") for entry in dependencies[:2]] == ["python", "pip"]
    if conda.get("channels") != ["conda-forge"] or not named or dependencies[2:] != [{"pip": list(wanted)}]:
        yield "conda.yaml is another"
    environment = _yaml(pyfunc / "python_env.yaml")
    build = {str(entry).partition("==")[0] for entry in environment.get("build_dependencies", [])}
    if environment.get("dependencies") != ["-r requirements.txt"] or not build <= {"pip", "setuptools", "wheel"}:
        yield "python_env.yaml is another"


def _yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file; nothing where it is missing or damaged."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


SHOWN = 5
"""Differences that a row names; of the others it gives the number."""


def check_version(
    folder: Path, tags: Mapping[str, str] | None, trust: Trust
) -> tuple[Evidence | None, list[VerdictRow]]:
    """Look at the files of a version, and at its tags; nothing of it is run.

    Args:
        folder: of the downloaded pyfunc.
        tags: of the version; None where it is no version of a registry.
        trust: whose signatures are believed.

    Returns:
        Its evidence, None unless somebody who is trusted has signed it; and a row for each of signature, evidence,
        tags, weights, settings and code.
    """
    inside = model_folder(folder)
    signature = _signature(folder, trust)
    try:
        evidence = Evidence.read(inside)
    except EvidenceError as error:
        return None, [signature, VerdictRow("evidence", str(error), "there", False)]
    digest = evidence.model_digest[:12]
    rows = [signature, VerdictRow("evidence", f"of model {digest}, scored on {evidence.dataset_uri}", "there", True)]
    if tags is not None:
        wanted = evidence.tags()
        differing = [_tag(name, value, tags) for name, value in wanted.items() if tags.get(name) != value]
        rows.append(_row("tags", differing, f"{len(wanted)} tags are equal", "as in the evidence"))
    weights = evidence.files.get(layout.WEIGHTS)
    named = f"{layout.WEIGHTS} is {weights[:12]}" if weights else f"served_digest {evidence.served_digest[:12]}"
    equal = f"{len(evidence.files)} files, {named}"
    rows += [
        _row("weights", differences(evidence.files, file_digests(inside)), equal, "the files of the evidence"),
        _row("settings", _differing_settings(inside, evidence), "of model.json are those of the scores", "as scored"),
        _row("code", differing_envelope(folder, evidence), f"code_digest {evidence.code_digest[:12]}", "as registered"),
    ]
    return evidence if signature.passed else None, rows


def _signature(folder: Path, trust: Trust) -> VerdictRow:
    bound = "by somebody who is trusted"
    try:
        return VerdictRow("signature", trust.check_folder(model_folder(folder), signature_file(folder)), bound, True)
    except SignatureError as error:
        return VerdictRow("signature", str(error), bound, False)


def _differing_settings(inside: Path, evidence: Evidence) -> list[str]:
    """Return what a model serves or says of its origin that is not what was scored, in words."""
    try:
        spec = read_spec(inside)
    except ValueError as error:
        return [str(error)]
    served, scored = spec.sampling.to_json(), Sampling.from_json(evidence.scores.sampling).to_json()
    names = sorted(served.keys() | scored.keys())
    return [
        *(f"{n} is {served.get(n)}, scored was {scored.get(n)}" for n in names if served.get(n) != scored.get(n)),
        *(["lineage is another"] if spec.lineage != evidence.lineage else []),
    ]


def _row(name: str, differing: Sequence[str], equal: str, bound: str) -> VerdictRow:
    """Return the row of what has to be equal."""
    if not differing:
        return VerdictRow(name, equal, bound, True)
    more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return VerdictRow(name, ", ".join(differing[:SHOWN]) + more, bound, False)


def _tag(name: str, wanted: str, tags: Mapping[str, str]) -> str:
    """Return how a tag differs, in words."""
    if name not in tags:
        return f"{name} is missing"
    found = tags[name]
    return f"{name} is {found}, not {wanted}" if len(found) + len(wanted) < 200 else f"{name} is another"
