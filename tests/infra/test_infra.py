"""The files under infra/ fit each other, the image, Ray's schema and the config of `ddpm train`.

Nothing here needs Docker, Kubernetes, AWS or a network.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
RAYJOB = ROOT / "infra/kuberay/rayjob.yaml"
AWS = ROOT / "infra/aws/cluster.yaml"

# What boto3, pyarrow and MLflow read. A name outside of this list is a typo or an invention.
ADDRESSES = {"AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI"}
# What only the command of the YAML files reads.
FOR_THE_COMMAND = {"DDPM_BUCKET"}

CONFIG_MAP, JOB = yaml.safe_load_all(RAYJOB.read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
AWS_CLUSTER = yaml.safe_load(AWS.read_text())
COMMANDS = {"kuberay": JOB["spec"]["entrypoint"], "aws": AWS_CLUSTER["metadata"]["entrypoint"]}
TARGETS = pytest.mark.parametrize("target", COMMANDS)


def pod_specs() -> dict[str, dict[str, Any]]:
    return {
        "submitter": JOB["spec"]["submitterPodTemplate"]["spec"],
        "head": HEAD["template"]["spec"],
        "workers": WORKERS["template"]["spec"],
    }


def containers() -> dict[str, dict[str, Any]]:
    return {name: spec["containers"][0] for name, spec in pod_specs().items()}


def config_maps(container: dict[str, Any]) -> set[str]:
    return {source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source}


def aws_environment() -> dict[str, str]:
    options = [option for option in AWS_CLUSTER["docker"]["run_options"] if option.startswith("--env=")]
    return dict(option.removeprefix("--env=").split("=", 1) for option in options)


def arguments(command: str, env: dict[str, str]) -> list[str]:
    """The command's words as bash makes them, in an environment of `env` only."""
    shell = ["bash", "-c", f"printf '%s\\0' {command}"]
    run = subprocess.run(shell, env=env, capture_output=True, text=True, check=True, timeout=10)
    return run.stdout.split("\0")[:-1]


def environment(target: str) -> dict[str, str]:
    return {"kuberay": CONFIG_MAP["data"], "aws": aws_environment()}[target]


def overrides(target: str) -> list[str]:
    program, verb, *rest = arguments(COMMANDS[target], environment(target))
    assert (program, verb) == ("ddpm", "train")
    return rest


def values(target: str) -> dict[str, str]:
    return dict(override.split("=", 1) for override in overrides(target))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), comments dropped and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def final_stage() -> list[tuple[str, str]]:
    every = instructions()
    last = max(i for i, (name, _) in enumerate(every) if name == "FROM")
    return every[last:]


def build_arguments() -> dict[str, str]:
    return dict(value.split("=", 1) for name, value in instructions() if name == "ARG" and "=" in value)


def image_environment() -> dict[str, str]:
    words = [word for name, value in final_stage() if name == "ENV" for word in shlex.split(value)]
    return dict(word.split("=", 1) for word in words)


