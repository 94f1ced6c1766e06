"""The files that MLflow puts around a signed model: its code, how it is loaded, and what it requires.

None of it is signed, because MLflow writes it afterwards. All of it decides what a version does when it is served, so
all of it is compared with the evidence, which is signed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ddpm.inference import parameters
from pipelines.registry.evidence import (
    CODE,
    COMPILED,
    MODEL,
    SERVED,
    SIGNATURE,
    Evidence,
    code_files,
    requirements,
)
from pipelines.signing.folder import differences, files_below

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
    """Return in words what of a pyfunc, outside its signed folder, is not as the evidence says."""
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
    compiled: set[str] = set()
    for name in files_below(pyfunc):
        parts = PurePosixPath(name).parts
        if COMPILED in parts:
            compiled.add(str(PurePosixPath(*parts[: parts.index(COMPILED) + 1])))
        elif not (name.startswith((f"{_ARTIFACTS['model']}/", f"{CODE}/")) or name in _known()):
            yield f"{name} is new"
    yield from (f"{folder} holds compiled code, which Python would run: delete it" for folder in sorted(compiled))


def _known() -> set[str]:
    return {*WRITTEN, SERVED, _ARTIFACTS["signature"]}


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
