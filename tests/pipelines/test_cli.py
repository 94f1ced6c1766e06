import json

import pytest
from typer.testing import CliRunner

from pipelines.cli import app, main

VERBS = [command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb):
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    assert f"Example: ddpm {verb}" in " ".join(done.output.split())


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["train", "modle.width=3"], 2, "Did you mean 'model'?"),
        (["train", "optim.lr=fast"], 2, "optim.lr"),
        (["sample"], 2, "Missing argument"),
        (["trian"], 2, "No such command"),
        (["sample", "/nowhere", "--out", "x", "storage=file", "storage.root=file:///x"], 1, "names no model"),
    ],
)
def test_exit_codes_tell_bad_usage_from_failure(arguments, code, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ddpm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (code, "")
    assert message in " ".join(captured.err.split())


def test_json_is_the_last_line_of_stdout(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["ddpm", "status", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    services = json.loads(capsys.readouterr().out.splitlines()[-1])["services"]
    assert [(name, s["running"]) for name, s in services.items()] == [("s3", False), ("mlflow", False), ("ray", False)]
