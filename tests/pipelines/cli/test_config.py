"""`ddpm config`, `ddpm --version` and shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app, main


def ddpm(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_one_field_is_shown_with_all_that_is_known_of_it():
    done = ddpm("config", "optim.lr", "+experiment=digits")
    assert done.exit_code == 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "optim.lr = 0.002"
    assert {"from conf/experiment/digits.yaml", "type number", "allowed > 0", "default 0.0002"} <= set(lines)


def test_a_section_is_shown_with_its_files_and_kinds():
    said = " ".join(ddpm("config", "schedule").stdout.split())
    assert "schedule=linear" in said
    assert "schedule.num_steps 1000 default Number of noising steps, T." in said
    assert "Squared-cosine alpha_bar" in said
    assert "+experiment=digits Handwritten digits" in " ".join(ddpm("config", "experiment").stdout.split())


def test_json_is_the_last_line_of_stdout():
    done = ddpm("config", "sampler", "sampler=heun", "--json")
    answer = json.loads(done.stdout.splitlines()[-1])
    values = {field["key"]: (field["value"], field["from"]) for field in answer["fields"]}
    assert values["sampler.kind"] == ("heun", "conf/sampler/heun.yaml")
    assert "sampler=ddim" in [choice["override"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["optim.lrr"], "Did you mean 'lr'?"),
        (["optim", "sampler"], "name one section or field"),
        (["optim", "optim.lr=fast"], "optim.lr"),
    ],
)
def test_a_mistake_ends_with_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ddpm", "config", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (2, "")
    assert message in " ".join(captured.err.split())


def test_versions_are_shown_without_importing_what_they_are_of():
    script = (
        "import sys; from typer.testing import CliRunner; from pipelines.cli.app import app; "
        "print(CliRunner().invoke(app, ['--version']).stdout); "
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.split("\n")[:-1]
    named = dict(line.split(" ", 1) for line in lines if line)
    assert imported == "[]"
    assert named.keys() == {"ddpm", "commit", "python", "torch", "ray", "mlflow"}
    assert named["python"] == sys.version.split()[0]


def test_the_shell_completes_verbs():
    words = {"COMP_WORDS": "ddpm con", "COMP_CWORD": "1", "_DDPM_COMPLETE": "complete_bash"}
    script = "from pipelines.cli.app import app; app(prog_name='ddpm')"
    environment = {**os.environ, **words}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["config"]
