"""What the selftest says of a machine."""

from __future__ import annotations

from pipelines.doctor.gpu.facts import link_kinds, report_section
from pipelines.presentation import markdown

TOPOLOGY = """\
        GPU0    GPU1    GPU2    NIC0    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      NV12    SYS     PXB     0-31            0               N/A
GPU1    NV12     X      PIX     SYS     0-31            0               N/A
GPU2    SYS     PIX      X      SYS     32-63           1               N/A
NIC0    PXB     SYS     SYS      X

Legend:

  X    = Self
"""


def test_the_kinds_of_links_are_those_of_the_devices_that_torch_sees():
    assert link_kinds(TOPOLOGY, None) == {(0, 1): "NV12", (0, 2): "SYS", (1, 2): "PIX"}
    assert link_kinds(TOPOLOGY, "2,1") == {(0, 1): "PIX"}
    assert link_kinds(TOPOLOGY, "GPU-3c1b") == link_kinds(TOPOLOGY, "7") == link_kinds("", None) == {}


def test_a_report_has_versions_and_the_variables_that_matter_and_no_passwords():
    environ = {"NCCL_P2P_DISABLE": "1", "AWS_SECRET_ACCESS_KEY": "abc", "HOME": "/root"}
    shown = markdown.section(report_section(environ | {"OMP_X": "http://u:secret@host"}))
    assert "NCCL_P2P_DISABLE=1" in shown
    assert "torch: " in shown
    assert "abc" not in shown
    assert "HOME" not in shown
    assert "secret" not in shown
