"""The guard beside a real MLflow and S3: what anybody does to an alias, and where it is a moment later."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.config import RegistryConfig
from pipelines.registry.verdict import Verdict, VerdictLog, now
from pipelines.signing import Signer, Trust
from pipelines.stack import StackState
from pipelines.storage import Storage
from tests.integration.conftest import Shell

pytestmark = pytest.mark.integration

WITHIN_S = 60.0
"""How soon an alias is back, however busy the machine is; the guard itself looks every two seconds."""
READY = "aliases in MLflow at"


@dataclass
class Registry:
    """Registered models whose versions are names only, and signed verdicts about them."""

    mlflow: MlflowClient
    s3: Storage
    signer: Signer
    trust: Trust

    def make(self, model: str, versions: int = 3) -> None:
        self.mlflow.create_registered_model(model)
        for _ in range(versions):
            self.mlflow.create_model_version(model, "s3://ddpm/mlflow/none")

    def let_through(self, model: str, version: str, signer: Signer | None = None) -> None:
        log = VerdictLog.of("s3://ddpm", model, "champion", self.s3, self.trust)
        verdict = Verdict(True, "better", model, "champion", version, at=now())
        assert log.add(verdict, signer or self.signer, log.next_number())

    def point(self, model: str, version: str) -> None:
        self.mlflow.set_registered_model_alias(model, "champion", version)

    def at(self, model: str) -> str | None:
        """The version at the alias; None where there is no alias."""
        try:
            return str(self.mlflow.get_model_version_by_alias(model, "champion").version)
        except MlflowException:
            return None

    def tag(self, model: str, version: str) -> str:
        return self.mlflow.get_model_version(model, version).tags.get("guard.champion", "")


@pytest.fixture(scope="module")
def registry(local_stack: StackState, s3: Storage) -> Iterator[Registry]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", str(local_stack.home))
        config = RegistryConfig(model="guarded")
        mlflow = MlflowClient(local_stack.tracking_uri, local_stack.tracking_uri)
        yield Registry(mlflow, s3, Signer.of(config), Trust.of(config))


@dataclass
class Running:
    """A guard that runs, and the lines that it has printed."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def printed(self, text: str) -> bool:
        return any(text in line for line in self.lines)


@contextmanager
def guarding(shell: Shell, *arguments: str) -> Iterator[Running]:
    running = Running(shell.start("guard", *arguments, "--json"))

    def read() -> None:
        assert running.process.stderr is not None
        for line in running.process.stderr:
            running.lines.append(line)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        until(lambda: running.printed(READY) or running.process.poll() is not None, 60)
        assert running.process.poll() is None, running.lines
        yield running
    finally:
        running.process.send_signal(signal.SIGINT)
        try:
            running.process.wait(20)
        finally:
            running.process.kill()
            reader.join()


def until(happened: Callable[[], bool], within_s: float, lines: Sequence[str] = ()) -> float:
    """Wait until something has happened; return the seconds that it took.

    Raises:
        AssertionError: it has not; says what a guard has printed.
    """
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < within_s, f"not within {within_s} s: {list(lines)}"
        time.sleep(0.05)
    return time.monotonic() - began


def test_whatever_is_done_to_an_alias_it_is_where_the_gate_let_it_go(
    registry: Registry, shell: Shell, tmp_path, monkeypatch
):
    model, unproven = "guarded", "unproven"
    registry.make(model)
    registry.let_through(model, "1")
    registry.point(model, "1")
    registry.make(unproven)
    with guarding(shell, f"registry.model={unproven}") as guard:
        registry.point(model, "2")
        took = until(lambda: registry.at(model) == "1", WITHIN_S)
        print(f"an alias was back after {took:.2f} s")
        until(lambda: all("version 2, and was put back on version 1" in registry.tag(model, v) for v in "12"), WITHIN_S)
        assert registry.tag(model, "3") == ""

        registry.mlflow.delete_registered_model_alias(model, "champion")
        until(lambda: registry.at(model) == "1", WITHIN_S)

        registry.point(unproven, "1")
        until(lambda: registry.at(unproven) is None, WITHIN_S)
        until(lambda: "no signed verdict has let it through" in registry.tag(unproven, "1"), WITHIN_S)

        monkeypatch.setenv("DDPM_HOME", str(tmp_path))
        registry.let_through(model, "3", Signer.of(RegistryConfig(model=model)))
        registry.point(model, "3")
        until(lambda: registry.at(model) == "1", WITHIN_S)
        assert guard.printed("000001.json is not believed")

        registry.mlflow.set_registered_model_alias(model, "candidate", "3")
        registry.let_through(model, "2")
        registry.point(model, "2")
        time.sleep(3)
        assert registry.at(model) == "2"
        registry.point(model, "3")
        until(lambda: registry.at(model) == "2", WITHIN_S)
        until(lambda: "version 3, and was put back on version 2" in registry.tag(model, "2"), WITHIN_S)
        assert registry.mlflow.get_model_version_by_alias(model, "candidate").version in (3, "3")

        guard.process.send_signal(signal.SIGINT)
        until(lambda: guard.process.poll() is not None, 20)
        assert guard.process.returncode == 0, guard.lines
        assert guard.process.stdout is not None
        assert f'"{model}/champion"' in guard.process.stdout.read()
    assert registry.at(model) == "2"


def test_a_promotion_that_has_written_its_verdict_may_find_its_alias_moved(registry: Registry, shell: Shell):
    registry.make("half")
    registry.let_through("half", "1")
    registry.point("half", "1")
    registry.let_through("half", "2")
    done = shell.ok("guard", "registry.model=half", "--once", "--json")
    assert registry.at("half") == "2"
    assert [(c["found"], c["belongs"]) for c in done.answer["corrections"] if c["model"] == "half"] == [("1", "2")]
    registry.point("half", "2")
    assert shell.ok("guard", "registry.model=half", "--once", "--json").answer["corrections"] == []
