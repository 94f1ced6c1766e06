"""The MLflow server on Kubernetes: valid, with a login, probes that need none, and secrets by reference only."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "infra/mlflow"
DOCUMENTS = [
    document
    for name in ("namespace.yaml", "postgres.yaml", "mlflow.yaml")
    for document in yaml.safe_load_all((FOLDER / name).read_text())
]
KUBERNETES = "1.33"


def named(kind: str, name: str) -> dict:
    (found,) = [d for d in DOCUMENTS if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def container(kind: str, name: str) -> dict:
    (found,) = named(kind, name)["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_kubernetes_takes_it(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("kind, name", [("Deployment", "mlflow"), ("StatefulSet", "postgres")])
def test_services_find_their_pods_and_ports(kind, name):
    service, template = named("Service", name), named(kind, name)["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    names = {port["name"] for port in container(kind, name)["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True


def test_the_server_asks_for_a_login_and_its_probes_need_none():
    found = container("Deployment", "mlflow")
    assert "--app-name=basic-auth" in found["args"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert found[probe]["httpGet"]["path"] == "/health"


def test_every_variable_of_the_server_is_one_that_mlflow_or_boto3_reads():
    import mlflow.environment_variables as known
    from mlflow.cli import cli

    options = {p.envvar for p in cli.commands["server"].params if p.envvar}
    options = {name for entry in options for name in (entry if isinstance(entry, list | tuple) else [entry])}
    set_here = set(named("ConfigMap", "mlflow")["data"]) | {v["name"] for v in container("Deployment", "mlflow")["env"]}
    of_boto3 = {"AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_SHARED_CREDENTIALS_FILE"}
    for name in set_here - of_boto3 - {"MLFLOW_FLASK_SERVER_SECRET_KEY"}:
        assert name in options or hasattr(known, name), name


def test_secrets_are_references():
    assert "Secret" not in {document["kind"] for document in DOCUMENTS}
    for path in FOLDER.iterdir():
        lines = [line.partition("#")[0] for line in path.read_text().splitlines()]
        assert not re.search(
            r"(?i)(password|secret_key|session-key)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/]{8,}", "\n".join(lines)
        )
    by_reference = [
        v for v in container("Deployment", "mlflow")["env"] if "KEY" in v["name"] or "STORE_URI" in v["name"]
    ]
    assert len(by_reference) == 3
    assert all("secretKeyRef" in v["valueFrom"] for v in by_reference)


def test_the_volume_of_the_database_outlives_its_pod():
    (claim,) = named("StatefulSet", "postgres")["spec"]["volumeClaimTemplates"]
    mounts = {m["name"]: m["mountPath"] for m in container("StatefulSet", "postgres")["volumeMounts"]}
    values = {v["name"]: v["value"] for v in container("StatefulSet", "postgres")["env"]}
    assert values["PGDATA"].startswith(mounts[claim["metadata"]["name"]])
