"""The plain lines that `Terminal` prints where stderr is no terminal."""

import io

import pytest
from rich.console import Console

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


def test_a_counter_says_how_long_the_rest_takes_once_it_can_tell(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pipelines.cli.terminal.time.monotonic", lambda: now[0])
    progress = Terminal().counter("sample", "steps")
    for done, at in ((1, 100.0), (2, 100.5), (11, 110.0), (51, 150.0)):
        now[0] = at
        progress(done, 51)
    assert [" ".join(line) for line in lines(capsys)] == [
        "sample 2% 1 steps",
        "sample 22% 11 steps, 40 s left",
        "sample 100% 51 steps",
    ]


def test_a_training_shows_images_and_loss_and_never_more_than_all_images(capsys):
    Terminal().training(100, 0)({"images_seen": 128.0, "loss": 0.25})
    assert lines(capsys) == [["train", "100%", "100", "images,", "0/s,", "loss", "0.2500"]]


def test_a_breakdown_is_lines(capsys):
    Terminal().breakdown(TimeBreakdown("goodput", "title", {"productive": 3.0}, 3.0, ["all of it", "1 start"]))
    assert lines(capsys) == [["goodput", "all", "of", "it"], ["goodput", "1", "start"]]


def test_square_brackets_of_an_error_are_text(capsys):
    Terminal().error("error", ValueError("search.space[red] is wrong"))
    assert "search.space[red] is wrong" in capsys.readouterr().err


CHECKS = [
    ("ok", "python", "3.11.7", None),
    ("failed", "mlflow", "no answer from http://me:hush@ml [x]", "tracking.uri=http://HOST:PORT " + "and more " * 12),
]


def test_checks_are_a_line_each_where_there_is_no_terminal(capsys):
    Terminal().checks(CHECKS)
    first, second = capsys.readouterr().err.splitlines()
    assert first.split() == ["ok", "python:", "3.11.7"]
    assert second.lstrip().startswith(
        "failed  mlflow: no answer from http://***@ml [x]; fix: tracking.uri=http://HOST:PORT"
    )


def test_checks_fit_a_terminal_of_80_columns_and_are_all_there():
    terminal, shown = Terminal(), io.StringIO()
    terminal.console = Console(file=shown, force_terminal=True, width=80, color_system=None, soft_wrap=True)
    terminal.checks(CHECKS)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(shown.getvalue().split())
    assert "failed mlflow no answer from http://***@ml [x]" in text
    assert text.count("and more") == 12