def scalars(node: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a YAML document as (path, text)."""
    if isinstance(node, dict):
        children = list(node.items())
    elif isinstance(node, list):
        children = list(enumerate(node))
    else:
        yield path, str(node)
        return
    for key, child in children:
        yield from scalars(child, f"{path}/{key}")


# --- The command


def test_both_clusters_run_the_very_same_command() -> None:
    assert COMMANDS["kuberay"] == COMMANDS["aws"]


@TARGETS
def test_the_command_survives_being_quoted_and_read_by_a_second_shell(target: str) -> None:
    """`ray job submit` quotes the words that the first shell made; the head's shell reads them again."""
    once = arguments(COMMANDS[target], environment(target))
    assert arguments(shlex.join(once), {}) == once
    assert not re.search(r"[;&|\n`]|\$\(", COMMANDS[target])  # the submitter, not the cluster, would run it


@TARGETS
def test_a_missing_variable_fails_instead_of_making_a_wrong_address(target: str) -> None:
    names = set(re.findall(r"\$\{(\w+)", COMMANDS[target]))
    assert names == FOR_THE_COMMAND
    for name in names:
        rest = {key: value for key, value in environment(target).items() if key != name}
        with pytest.raises(subprocess.CalledProcessError):
            arguments(COMMANDS[target], rest)


@TARGETS
def test_overrides_follow_hydras_grammar(target: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides(target))
    keys = [override.key_or_group for override in parsed]
    assert len(keys) == len(set(keys))
    assert {override.key_or_group for override in parsed if override.is_add()} == {"experiment"}


@TARGETS
def test_overrides_make_a_config(target: str) -> None:
    from pipelines.config import compose

    config = compose(overrides(target))
    wanted = values(target)
    assert config.name == wanted["name"]
    assert config.storage.root == wanted["storage.root"]
    assert config.cluster.num_workers == int(wanted["cluster.num_workers"])
    assert config.cluster.gpus_per_worker == int(wanted["cluster.gpus_per_worker"])
    assert config.cluster.cpus_per_worker == int(wanted["cluster.cpus_per_worker"])


@TARGETS
def test_the_run_has_a_fixed_name_so_that_a_retry_resumes_it(target: str) -> None:
    assert re.fullmatch(r"[\w-]+", values(target)["name"])


# --- Resources


def test_kuberay_provides_exactly_the_gpus_and_enough_cpus() -> None:
    wanted = values("kuberay")
    num_workers, gpus, cpus = (
        int(wanted[f"cluster.{key}"]) for key in ("num_workers", "gpus_per_worker", "cpus_per_worker")
    )
    limits = containers()["workers"]["resources"]["limits"]
    pods, pod_gpus = WORKERS["replicas"], int(limits["nvidia.com/gpu"])
    assert num_workers * gpus == pods * pod_gpus
    assert pod_gpus % gpus == 0
    assert cpus * (pod_gpus // gpus) <= int(limits["cpu"])
    assert WORKERS["minReplicas"] == WORKERS["replicas"] == WORKERS["maxReplicas"]


def test_aws_provides_exactly_the_gpus_and_enough_cpus() -> None:
    wanted = values("aws")
    num_workers, gpus, cpus = (
        int(wanted[f"cluster.{key}"]) for key in ("num_workers", "gpus_per_worker", "cpus_per_worker")
    )
    workers = AWS_CLUSTER["available_node_types"]["gpu"]
    nodes, node_gpus = workers["max_workers"], workers["resources"]["GPU"]
    assert num_workers * gpus == nodes * node_gpus
    assert node_gpus % gpus == 0
    assert cpus * (node_gpus // gpus) <= workers["resources"]["CPU"]
    assert workers["min_workers"] == nodes == AWS_CLUSTER["max_workers"]


def test_no_training_on_the_head() -> None:
    assert {HEAD["rayStartParams"][key] for key in ("num-cpus", "num-gpus")} == {"0"}
    assert AWS_CLUSTER["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    start = AWS_CLUSTER["head_start_ray_commands"][-1]
    assert {"--head", "--num-cpus=0", "--num-gpus=0"} <= set(start.split())
    # A driver that reserves CPUs would leave the head for a node whose CPUs the training needs.
    assert "entrypointNumCpus" not in JOB["spec"]
    # In an image this shows every GPU of a node to pods that asked for none.
    assert "NVIDIA_VISIBLE_DEVICES" not in image_environment()


@pytest.mark.parametrize("group", ["head", "workers"])
def test_shared_memory_is_a_bounded_memory_volume_within_the_limit(group: str) -> None:
    (mount,) = [m for m in containers()[group]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    (volume,) = [v for v in pod_specs()[group]["volumes"] if v["name"] == mount["name"]]
    assert volume["emptyDir"]["medium"] == "Memory"
    limit = containers()[group]["resources"]["limits"]["memory"]
    assert int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) < int(limit.removesuffix("Gi"))
    assert "nvidia.com/gpu" not in containers()["head"]["resources"]["limits"]


# --- KubeRay


def test_rayjob_cleans_up_retries_and_ends() -> None:
    spec = JOB["spec"]
    assert JOB["apiVersion"] == "ray.io/v1"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0  # only heeded together with the shutdown
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > 3600
    assert spec["submissionMode"] == "K8sJobMode"  # the only mode that uses submitterPodTemplate
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    assert not {"command", "args"} & containers()["submitter"].keys()  # KubeRay writes them only if absent


def test_ray_start_parameters_are_strings() -> None:
    """KubeRay's type is map[string]string: a bare 0 is refused by the API server."""
    for group in (HEAD, WORKERS):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", ["submitter", "head", "workers"])
def test_pods_get_the_addresses_and_run_as_the_images_user(name: str) -> None:
    assert config_maps(containers()[name]) == {CONFIG_MAP["metadata"]["name"]}
    security = pod_specs()[name]["securityContext"]
    (user,) = [value for instruction, value in final_stage() if instruction == "USER"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert security["runAsNonRoot"] is True


@pytest.mark.parametrize("name", ["head", "workers"])
def test_s3_credentials_are_a_mounted_file_that_the_user_can_read(name: str) -> None:
    env = {item["name"]: item["value"] for item in containers()[name]["env"]}
    path = Path(env["AWS_SHARED_CREDENTIALS_FILE"])
    (mount,) = [m for m in containers()[name]["volumeMounts"] if Path(m["mountPath"]) == path.parent]
    (volume,) = [v for v in pod_specs()[name]["volumes"] if v["name"] == mount["name"]]
    assert volume["secret"]["secretName"] == "ddpm-s3"
    assert volume["secret"]["defaultMode"] & 0o077 == 0o040  # the group reads, the world does not
    security = pod_specs()[name]["securityContext"]
    assert security["fsGroup"] == security["runAsGroup"]
    assert f"create secret generic ddpm-s3 --from-file={path.name}=" in RAYJOB.read_text()


# --- AWS


def test_aws_file_validates_against_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(AWS_CLUSTER)
    validate_config(config)
    # prepare_config fills gaps from Ray's defaults, among them the install of a nightly wheel.
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert not [command for command in commands if "pip install" in command]


def test_rays_schema_refuses_a_misspelt_field() -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**AWS_CLUSTER, "max_wrokers": 2}))


def test_aws_nodes_have_roles_instead_of_keys() -> None:
    profiles = [
        node["node_config"]["IamInstanceProfile"]["Name"] for node in AWS_CLUSTER["available_node_types"].values()
    ]
    assert len(profiles) == len(set(profiles)) == 2  # the head may start machines, the workers may not


# --- Addresses and secrets


@TARGETS
def test_environment_is_what_the_code_reads(target: str) -> None:
    env = environment(target)
    assert env.keys() <= ADDRESSES | FOR_THE_COMMAND
    assert env.keys() >= (ADDRESSES | FOR_THE_COMMAND) - {"AWS_ENDPOINT_URL"}
    assert env["AWS_REGION"] == env["AWS_DEFAULT_REGION"]
    assert re.fullmatch(r"https?://\S+", env["MLFLOW_TRACKING_URI"])
    assert re.fullmatch(r"https?://\S+", env.get("AWS_ENDPOINT_URL", "https://s3"))
    assert all(isinstance(value, str) for value in env.values())


def test_aws_uses_amazons_endpoint_in_its_own_region() -> None:
    assert "AWS_ENDPOINT_URL" not in aws_environment()
    assert aws_environment()["AWS_REGION"] == AWS_CLUSTER["provider"]["region"]
    assert AWS_CLUSTER["provider"]["availability_zone"].startswith(AWS_CLUSTER["provider"]["region"])


@pytest.mark.parametrize("path", [DOCKERFILE, RAYJOB, AWS, ROOT / "infra/README.md"], ids=lambda p: p.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b", text)
    assert not re.search(r"-----BEGIN [A-Z ]*PRIVATE KEY", text)
    names = r"aws_secret_access_key|aws_access_key_id|aws_session_token|mlflow_tracking_(?:password|token)"
    assert not re.search(rf"(?i)(?:{names})\"?\s*[:=]\s*\S", text)


def test_yaml_files_hold_references_to_secrets_only() -> None:
    documents = [CONFIG_MAP, JOB, AWS_CLUSTER]
    assert "Secret" not in {document.get("kind") for document in documents}
    for document in documents:
        for path, text in scalars(document):
            assert not re.search(r"(?i)password|_token|access_key", path + text), path
    assert "runtimeEnvYAML" not in JOB["spec"]  # Ray's dashboard shows it


# --- The image


def test_base_images_are_pinned_and_chosen_by_build_arguments() -> None:
    arguments_ = build_arguments()
    assert {"BASE", "TORCH_INDEX", "TORCH_VERSION", "RAY_VERSION"} <= arguments_.keys()
    bases = [value.split()[0] for name, value in instructions() if name == "FROM"]
    assert set(bases) == {"${BASE}"}  # one Python for every stage, thus for CPU and CUDA images
    # To the patch release: Ray compares it between nodes.
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", arguments_["BASE"])
    used = " ".join(value for name, value in final_stage() if name == "RUN")
    assert all(f"${{{name}}}" in used for name in ("TORCH_INDEX", "TORCH_VERSION", "RAY_VERSION"))


def test_every_image_of_the_yaml_files_is_this_version_and_none_is_latest() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    docker = AWS_CLUSTER["docker"]
    on_gpus = [containers()["workers"]["image"], docker["image"]]
    on_cpus = [containers()["head"]["image"], containers()["submitter"]["image"], docker["head_image"]]
    repository = on_gpus[0].rpartition(":")[0]
    assert set(on_gpus) == {f"{repository}:{version}-cuda"}
    assert set(on_cpus) == {f"{repository}:{version}-cpu"}
    for path in (DOCKERFILE, RAYJOB, AWS, ROOT / "infra/README.md"):
        assert ":latest" not in path.read_text()


def test_image_has_the_ray_and_torch_that_the_project_and_the_cluster_expect() -> None:
    from packaging.requirements import Requirement

    pins = build_arguments()
    assert CLUSTER["rayVersion"] == pins["RAY_VERSION"]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {r.name: r.specifier for r in map(Requirement, dependencies)}
    assert pins["RAY_VERSION"] in ranges["ray"]
    assert pins["TORCH_VERSION"] in ranges["torch"]
    assert any("ray[default" in value for name, value in final_stage() if name == "RUN")  # the job server


def test_the_user_is_not_root_and_owns_a_home() -> None:
    user = [value for name, value in final_stage() if name == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # numbers: Kubernetes cannot verify a name
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
    copies = [value.split()[0] for name, value in stage if name == "COPY"]
    assert copies == ["pyproject.toml"]
    steps = [value for name, value in stage if name == "RUN"]
    torch, dependencies, wheel = (
        next(i for i, step in enumerate(steps) if text in step)
        for text in ("--index-url", "/tmp/requirements.txt", "/dist/*.whl")
    )
    assert torch < dependencies < wheel
    assert "--no-deps" in steps[wheel]
    assert not any(re.search(r"\s(-e|--editable)\s", step) for step in steps)


def test_the_build_context_has_what_the_wheel_needs_and_little_else() -> None:
    first_stage = instructions()[: -len(final_stage())]
    copied = {word for name, value in first_stage if name == "COPY" for word in value.split()[:-1]}
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


def test_the_dependency_list_step_prints_pyprojects_dependencies() -> None:
    (step,) = [value for _, value in final_stage() if "tomllib" in value]
    (program,) = re.findall(r'python -c "([^"]+)"', step)
    program = program.replace("/tmp/pyproject.toml", str(ROOT / "pyproject.toml"))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=10)
    expected = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert run.stdout.splitlines() == expected
