"""The plain lines that `Terminal` prints where stderr is no terminal."""

import pytest

from pipelines.cli.terminal import Terminal
from pipelines.display import TimeBreakdown


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().err.splitlines()]


def test_a_counter_prints_its_first_and_its_last_value(capsys):
    progress = Terminal().counter("check", "MiB")
    for done in range(4):
        progress(done, 3)
    progress(3, 3)
    assert lines(capsys) == [["check", "0%", "0", "MiB"], ["check", "100%", "3", "MiB"]]


def test_a_training_shows_images_and_loss_and_never_more_than_all_images(capsys):
    Terminal().training(100, 0)({"images_seen": 128.0, "loss": 0.25})
    assert lines(capsys) == [["train", "100%", "100", "images,", "0/s,", "loss", "0.2500"]]


def test_a_breakdown_is_lines(capsys):
    Terminal().breakdown(TimeBreakdown("goodput", "title", {"productive": 3.0}, 3.0, ["all of it", "1 start"]))
    assert lines(capsys) == [["goodput", "all", "of", "it"], ["goodput", "1", "start"]]


def test_square_brackets_of_an_error_are_text(capsys):
    Terminal().error("error", ValueError("search.space[red] is wrong"))
    assert "search.space[red] is wrong" in capsys.readouterr().err
