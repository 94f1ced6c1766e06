"""What the doctor says about a machine, of values and of folders and ports that really refuse."""

import errno
import socket
from pathlib import Path

from pipelines.doctor import machine
from pipelines.doctor.machine import GIB

ASKED = ["torch>=2.9", "ray[default]>=2.60", 'transformers>=4; extra == "text"', "python>=3.11"]


def test_versions_are_compared_with_the_ranges_that_are_asked_for():
    found = machine.version_checks("3.10.2", {"torch": "2.13.0+cpu", "ray": "2.59", "mlflow": None}, ASKED)
    assert [(check.name, check.status) for check in found] == [
        ("python", "failed"),
        ("torch", "ok"),
        ("ray", "failed"),
        ("mlflow", "failed"),
    ]
    assert found[2].fix == "python -m pip install 'ray[default]>=2.60'"
    assert "not installed" in found[3].found


def test_the_installed_versions_fit():
    assert {check.status for check in machine.check_versions()} == {"ok"}


def test_workers_that_no_core_is_there_for_fail_and_a_limit_warns():
    assert machine.core_check(4, 4, None, 4.0).status == "ok"
    assert machine.core_check(4, 4, None, 8.0).fix == "cluster.num_workers=4, or a cluster"
    limited = machine.core_check(8, 8, 1.5, 1.0)
    assert (limited.status, limited.found) == ("warning", "8 cores, 1.5 of them for this process")
    assert machine.core_check(2, 2, None, None).status == "ok"


def test_little_memory_warns_and_too_little_fails():
    levels = [machine.memory_check(gib * GIB, 16 * GIB, None).status for gib in (8, 1, 0.2)]
    assert levels == ["ok", "warning", "failed"]
    assert "this container's limit is 4.0" in machine.memory_check(1 * GIB, 16 * GIB, 4 * GIB).found


def test_a_folder_that_does_not_exist_yet_is_judged_by_where_it_will_be(tmp_path):
    assert machine.folder_check("cache", tmp_path / "a" / "b", 0, "x").status == "ok"
    assert list(tmp_path.iterdir()) == []
    full = machine.folder_check("cache", tmp_path, 2**60, "data.cache_gib=N")
    assert (full.status, full.fix) == ("warning", "data.cache_gib=N")


def test_a_folder_that_cannot_be_written_names_the_setting():
    found = machine.folder_check("cache", Path("/proc/ddpm/shards"), 0, "data.cache_dir=PATH")
    assert found.status == "failed"
    assert "cannot be written in /proc" in found.found
    assert found.fix.startswith("data.cache_dir=PATH")


def test_a_folder_below_one_that_is_closed_to_this_user_names_the_setting(monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)  # the user of the tests may be root, to whom nothing is closed
    found = machine.folder_check("cache", Path("/closed/shards"), 0, "data.cache_dir=PATH")
    assert (found.status, found.fix) == ("failed", "data.cache_dir=PATH, or chown /closed/shards")
    assert "Permission denied" in found.found


def test_small_shared_memory_warns(monkeypatch, tmp_path):
    assert machine.shared_memory_check(tmp_path / "none").status == "warning"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 64 * 2**20}))
    assert "--shm-size" in machine.shared_memory_check(tmp_path).fix


def test_ports_that_cannot_be_taken_fail(monkeypatch):
    assert machine.port_check().status == "ok"
    assert machine.port_check("192.0.2.1").status == "failed"  # no interface of this machine has it

    def refuse(self, backlog=0):
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(socket.socket, "listen", refuse)
    assert "Address already in use" in machine.port_check().found


class Card:
    """torch.cuda of a machine with one card."""

    def __init__(self, bf16: bool) -> None:
        self.bf16 = bf16

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "T4")
        monkeypatch.setattr(
            "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or self.bf16
        )


def test_a_card_is_named_with_the_precision_that_a_training_on_it_takes(monkeypatch):
    Card(bf16=True).install(monkeypatch)
    [found] = machine.check_accelerators(1)
    assert (found.status, found.found.rpartition("; ")[2]) == ("ok", "bf16")
    Card(bf16=False).install(monkeypatch)
    [found] = machine.check_accelerators(1)
    assert (found.status, "optim.precision=auto takes fp16" in found.found) == ("ok", True)


def test_workers_that_ask_for_a_gpu_where_none_is_fail(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: False)
    assert machine.check_accelerators(1)[0].fix == "cluster.gpus_per_worker=0"
    assert machine.check_accelerators(0)[0].status == "ok"
