"""Secrets planted in addresses are found nowhere after a training, and in no list of processes or jobs during it."""

from __future__ import annotations

import contextlib
import re
import secrets
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

from pipelines import stack
from pipelines.stack import StackState
from pipelines.stack.home import ray_folder
from pipelines.storage import Storage
from tests.integration.conftest import Shell

pytestmark = pytest.mark.integration

PASSWORD = f"planted-{secrets.token_hex(12)}"
LISTS = ["/api/jobs/", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/api/v0/runtime_envs?detail=1"]
LISTS += ["/api/v0/workers?detail=1", "/api/v0/jobs?detail=1"]
TINY = ["+experiment=digits", "name=secret", "images=384", "checkpoint.every=384", "tracking.grid_every=null"]
TINY += ["cluster.num_workers=1", "data.uri=s3://ddpm/datasets/secret"]


@pytest.fixture
def planted(local_stack: StackState) -> list[str]:
    """Overrides with the S3 key of the stack and a password for MLflow in their addresses."""
    lines = dict(
        line.split(" = ") for line in (local_stack.home / "credentials").read_text().splitlines() if "=" in line
    )
    user = f"{lines['aws_access_key_id']}:{lines['aws_secret_access_key']}@"
    s3, mlflow = str(local_stack.s3_endpoint), str(local_stack.tracking_uri)
    return [
        f"storage.endpoint_url='{s3.replace('://', f'://{user}')}'",
        f"tracking.uri='{mlflow.replace('://', f'://me:{PASSWORD}@')}'",
    ]


@pytest.fixture
def planted_secrets(local_stack: StackState) -> list[bytes]:
    key = re.search(r"aws_secret_access_key = (.+)", (local_stack.home / "credentials").read_text())
    return [PASSWORD.encode(), key[1].encode()]


def processes() -> Iterator[tuple[int, bytes]]:
    """The command line of every process of this machine."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield process.pid, " ".join(process.cmdline()).encode()


def ray_lists(state: StackState) -> Iterator[tuple[str, bytes]]:
    """What Ray's dashboard tells of jobs, actors, tasks and their environments."""
    token = {"Authorization": f"Bearer {(state.home / 'ray-token').read_text()}"}
    for path in LISTS:
        answer = requests.get(f"{state.dashboard_url}{path}", headers=token, timeout=20)
        assert answer.ok, (path, answer.status_code, answer.text[:300])
        yield path, answer.content


def stored(state: StackState, s3: Storage) -> Iterator[tuple[str, bytes]]:
    """What is left behind: logs of the stack, of Ray's sessions, MLflow's database, and every object in S3."""
    leaders = {service.name: service.pid for service in stack.status(state.home)}
    own = re.escape(f"{ray_folder(state.home)}/session_")
    session = {
        found[0]
        for process in psutil.Process(leaders["ray"]).children(recursive=True)
        for found in [re.search(own + r"[\w-]+", " ".join(process.cmdline()))]
        if found
    }
    assert len(session) == 1
    files = [
        *(state.home / "logs").iterdir(),
        *state.home.glob("mlflow.db*"),
        *(Path(session.pop()) / "logs").rglob("*"),
    ]
    for file in files:
        if file.is_file():
            yield str(file), file.read_bytes()
    for entry in s3.list("s3://ddpm/mlflow") + s3.list("s3://ddpm/runs/secret"):
        yield entry.uri, s3.read(entry.uri)


def holding(texts: Iterable[tuple[object, bytes]], planted: list[bytes]) -> list[object]:
    """Names of the texts that hold a secret."""
    return [name for name, text in texts if any(secret in text for secret in planted)]


def test_planted_secrets_are_shown_and_stored_nowhere(
    shell: Shell, local_stack: StackState, s3: Storage, planted: list[str], planted_secrets: list[bytes]
) -> None:
    shell.ok("ingest", "digits", "--to", "s3://ddpm/datasets/secret")
    training: subprocess.Popen[str] = shell.start("train", *TINY, *planted, "--json")
    shown, files, modes = [], set(), set()
    while training.poll() is None:
        time.sleep(1)
        if training.pid in holding(processes(), planted_secrets):
            continue  # it has not started itself again yet
        shown += holding(processes(), planted_secrets) + holding(ray_lists(local_stack), planted_secrets)
        for file in local_stack.home.glob("[!.]*-credentials-*"):
            with contextlib.suppress(FileNotFoundError):
                modes.add(stat.S_IMODE(file.stat().st_mode))
                files.add(file)
    out, err = training.communicate()
    assert training.returncode == 0, err[-3000:]
    assert shown == []
    assert len(files) == 2  # the workers had both by file
    assert modes == {0o600}
    assert not [file for file in files if file.exists()]
    assert holding([("stdout", out.encode()), ("stderr", err.encode())], planted_secrets) == []
    texts = list(stored(local_stack, s3))
    assert any(name.startswith("s3://ddpm/mlflow") for name, _ in texts)
    assert holding(texts, planted_secrets) == []


def test_a_verb_that_fails_does_not_show_the_secrets_that_it_was_given(
    shell: Shell, planted: list[str], planted_secrets: list[bytes]
) -> None:
    wrong = [
        ("train", "optim.lr=oops", *planted),
        ("train", "storage=file", "storage.root=file:///proc/no", *planted),
        ("train", f"name='http://me:{PASSWORD}@host'"),
        ("train", "storage=file", f"storage.root=sftp://me:{PASSWORD}@127.0.0.1:9/x", *planted),
    ]
    for arguments in wrong:
        done = shell(*arguments, "--json")
        assert holding([("stderr", done.err.encode()), ("answer", str(done.answer).encode())], planted_secrets) == []
        assert done.code != 0, arguments
