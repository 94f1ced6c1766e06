"""What `ddpm init` writes works: its commands are ones of this command line, its settings compose."""

from __future__ import annotations

import shlex
import subprocess

import pytest
import typer
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.cli.common import read_arguments
from pipelines.config import ConfigError, compose
from pipelines.config.starter import project_name, write_starter


def commands(folder, *targets, **variables):
    """Return the arguments of `ddpm` that make would run."""
    given = [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(["make", "-n", "-C", folder, *targets, *given], capture_output=True, text=True, check=True)
    return [words[1:] for line in done.stdout.splitlines() if (words := shlex.split(line))[:1] == ["ddpm"]]


def test_every_command_of_the_makefile_is_understood(tmp_path):
    write_starter(tmp_path / "my pets")
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = commands(tmp_path / "my pets", "doctor", "plan", "train", "samples", "page", "status", "stop")
    assert [words[0] for words in found] == ["doctor", "plan", "flow", "sample", "serve", "status", "down"]
    for verb, *arguments in found:
        verbs[verb].make_context(verb, arguments)  # raises on options and arguments that the verb does not have


def test_what_a_project_trains_composes_with_every_setting_that_its_file_proposes(tmp_path):
    folder = tmp_path / "pets"
    write_starter(folder)
    settings = folder / "settings.txt"
    proposed = [line.removeprefix("# ") for line in settings.read_text().splitlines() if "=" in line.split(" ")[-1]]
    assert len(proposed) >= 3
    settings.write_text("\n".join(line for line in proposed if not line.startswith("#")) + "\nmodel.heads = 6 \n")
    ((_, *arguments),) = commands(folder, "plan", BUDGET="2h")
    source, budget, overrides = read_arguments(arguments)
    assert (source, budget) == ("photos", "2h")
    config = compose(["data=folder", "data.num_classes=2", *[x for x in overrides if x != "model.heads = 6"]])
    assert (config.name, config.registry.model, config.data.image_size) == ("pets-2h", "pets", 64)
    assert "model.heads = 6" in overrides  # spaces in a setting stay in it


def test_the_readme_of_a_project_names_only_targets_that_there_are(tmp_path):
    write_starter(tmp_path / "pets")
    readme, makefile = ((tmp_path / "pets" / name).read_text() for name in ("README.md", "Makefile"))
    named = {line.split()[1] for line in readme.splitlines() if line.startswith("make ")}
    assert named == {"doctor", "plan", "train", "samples", "stop"}
    assert all(f"\n{name}: ##" in makefile for name in named)
    assert "@NAME@" not in readme + makefile


@pytest.mark.parametrize("there", ["file in it", "is a file"])
def test_a_folder_with_something_in_it_is_refused_and_left_alone(there, tmp_path):
    folder = tmp_path / "full"
    if there == "file in it":
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    else:
        folder.write_text("mine")
    with pytest.raises(ConfigError, match="name a new or an empty folder"):
        write_starter(folder)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [
        "mine.txt" if there == "file in it" else "full"
    ]


def test_init_says_what_it_wrote_and_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "pets"])
    assert done.exit_code == 0
    assert "cd pets && make plan" in " ".join(done.stderr.split())
    assert sorted(path.name for path in (tmp_path / "pets").iterdir()) == [
        ".gitignore",
        "Makefile",
        "README.md",
        "photos",
        "settings.txt",
    ]


def test_a_project_has_a_name_that_runs_may_have(tmp_path):
    assert project_name(tmp_path / "my pets!") == "my-pets"
    assert project_name(tmp_path / "…") == "pictures"
