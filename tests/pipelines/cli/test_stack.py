import json

import pytest

from pipelines.cli import main


def test_json_is_the_last_line_of_stdout(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["ddpm", "status", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    services = json.loads(capsys.readouterr().out.splitlines()[-1])["services"]
    assert [(name, s["running"]) for name, s in services.items()] == [("s3", False), ("mlflow", False), ("ray", False)]


@pytest.mark.parametrize("verb, line", [("status", "mlflow  not running"), ("doctor", "python: 3.")])
def test_the_result_of_a_verb_goes_to_stdout(monkeypatch, capsys, tmp_path, verb, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["ddpm", verb])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    assert line in said.out
    assert said.err == ""


@pytest.mark.parametrize(
    "arguments, said", [(["--ranks", "2"], "an option of --gpu"), (["--gpu", "seed=1"], "leave out seed=1")]
)
def test_the_doctor_of_gpus_has_options_of_its_own_and_no_settings(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["ddpm", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
