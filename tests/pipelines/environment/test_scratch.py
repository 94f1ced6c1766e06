"""Temporary files do not outlive their process for long, however it ends."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from pipelines.environment.scratch import (
    ScratchError,
    _make,
    closed_folder,
    remove_leftovers,
    scratch_folder,
    warn_if_short,
)

CODE = """
import os, sys, time
from pipelines.environment.scratch import scratch_folder
folder = scratch_folder()
(folder / "file").write_bytes(bytes(1000))
{then}
print(folder, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def start(temporary: Path, seconds: float, then: str = "") -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(then=then), str(seconds)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_leftovers_of_killed_processes_are_removed_and_files_of_living_ones_are_kept(temporary):
    killed, left = start(temporary, 60)
    living, used = start(temporary, 60)
    try:
        killed.kill()
        killed.wait()
        assert (left / "file").exists()
        mine = scratch_folder()
        assert mine.parent == used.parent == temporary
        assert not left.exists()
        assert (used / "file").exists()
    finally:
        living.kill()
        living.wait()


def test_a_process_that_ends_removes_its_own(temporary):
    process, folder = start(temporary, 0)
    assert process.wait() == 0
    assert not folder.exists()


def test_a_fork_neither_removes_nor_holds_the_folder_of_its_parent(temporary):
    # The parent waits until the child runs: before that, a child has not let go of what it has from its parent.
    fork = (
        "runs, begin = os.pipe()\nchild = os.fork()\n"
        "if not child: os.write(begin, b'.'); time.sleep(60 if float(sys.argv[1]) else 0); sys.exit()\n"
        "os.read(runs, 1)\n"
    )
    process, folder = start(temporary, 0, fork + "os.waitpid(child, 0); assert (folder / 'file').exists()")
    assert process.wait() == 0  # the child has ended before, and took nothing with it
    process, folder = start(temporary, 60, fork + "print(child, flush=True)")
    assert process.stdout is not None
    child, folder = int(folder.name), Path(process.stdout.readline().strip())
    try:
        process.kill()
        process.wait()
        remove_leftovers(temporary)
        assert not folder.exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_a_cleaner_took_is_made_again(temporary):
    first = scratch_folder()
    assert scratch_folder() == first
    shutil.rmtree(first)
    assert scratch_folder().is_dir()


def test_a_folder_that_another_process_took_for_a_leftover_is_made_again(temporary, monkeypatch):
    make, made = tempfile.mkdtemp, []

    def taken_once(**named):
        made.append(make(**named))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", taken_once)
    folder, number = _make(temporary)
    os.close(number)
    assert (len(made), str(folder)) == (2, made[1])


def test_a_disk_with_too_little_room_causes_a_warning(temporary, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 8, 2 << 30))
    warn_if_short(2 << 30, "checkpoints")
    assert not caplog.records
    warn_if_short(3 << 30, "checkpoints")
    assert caplog.messages == [
        f"checkpoints may need 3.0 GiB in {temporary}, which has 2.0 GiB left: free some, or set TMPDIR to another disk"
    ]


def test_persistent_files_are_in_a_private_folder_and_never_in_that_of_another_user(tmp_path, monkeypatch):
    folder = closed_folder(tmp_path)
    assert (folder.name, stat.S_IMODE(folder.stat().st_mode)) == (f"ddpm-{os.getuid()}", 0o700)
    folder.chmod(0o755)
    assert stat.S_IMODE(closed_folder(tmp_path).stat().st_mode) == 0o700
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ScratchError, match="is another user's: remove it"):
        closed_folder(tmp_path)
