"""`ddpm config`: the composed configuration, explained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pipelines.cli.common import Json, answer_json
from pipelines.cli.terminal import print_grid

if TYPE_CHECKING:
    from pipelines.config.fields import ConfigChoice, Explained

EXPERIMENT = "experiment"
"""The only group of `conf/` that is not a section of the configuration."""


def config(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[GROUP|KEY] [OVERRIDES]...", help="A section or a field; Hydra overrides"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show settings: value, meaning, and origin. Example: ddpm config optim.lr +experiment=digits"""
    given = arguments or []
    keys = [text for text in given if "=" not in text and not text.startswith("~")]
    overrides = [text for text in given if text not in keys]
    if len(keys) > 1:
        raise typer.BadParameter(f"{' and '.join(keys)}: name one section or field, or none to see everything")
    key = keys[0] if keys else ""

    from pipelines.config.fields import choices, explain, kind_meanings, sections

    found = [] if key == EXPERIMENT else explain(overrides, key)
    files = choices(key)
    if not as_json:
        console = Console(highlight=False, soft_wrap=True)
        if len(found) == 1 and found[0].field.key == key:
            _show_one(console, found[0])
        else:
            shipped = {each.override for each in files}
            kinds = {name: says for name, says in kind_meanings(key).items() if f"{key}={name}" not in shipped}
            _show_section(console, sections().get(key, ""), files, kinds)
            _show_fields(console, found)
    answer = {"fields": [_plain(each) for each in found]}
    if files:
        answer["choices"] = [{"override": each.override, "meaning": each.meaning} for each in files]
    answer_json(as_json, answer)


def _show_one(console: Console, each: Explained) -> None:
    """Show everything about a field."""
    field = each.field
    value = f"not used: {each.unused}" if each.unused else written(each.value)
    console.print(Text.assemble((field.key, "bold cyan"), " = ", (value, "bold")))
    lines = [("meaning", field.meaning), ("from", each.origin), ("type", field.type), ("allowed", field.allowed)]
    lines.append(("default", "none, must be set" if field.required else written(field.default)))
    if field.kinds:
        lines.append(("only with", f"{field.key.rpartition('.')[0]}.kind = {' or '.join(field.kinds)}"))
    lines.append(("set it by", f"{field.key}=VALUE on the command line of train, flow and other verbs"))
    for name, text in lines:
        if text:
            console.print(Text.assemble((f"{name:>10}", "cyan"), f"  {text}"))


def _show_section(console: Console, meaning: str, files: list[ConfigChoice], kinds: dict[str, str]) -> None:
    """Show the meaning of a section or group, its files, and the kinds that have no file."""
    if meaning:
        console.print(Text(meaning))
    if files:
        console.print(Text("\nShipped files, chosen on the command line:"))
        _print_grid(console, [((each.override, "bold"), (each.meaning, "")) for each in files])
    if kinds:
        console.print(Text("\nKinds:"))
        _print_grid(console, [((name, "bold"), (text, "")) for name, text in kinds.items()])


def _show_fields(console: Console, found: list[Explained]) -> None:
    """Show fields: aligned and wrapped on a terminal, otherwise one line each."""
    if not found:
        return
    console.print()
    rows = [
        ((each.field.key, "cyan"), (written(each.value), "bold"), (each.origin, "dim"), (each.field.meaning, ""))
        for each in found
    ]
    _print_grid(console, rows)


def _print_grid(console: Console, rows: list[Any]) -> None:
    if not console.is_terminal:
        for row in rows:
            console.print(Text("  ".join(text for text, _ in row if text)))
        return
    print_grid(console, [[Text(text, style) for text, style in row] for row in rows], whole=1)


def written(value: Any) -> str:
    """Return a value in the syntax of overrides: null, true, [1,2], text without quotes."""
    return value if isinstance(value, str) and value else json.dumps(value, separators=(",", ":"))


def _plain(each: Explained) -> dict[str, Any]:
    field = each.field
    return {
        "key": field.key,
        "value": each.value,
        "from": each.origin or None,
        "type": field.type,
        "allowed": field.allowed or None,
        "default": field.default,
        "required": field.required,
        "meaning": field.meaning,
        "kinds": list(field.kinds) or None,
        "unused": each.unused or None,
    }
