"""The reference pages hold everything that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from pipelines.cli.app import app
from pipelines.config.fields import config_fields
from pipelines.evaluation.scores import LABELS
from pipelines.tracking.metric_names import METRICS
from tests.docs.modules import ROOT, load

reference = load("reference")
PAGES = reference.pages()


def test_every_field_of_the_configuration_is_on_its_page_with_its_meaning():
    page = PAGES["reference/configuration.md"]
    for field in config_fields():
        assert f"| `{field.key}` | " in page
        assert reference._text(field.meaning) in page


def test_every_verb_and_option_is_on_the_page_of_the_command_line_with_an_example():
    page = PAGES["reference/command-line.md"]
    verbs = dict(reference._commands(typer.main.get_command(app)))
    assert {"config", "init", "flow", "search guidance"} <= verbs.keys()
    for name, command in verbs.items():
        section = page.partition(f"## ddpm {name}\n")[2].partition("\n## ")[0]
        assert re.search(rf"```sh\nddpm {name}\b", section), name
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"{parameter.opts[0]}" in section, (name, parameter.opts)


def test_every_metric_that_the_code_logs_has_a_meaning_and_none_besides():
    found = set()
    for path in (ROOT / "pipelines").rglob("*.py"):
        if path.name != "metric_names.py":
            names = re.findall(r'f?"((?:train|updates|worker|eval|test|search)/[^"\s]+)"', path.read_text())
            found |= {re.sub(r"\{level[^}]*\}", "LEVEL", name) for name in names}
    named = {name for name in found if "{" not in name}
    scores = {f"eval/{name}" for name in LABELS}
    assert named <= METRICS.keys() | scores | {"search/frechet_distance"}
    assert METRICS.keys() - {"search/SCORE", "steps/CHOICE"} <= named
    for name in METRICS.keys() | scores:
        assert f"| `{name}` | " in PAGES["reference/metrics.md"]


def test_every_module_of_the_mathematics_that_users_import_is_on_a_page():
    shown = {name for names in reference.MODULES.values() for name in names}
    for name in shown:
        path = ROOT / "ddpm" / Path(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
    used = set()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        used |= set(re.findall(r"^from ddpm\.([\w.]+) import", path.read_text(), re.MULTILINE))
    assert all(any(f"{name}.".startswith(f"{module}.") for name in shown) for module in used), used - shown


@pytest.mark.parametrize("field", ["splits", "splits.NAME[].sha256", "excluded[].reason"])
def test_nested_fields_of_the_schema_are_listed_by_their_path(field):
    assert f"| `{field}` | " in PAGES["reference/dataset-json.md"]


def test_text_is_no_markup():
    assert reference._text("a_b [c] `d_e` | f") == r"a\_b \[c\] `d_e` \| f"
