"""The page on clusters names every setting of a launch, as the schema describes it."""

from pathlib import Path

import pytest

from pipelines.config import AwsLaunch, KubeRayLaunch, RayLaunch

PAGE = (Path(__file__).parents[3] / "docs/clusters.md").read_text()


def rows(model) -> list[str]:
    """The rows of a table of the fields: name, default, meaning."""
    found = []
    for name, field in model.model_fields.items():
        if name == "kind":
            continue
        default = (
            "(needed)"
            if field.is_required()
            else {None: "null", True: "true", False: "false"}.get(
                field.default if isinstance(field.default, bool | None) else 0, field.default
            )
        )
        found.append(f"| `{name}` | {default} | {field.description or ''} |")
    return found


@pytest.mark.parametrize("model", [KubeRayLaunch, AwsLaunch, RayLaunch])
def test_the_page_has_every_field_with_its_default_and_meaning(model):
    assert "\n".join(rows(model)) in PAGE, "\n".join(rows(model))


@pytest.mark.parametrize("model", [KubeRayLaunch, AwsLaunch, RayLaunch])
def test_every_field_is_described(model):
    assert [name for name, field in model.model_fields.items() if name != "kind" and not field.description] == []
