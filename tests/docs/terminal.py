"""A reader who types what a page says: the commands of its shell blocks, and a terminal in an empty folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

SHELL = re.compile(r"^([ ]*)```(sh|bash|console)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
STAYS = ("serve", "guard")
"""Verbs that stay until Ctrl-C; they say how to end them when they are ready."""


def section(text: str, heading: str) -> str:
    """Return a section of a page without those below it."""
    plain = re.sub(
        r"^```.*?^```",
        lambda block: re.sub(r"^#.*\n", "", block[0], flags=re.MULTILINE),  # comments that begin like a heading
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", plain, re.DOTALL | re.MULTILINE)
    return found


def commands(text: str) -> list[str]:
    """Return what is typed in the shell blocks of a text, each command with the lines that it goes on in."""
    typed = []
    for _, kind, block in SHELL.findall(text):
        for line in map(str.strip, block.replace("\\\n", " ").splitlines()):
            if line.startswith("$ "):
                typed.append(line[2:])
            elif line and not line.startswith("#") and kind != "console" and "$ " not in block[:4]:
                typed.append(line)
    return typed


@dataclass
class Terminal:
    """A shell in a folder of its own, in which `ddpm` is on the path; a server runs on in a second one.

    Attributes:
        said: what each command has said, by the command without its comment.
        variables: of the shell, such as the addresses of runs.
    """

    folder: Path
    server: subprocess.Popen[str] | None = None
    said: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        foreign = ("AWS_", "MLFLOW_", "RAY_", "DDPM_", "XDG_CACHE_HOME")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return inherited | {"PATH": path, "XDG_CACHE_HOME": str(self.folder / "cache")} | self.variables

    def type(self, command: str, *, or_says: str | None = None) -> str:
        """Run a command as it is written; return what it said.

        Args:
            or_says: an answer with which it may end with exit status 1, such as the gate's "refused".
        """
        print(f"$ {command}", flush=True)
        began = time.monotonic()
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            self.variables[name] = value
            return ""
        verb = command.split()[1] if command.startswith("ddpm ") else ""
        if verb in STAYS and "--once" not in command:
            return self._stay(command)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=3000, check=False,
        )  # fmt: skip
        print(done.stdout, done.stderr, f"[{done.returncode}, {time.monotonic() - began:.0f} s]", sep="", flush=True)
        answered = done.returncode == 1 and or_says is not None and or_says in done.stderr
        assert done.returncode == 0 or answered, f"{command} ended with {done.returncode}\n{done.stderr[-3000:]}"
        self.said[command.partition(" #")[0].strip()] = done.stderr
        return done.stderr

    def _stay(self, command: str) -> str:
        """Start what stays until Ctrl-C, and wait until it says that it is ready."""
        self.end_server()
        path = self.folder / "server.log"
        with path.open("w") as log:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stderr=log, text=True
            )
        deadline = time.monotonic() + 180
        while "Ctrl-C" not in path.read_text():
            assert self.server.poll() is None, path.read_text()
            assert time.monotonic() < deadline, path.read_text()
            time.sleep(0.5)
        return path.read_text()

    def end_server(self) -> None:
        """Press Ctrl-C where something stays."""
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            self.server.wait(90)
            self.server = None

    def close(self) -> None:
        self.end_server()
        subprocess.run(["ddpm", "down"], cwd=self.folder, env=self.environment, check=False)
