"""A stranger's walk: the commands of the README, copied out of it, one after another in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import stack
from tests.digits import write_digits
from tests.docs.modules import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]


def blocks(heading: str) -> list[str]:
    """Return the shell blocks of a section of the README, without those of the sections below it."""
    text = (ROOT / "README.md").read_text()
    (section,) = re.findall(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", _without_comments(text), re.DOTALL | re.MULTILINE
    )
    return re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def _without_comments(text: str) -> str:
    """Return a page whose shell blocks have no lines that begin like a heading."""
    return re.sub(
        r"^```.*?^```",
        lambda block: re.sub(r"^#.*\n", "", block[0], flags=re.MULTILINE),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


def commands(block: str) -> list[str]:
    """Return the commands of a block, each with the lines that it goes on in."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@dataclass
class Terminal:
    """A shell in a folder of its own, in which `ddpm` is on the path; a server runs on in a second one."""

    folder: Path
    server: subprocess.Popen[str] | None = None
    said: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        foreign = ("AWS_", "MLFLOW_", "RAY_", "DDPM_", "XDG_CACHE_HOME")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return inherited | {"PATH": path, "XDG_CACHE_HOME": str(self.folder / "cache")}

    def type(self, command: str) -> str:
        """Run a command as it is written; return what it said."""
        print(f"$ {command}", flush=True)
        if command.startswith("ddpm serve "):
            self.serve(command)
            return ""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=3000, check=False,
        )  # fmt: skip
        print(done.stdout, done.stderr, sep="", flush=True)
        assert done.returncode == 0, command
        self.said[command.partition(" #")[0].strip()] = done.stderr
        return done.stderr

    def serve(self, command: str) -> None:
        """Start a server, and wait until it says where it is."""
        path = self.folder / "server.log"
        with path.open("w") as log:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stderr=log, text=True
            )
        deadline = time.monotonic() + 180
        while "described at" not in path.read_text():
            assert self.server.poll() is None, path.read_text()
            assert time.monotonic() < deadline, path.read_text()
            time.sleep(0.5)

    def close(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait(90)
        subprocess.run(["ddpm", "down"], cwd=self.folder, env=self.environment, check=False)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


def test_the_first_steps_end_well_as_they_are_written(terminal):
    (block,) = blocks("First steps")
    for command in commands(block):
        terminal.type(command)
    assert Image.open(terminal.folder / "samples" / "grid.png").size[0] > 0
    (report,) = terminal.folder.glob("report-*.html")
    assert report.stat().st_size > 100_000
    assert not [service.name for service in stack.status(terminal.folder / ".ddpm") if service.running]


BUDGET = ("budget=30m", "budget=6m")
"""What the README says, and what these small pictures take."""


def write_photos(folder: Path) -> None:
    """Write scanned digits into the two class folders of the README: even ones as cats, odd ones as dogs."""
    write_digits(folder, range(1797), lambda digit: "dog" if digit % 2 else "cat")
    (folder / "cat" / "0.png").rename(folder / "cat" / "1.png")  # the picture that the README names


def test_pictures_become_a_service(terminal):
    write_photos(terminal.folder / "photos")
    found = blocks("From a folder of pictures to a service")
    typed = [command.replace(*BUDGET) for block in found for command in commands(block)]
    assert sum(BUDGET[1] in command for command in typed) == 1
    verbs = [command.split()[1] for command in typed if command.startswith("ddpm ")]
    assert verbs == ["flow", "sample", "inpaint", "verify", "promote", "serve"]
    for command in typed:
        terminal.type(command)
    flow, promotion = (text for command, text in terminal.said.items() if command.split()[1] in ("flow", "promote"))
    assert "registry  models:/photos/1, alias champion passed" in flow
    assert "the alias champion is there already" in promotion
    assert len(list((terminal.folder / "samples").glob("*.png"))) == 2 * 8 + 1
    given = np.asarray(Image.open(terminal.folder / "photos" / "cat" / "1.png"))
    (filled,) = [path for path in (terminal.folder / "filled").glob("*.png") if path.name != "grid.png"]
    after = np.asarray(Image.open(filled))
    assert np.array_equal(after[:, after.shape[1] // 2 :], given[:, given.shape[1] // 2 :])
    assert not np.array_equal(after, given)
    served = np.asarray(Image.open(terminal.folder / "cat.png"))
    assert served.shape == given.shape
    assert served.std() > 10
