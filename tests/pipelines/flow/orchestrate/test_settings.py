import pytest

from pipelines.flow.orchestrate.settings import VARIABLE, OrchestrateSettings
from pipelines.presentation.errors import ConfigError
from pipelines.stack.orchestrator import SETTINGS


def test_a_file_changes_what_it_names_and_the_rest_stays(tmp_path):
    file = tmp_path / "orchestrate.yaml"
    file.write_text("partitions: {tiny: [+experiment=digits, images=1280]}\ncron: '@daily'\n")
    found = OrchestrateSettings.of({VARIABLE: str(file)})
    assert found == OrchestrateSettings(partitions={"tiny": ("+experiment=digits", "images=1280")}, cron="@daily")
    assert OrchestrateSettings.of({}) == OrchestrateSettings()


def test_the_settings_that_a_stack_shows_are_the_defaults(tmp_path):
    file = tmp_path / "orchestrate.yaml"
    file.write_text(SETTINGS)
    assert OrchestrateSettings.read(file) == OrchestrateSettings()
    shown = [line.removeprefix("# ").split("  #")[0] for line in SETTINGS.splitlines() if line.startswith("# ")]
    first = next(i for i, line in enumerate(shown) if line.startswith("partitions:"))
    file.write_text("\n".join(shown[first:]))
    assert OrchestrateSettings.read(file) == OrchestrateSettings()


@pytest.mark.parametrize(
    "text, message",
    [
        ("crom: '@daily'", r"crom: .*Allowed: partitions, launch, cron"),
        ("partitions: {}", "partitions: "),
        ("retries: -1", "retries: "),
        ("- digits", "settings are a mapping"),
        ("cron: [", "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_names_the_file_and_the_field(tmp_path, text, message):
    file = tmp_path / "orchestrate.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        OrchestrateSettings.read(file)
    assert str(file) in str(error.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        OrchestrateSettings.of({VARIABLE: str(tmp_path / "none.yaml")})
