"""The page on clusters names every setting of a launch, as the schema describes it."""

import json
from pathlib import Path

import pytest

from pipelines.config import AwsLaunch, KubeRayLaunch, RayLaunch

PAGE = (Path(__file__).parents[3] / "docs/clusters.md").read_text()


def shown(value: object) -> str:
    """A default as YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def rows(model) -> list[str]:
    """The rows of a table of the fields: name, default, meaning."""
    fields = {name: field for name, field in model.model_fields.items() if name != "kind"}
    return [
        f"| `{name}` | {'(needed)' if field.is_required() else shown(field.default)} | {field.description or ''} |"
        for name, field in fields.items()
    ]


@pytest.mark.parametrize("model", [KubeRayLaunch, AwsLaunch, RayLaunch])
def test_the_page_has_every_field_with_its_default_and_meaning(model):
    assert "\n".join(rows(model)) in PAGE, "\n".join(rows(model))


@pytest.mark.parametrize("model", [KubeRayLaunch, AwsLaunch, RayLaunch])
def test_every_field_is_described(model):
    assert [name for name, field in model.model_fields.items() if name != "kind" and not field.description] == []
