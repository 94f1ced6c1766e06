"""The reference pages of the site as Markdown, from what the code itself knows: nothing of them is written by hand."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from pipelines.cli.app import app
from pipelines.cli.config import written
from pipelines.config.fields import ConfigField, choices, config_fields, explain, kind_meanings, sections
from pipelines.evaluation.scores import LABELS
from pipelines.tracking.metric_names import METRICS

DOCS = Path(__file__).parents[1]
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
}
"""Files outside docs/ that are pages of the site as well, with their paths there."""
MODULES = {
    "Noise and data": ["schedule", "gaussian", "noise", "conditioning", "masks"],
    "Training": [
        "prediction",
        "objectives",
        "weights",
        "timesteps",
        "noise_choice",
        "learned_weight",
        "muon",
        "consistency",
        "bound",
        "ema",
    ],
    "Networks": ["models.unet", "models.dit", "models.jit", "models.classifier", "models.base"],
    "Sampling": [
        "generate",
        "guidance",
        "samplers.base",
        "samplers.ancestral",
        "samplers.ddim",
        "samplers.dpm_solver",
        "samplers.dpm2",
        "samplers.heun",
        "samplers.unipc",
        "samplers.generalized",
        "samplers.predictor_corrector",
        "samplers.annealed_langevin",
        "samplers.repaint",
        "samplers.spacing",
        "samplers.consistency",
        "step_search",
        "step_learning",
    ],
    "Models and what they say": ["model", "inference.drawing", "likelihood", "memorisation", "settings", "choices"],
}
"""Modules of `ddpm` by page."""


def pages() -> dict[str, str]:
    """Return every page of the reference, by its path in the site."""
    found = {
        "reference/configuration.md": configuration(),
        "reference/command-line.md": command_line(),
        "reference/dataset-json.md": dataset_json(),
        "reference/metrics.md": metrics(),
        "reference/python.md": python_index(),
    }
    return found | {f"reference/python/{_slug(title)}.md": _python_page(title) for title in MODULES}


def configuration() -> str:
    """Return the page of every section and field of the configuration."""
    values = {each.field.key: each for each in explain()}
    parts = [
        "# Configuration",
        "Every setting of a run. `SECTION.FIELD=VALUE` on the command line sets a field, `SECTION=NAME` takes a "
        "shipped file, and `+experiment=NAME` takes a whole experiment. `ddpm config KEY [overrides]` shows the same "
        "with the values of a certain run, and which file or override each came from.",
        "*Value* is what a run has where nothing is set on the command line. Settings of a kind that such a run does "
        "not use have the default of that kind.",
        _table(
            ["experiment", "is"],
            [[f"`{each.override}`", _text(each.meaning)] for each in choices("experiment")],
        ),
    ]
    for section, meaning in sections().items():
        parts += [f"## {section or 'Fields at the top'}", _text(meaning)]
        files = [[f"`{each.override}`", _text(each.meaning)] for each in choices(section)] if section else []
        if files:
            parts.append(_table(["shipped file", "is"], files))
        fields = [f for f in config_fields() if f.key.rpartition(".")[0] == section]
        common = [field for field in fields if not field.kinds]
        parts.append(_table(["field", "value", "type", "meaning"], [_row(f, values) for f in common]))
        for kind, says in kind_meanings(section).items():
            own = [field for field in fields if kind in field.kinds]
            parts += [f"### {section}.kind={kind}", _text(says)]
            if own:
                parts.append(_table(["field", "value", "type", "meaning"], [_row(f, values) for f in own]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(field: ConfigField, values: Mapping[str, Any]) -> list[str]:
    now = values.get(field.key)
    used = now is not None and now.field == field
    value = written(now.value) if used else written(field.default)
    allowed = f": {field.allowed}" if field.allowed and field.type != "boolean" else ""
    return [f"`{field.key}`", f"`{value}`" if value else "", _text(f"{field.type}{allowed}"), _text(field.meaning)]


def command_line() -> str:
    """Return the page of every verb with its arguments, options and example."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        "`ddpm VERB --help` shows the same. Every verb takes `--json`, with which the last line of its output is one "
        "JSON object, and ends with 0, with 1 (failed) or with 2 (bad usage or configuration, before anything "
        "started). `ddpm --install-completion` makes the shell complete verbs and options; `ddpm --version` shows what "
        "is installed.",
        "MODEL is `models:/NAME@alias`, `models:/NAME/VERSION`, a folder, or a published checkpoint of a run: "
        "`runs:/ID`, `runs:/ID/IMAGES` or `runs:/ID/best`. OVERRIDES are settings of the "
        "[configuration](configuration.md).",
    ]
    for name, command in _commands(group):
        says, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
        shown, _, more = example.partition("\n")
        parts += [f"## ddpm {name}", _text(says.strip()), f"```sh\n{shown.strip()}\n```", _text(more.strip())]
        parts.append(_table(["argument or option", "meaning"], list(_parameters(command, name))))
    return "\n\n".join(part for part in parts if part) + "\n"


