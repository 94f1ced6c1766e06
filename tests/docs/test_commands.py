"""Every `ddpm` command of the README and the pages is one of this command line, and its settings compose."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import typer
import yaml

from pipelines.cli.app import app
from pipelines.cli.common import read_arguments
from pipelines.cli.serving import is_override
from pipelines.config import Config, compose, groups
from pipelines.config.fields import config_fields
from pipelines.flow.orchestrate.settings import OrchestrateSettings
from pipelines.launch import overrides_of
from pipelines.search.study_config import StudyConfig, compose_study
from tests.docs import terminal
from tests.docs.modules import ROOT, load

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
NEEDED = load("experiments").NEEDED
LEFT_OUT = ["model=unet_small"]
"""What a command whose data or network are known from elsewhere (a plan, a project) does not say."""


def commands(page: str) -> Iterator[str]:
    """Yield what a page has after `ddpm`, as one line each; what is left out of one, by "…", nobody could run."""
    for command in terminal.commands((ROOT / page).read_text()):
        if command.startswith("ddpm ") and "…" not in command.partition(" #")[0]:
            yield command.removeprefix("ddpm ")


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the verb of a command and its parameters; raises on options that the verb does not have."""
    command, name, rest = typer.main.get_command(app), [], list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name.append(rest.pop(0))
        assert name[-1] in command.commands, f"there is no `ddpm {' '.join(name)}`"
        command = command.commands[name[-1]]
    return " ".join(name), dict(command.make_context(name[-1], rest).params)


def check_settings(verb: str, given: dict[str, Any]) -> None:
    """Compose the configuration of a command, as its verb does; raises where it cannot."""
    overrides = list(given.get("overrides") or [])
    if verb in ("flow", "plan"):
        source, _, overrides = read_arguments(given["arguments"])
        overrides += [f"data.source={source}"] if source else []
    elif verb == "serve":
        overrides = [word for word in given["arguments"] if is_override(word)]
    elif verb == "config":
        overrides = [word for word in given["arguments"] or [] if "=" in word]
    elif verb == "launch":
        target, words = given["target"], list(given["words"] or [])
        looks = given["stop"] or given["status"]
        image = ["launch.image=none"] if looks and target != "ray" else []
        overrides = [f"launch={target}", *image, *(words if looks else overrides_of(words))]
    if verb.startswith("search ") and verb.partition(" ")[2] in ("guidance", "training"):
        compose_study(given["space"], verb.partition(" ")[2], overrides)
        return
    _compose((*_left_out(overrides), *overrides))


@cache
def _compose(overrides: tuple[str, ...]) -> Config:
    """Compose what several commands share once."""
    return compose(overrides)


def _left_out(overrides: Sequence[str]) -> list[str]:
    """Return what has to be set for a command to compose and is known from elsewhere when it runs."""
    keys = {word.partition("=")[0] for word in overrides}
    experiment = next((word.partition("=")[2] for word in overrides if word.startswith("+experiment=")), None)
    needed = [*NEEDED.get(experiment or "", [])]
    if experiment is None and ("data=folder" in overrides or any(key.startswith("data.image_size") for key in keys)):
        needed += ["data.num_classes=2", *([] if keys & {"model"} else LEFT_OUT)]
    return [word for word in needed if word.partition("=")[0] not in keys]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_understood_and_its_settings_compose(page):
    wrong = []
    for command in commands(page):
        try:
            check_settings(*parsed(shlex.split(command, comments=True)))
        except Exception as error:  # noqa: BLE001 - every wrong command of the page is to be named
            wrong.append(f"ddpm {command}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


SETTINGS = {field.key for field in config_fields()} | {f"search.{name}" for name in StudyConfig.model_fields}


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_a_page_gives_a_value_in_its_text_is_one(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    given = [
        key
        for code in re.findall(r"`([^`\n]+)`", text)
        for key in re.findall(r"(?:^|\s)([a-z_]+(?:\.[a-z_]+)+)(?==)", code)
    ]
    assert set(given) <= SETTINGS, set(given) - SETTINGS


def test_pages_have_commands_which_are_looked_at():
    assert sum(len(list(commands(page))) for page in PAGES) > 100
    for page in GUIDES:
        assert page.name == "index.md" or len(list(commands(str(page.relative_to(ROOT))))) >= 3, page.name


@pytest.mark.parametrize(
    "command, message",
    [
        ("train +experiment=digits modle.width=3", "Did you mean 'model'"),
        ("train --no-such-option", "No such option"),
        ("fly", "there is no `ddpm fly`"),
        ("serve models:/digits/1 storage=s3", "storage.root"),
        ("search guidance --model a --space schedule", "is for `ddpm search training`"),
        ("launch --target kuberay train +experiment=none launch.image=x", "no 'none' in experiment"),
    ],
)
def test_a_wrong_command_is_found(command, message):
    with pytest.raises(Exception, match=message):
        check_settings(*parsed(shlex.split(command)))


def test_what_a_page_has_dagster_train_composes():
    blocks = [
        block
        for page in ("docs/guides/retraining.md", "docs/orchestration.md")
        for block in re.findall(r"^```yaml\n(partitions:.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    ]
    assert len(blocks) == 2
    for block in blocks:
        for overrides in OrchestrateSettings.model_validate(yaml.safe_load(block)).partitions.values():
            compose(overrides)


def test_every_guide_says_its_goal_what_is_seen_and_what_to_do_when_it_fails():
    index = (ROOT / "docs" / "guides" / "index.md").read_text()
    for page in GUIDES:
        if page.name != "index.md":
            text = page.read_text()
            assert all(part in text for part in ("**Goal.** ", "```sh\n", "**What you see.** ", "**When it fails.**"))
            assert f"]({page.name})" in index


def test_every_experiment_that_a_page_names_is_shipped():
    named = {name for page in PAGES for name in re.findall(r"\+experiment=([a-z0-9_]+)", (ROOT / page).read_text())}
    assert named <= set(groups()["experiment"]), named - set(groups()["experiment"])
