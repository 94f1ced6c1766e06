import pytest

from pipelines.report import Report
from pipelines.tracking import Tracker


@pytest.mark.parametrize("name, file", [("first", "report-first.html"), ("../../x", "report-..%2F..%2Fx.html")])
def test_the_file_of_a_report_lies_here_whatever_the_run_is_called(name, file):
    assert Report(name, "", (), Tracker("http://127.0.0.1:9", "a")).file_name == file