def _commands(group: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (name, command) of every verb, those of sub-groups with the group's name before theirs."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _parameters(command: Any, name: str) -> Iterable[list[str]]:
    """Yield (names, meaning) of each argument and option, in the words of `--help`."""
    context = typer.Context(command, info_name=f"ddpm {name}")
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in record[0]:
            yield [f"`{record[0]}`", _text(record[1])]


def dataset_json() -> str:
    """Return the page of `dataset.json` and the files beside it, from their JSON schema."""
    schema = json.loads((DOCS / "dataset.schema.json").read_text())
    parts = [
        "# dataset.json",
        "What lies beside the shards of a dataset. The [JSON schema](../dataset.schema.json) checks it; "
        "[Datasets](../datasets.md) says how it is made and read.",
    ]
    for name, part in {"dataset": schema, **schema.get("$defs", {})}.items():
        title = part.get("title", name)
        parts += [f"## {title}", _text(part.get("description", "")), _schema_table(part)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _schema_table(schema: Mapping[str, Any]) -> str:
    return _table(["field", "type", "required", "meaning"], list(_schema_rows(schema, "")))


def _schema_rows(schema: Mapping[str, Any], prefix: str) -> Iterable[list[str]]:
    properties = dict(schema.get("properties", {}))
    if isinstance(schema.get("additionalProperties"), Mapping):
        properties["NAME"] = schema["additionalProperties"]
    for name, part in properties.items():
        path = f"{prefix}{name}"
        required = "yes" if name in schema.get("required", ()) else ""
        yield [f"`{path}`", _text(_schema_type(part)), required, _text(_sentence(part.get("description", "")))]
        inner = part.get("items", {}) if part.get("type") == "array" else part
        if isinstance(inner, Mapping):
            yield from _schema_rows(inner, f"{path}[]." if part.get("type") == "array" else f"{path}.")


def _schema_type(part: Mapping[str, Any]) -> str:
    if "const" in part:
        return f"always {json.dumps(part['const'])}"
    if "enum" in part:
        return f"one of {', '.join(map(json.dumps, part['enum']))}"
    if "$ref" in part:
        return part["$ref"].rpartition("/")[2]
    kind = part.get("type", "any")
    words = " or ".join(kind) if isinstance(kind, list) else kind
    return f"array of {_schema_type(part['items'])}" if words == "array" and "items" in part else words


def metrics() -> str:
    """Return the page of every metric that a run, a score or a study records."""
    parts = ["# Metrics", "The names of what MLflow shows for a run. Steps of all curves are images seen."]
    scores = {f"eval/{name}": f"Score of drawn samples: {label}." for name, label in LABELS.items()}
    everything = scores | METRICS
    titles = {
        "eval": "Scores ([Evaluation](../evaluation.md) explains each)",
        "train": "Training",
        "updates": "Updates of the weights",
        "worker": "Worker of rank 0",
        "test": "Classifiers of noisy images",
        "search": "Studies",
        "steps": "Searches for steps",
    }
    for prefix, title in titles.items():
        rows = [[f"`{n}`", _text(m)] for n, m in everything.items() if n.startswith(f"{prefix}/")]
        parts += [f"## {title}", _table(["metric", "meaning"], rows)]
    return "\n\n".join(parts) + "\n"


def python_index() -> str:
    """Return the page that lists the modules of `ddpm`."""
    parts = [
        "# Python API",
        "`ddpm` is the mathematics in pure torch, and can be used without the rest. [Mathematics](../mathematics.md) "
        "lists what is in it by topic; the [tutorial](../tutorial/index.md) uses most of it.",
    ]
    for title, names in MODULES.items():
        rows = [[f"[`ddpm.{name}`](python/{_slug(title)}.md#ddpm.{name})", _text(_module_says(name))] for name in names]
        parts += [f"## {title}", _table(["module", "has"], rows)]
    return "\n\n".join(parts) + "\n"


def _module_says(name: str) -> str:
    path = DOCS.parent / "ddpm" / f"{name.replace('.', '/')}.py"
    text = (path if path.is_file() else path.with_suffix("") / "__init__.py").read_text()
    found = re.match(r'"""(.*?)("""|\n\n)', text, re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _python_page(title: str) -> str:
    return f"# {title}\n\n" + "\n\n".join(f"::: ddpm.{name}" for name in MODULES[title]) + "\n"


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if not text or text.endswith('.') else '.'}"


def _text(text: str) -> str:
    """Return plain text for Markdown: in one line, and nothing of it is markup but what is between backquotes."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    escaped = [part if part.startswith("`") else re.sub(r"([\\<>*_|\[\]])", r"\\\1", part) for part in parts]
    return "".join(escaped)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", r"\|") if "\\|" not in cell else cell for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
