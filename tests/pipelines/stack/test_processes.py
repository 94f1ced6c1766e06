"""How processes of the local stack are recognised, and which ports they get."""

import os
import socket

import psutil

from pipelines.stack.processes import StartedService, choose_ports, find_process


def test_ports_are_distinct_and_stay_the_same_until_one_is_taken(tmp_path):
    first = choose_ports(tmp_path, "s3", ["a", "b", "c"])
    assert len(set(first.values())) == 3
    assert choose_ports(tmp_path, "s3", ["a", "b", "c"]) == first
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first["b"]))
        taken.listen()
        moved = choose_ports(tmp_path, "s3", ["a", "b", "c"])
    assert first["b"] not in moved.values()


def test_a_process_is_known_by_its_number_and_its_birth():
    me = psutil.Process()
    born = me.create_time()
    assert find_process(StartedService(os.getpid(), born, "", "", ())) == me
    assert find_process(StartedService(os.getpid(), born - 60, "", "", ())) is None
