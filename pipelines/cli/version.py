"""`ddpm --version`."""

from __future__ import annotations

import typer


def show_version(asked: bool) -> None:
    """Print the versions of the package and of what it runs on, where they are asked for, and exit."""
    if not asked:
        return
    from pipelines.environment.lineage import installed_versions

    for name, version in installed_versions().items():
        typer.echo(f"{name} {version or ('not in a git checkout' if name == 'commit' else 'not installed')}")
    raise typer.Exit
