"""The plain lines that `Terminal` prints where stderr is no terminal."""

import io

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from pipelines.cli.terminal import Terminal
from pipelines.presentation.progress import NOT_WORKING, TimeBreakdown, TrainingStatus


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().err.splitlines()]


def test_control_characters_in_names_are_escaped(capsys):
    name = "cat/\x1b[31m\x07\x9b2J.png"
    Terminal().stage("left out", f"{name}: is damaged")
    Terminal().error("error", ValueError(f"{name} cannot be read\nwrite it again"))
    said = capsys.readouterr().err
    assert said.count("cat/\\x1b[31m\\x07\\x9b2J.png") == 2
    assert said.endswith("cannot be read\nwrite it again\n")
    assert not any(letter < " " and letter != "\n" for letter in said)


def test_a_counter_prints_its_first_and_its_last_value(capsys):
    progress = Terminal().counter("check", "MiB")
    for done in range(4):
        progress(done, 3)
    progress(3, 3)
    assert lines(capsys) == [["check", "0%", "0", "MiB"], ["check", "100%", "3", "MiB"]]


def test_a_counter_says_the_rate_and_how_long_the_rest_takes_once_it_can_tell(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pipelines.cli.terminal.time.monotonic", lambda: now[0])
    progress = Terminal().counter("sample", "steps")
    for done, at in ((1, 100.0), (2, 100.5), (11, 110.0), (51, 150.0)):
        now[0] = at
        progress(done, 51)
    assert [" ".join(line) for line in lines(capsys)] == [
        "sample 2% 1 step",
        "sample 22% 11 steps, 1.0/s, 40 s left",
        "sample 100% 51 steps",
    ]


def test_a_training_shows_images_and_loss_and_never_more_than_all_images(capsys):
    Terminal().training(100, 0)(TrainingStatus(128, loss=0.25))
    assert lines(capsys) == [["train", "100%", "100", "images,", "0/s,", "loss", "0.2500"]]


def test_a_training_shows_goodput_and_the_distance_of_the_checkpoint_that_was_scored_last(capsys):
    Terminal().training(100, 0)(TrainingStatus(50, 0.25, goodput=0.913, distance=3.14159, scored_at=1280))
    assert capsys.readouterr().err.split("loss 0.2500, ")[1] == "goodput 91%, distance 3.14 at 1,280\n"


def test_a_training_whose_length_was_corrected_is_shown_as_a_share_of_the_new_one(capsys):
    Terminal().training(100, 0)(TrainingStatus(50, 0.25, length=200))
    assert lines(capsys) == [["train", "25%", "50", "images,", "0/s,", "loss", "0.2500"]]


def on_a_terminal(**settings):
    terminal, shown = Terminal(), io.StringIO()
    terminal.console = Console(file=shown, force_terminal=True, width=80, **settings)
    return terminal, shown


def a_bright_and_a_dark_sample(size, channels):
    return np.stack([np.full((size, size, channels), level, np.uint8) for level in (255, 9)])


@pytest.mark.parametrize("size, channels", [(8, 1), (200, 3)])
def test_a_terminal_shows_the_newest_samples_below_the_bar(size, channels):
    terminal, shown = on_a_terminal(color_system="truecolor")
    with terminal.live():
        report = terminal.training(100, 0)
        report(TrainingStatus(10, 0.5))
        report(TrainingStatus(20, 0.25, goodput=0.5, samples=a_bright_and_a_dark_sample(size, channels)))
        report(TrainingStatus(30, 0.125))
    last = shown.getvalue().rpartition("loss 0.1250")[2]  # what was drawn before stays until there is something newer
    assert "38;2;255;255;255" in last
    assert "38;2;9;9;9" in last
    assert max(len(Text.from_ansi(line).plain) for line in last.splitlines()) <= 80


def test_a_terminal_without_colours_shows_no_samples():
    terminal, shown = on_a_terminal(color_system=None)
    with terminal.live():
        terminal.training(100, 0)(TrainingStatus(20, 0.25, samples=a_bright_and_a_dark_sample(8, 1)))
    assert "▀" not in shown.getvalue()
    assert "loss 0.2500" in shown.getvalue()


@pytest.mark.parametrize("force_terminal", [True, False])
def test_a_quiet_terminal_shows_errors_and_what_does_not_work_and_nothing_else(force_terminal):
    terminal, shown = Terminal(), io.StringIO()
    terminal.console = Console(file=shown, force_terminal=force_terminal, color_system=None, width=200)
    terminal.quiet = True
    with terminal.live():
        terminal.stage("train", "new run")
        terminal.training(100, 0)(TrainingStatus(100, 0.25, samples=a_bright_and_a_dark_sample(8, 1)))
        terminal.counter("sample", "images")(1, 1)
        terminal.breakdown(TimeBreakdown("goodput", "title", {"productive": 3.0}, 3.0, ["all of it"]))
        with terminal.services() as notice:
            notice("ray", "healthy")
        terminal.stage("train", f"{NOT_WORKING}the loss does not fall")
    terminal.error("error", ValueError("it ends here"))
    said = "train not working: the loss does not fall error it ends here"
    assert " ".join(shown.getvalue().split()) == said


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
