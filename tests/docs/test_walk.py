"""A stranger's walk: the commands of the README, copied out of it, one after another in an empty folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import stack
from tests.digits import write_digits
from tests.docs.modules import ROOT
from tests.docs.terminal import commands, section

README = (ROOT / "README.md").read_text()

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]


def test_the_first_steps_end_well_as_they_are_written(terminal):
    for command in commands(section(README, "First steps")):
        terminal.type(command)
    assert Image.open(terminal.folder / "samples" / "grid.png").size[0] > 0
    (report,) = terminal.folder.glob("report-*.html")
    assert report.stat().st_size > 100_000
    assert not [service.name for service in stack.status(terminal.folder / ".ddpm") if service.running]


BUDGET = ("budget=30m", "budget=6m")
"""What the README says, and what these small pictures take."""


def write_photos(folder: Path) -> None:
    """Write scanned digits into the two class folders of the README: even ones as cats, odd ones as dogs."""
    write_digits(folder, range(1797), lambda digit: "dog" if digit % 2 else "cat")
    (folder / "cat" / "0.png").rename(folder / "cat" / "1.png")  # the picture that the README names


def test_pictures_become_a_service(terminal):
    write_photos(terminal.folder / "photos")
    typed = [c.replace(*BUDGET) for c in commands(section(README, "From a folder of pictures to a service"))]
    assert sum(BUDGET[1] in command for command in typed) == 1
    verbs = [command.split()[1] for command in typed if command.startswith("ddpm ")]
    assert verbs == ["flow", "sample", "inpaint", "verify", "promote", "serve"]
    for command in typed:
        terminal.type(command)
    flow, promotion = (text for command, text in terminal.said.items() if command.split()[1] in ("flow", "promote"))
    assert "registry  models:/photos/1, alias champion passed" in flow
    assert "the alias champion is there already" in promotion
    assert len(list((terminal.folder / "samples").glob("*.png"))) == 2 * 8 + 1
    given = np.asarray(Image.open(terminal.folder / "photos" / "cat" / "1.png"))
    (filled,) = [path for path in (terminal.folder / "filled").glob("*.png") if path.name != "grid.png"]
    after = np.asarray(Image.open(filled))
    assert np.array_equal(after[:, after.shape[1] // 2 :], given[:, given.shape[1] // 2 :])
    assert not np.array_equal(after, given)
    served = np.asarray(Image.open(terminal.folder / "cat.png"))
    assert served.shape == given.shape
    assert served.std() > 10
