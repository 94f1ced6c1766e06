"""What `ddpm serve` refuses before anything starts."""

import pytest

from pipelines.cli import main
from tests.pipelines.drawing import model_folder


@pytest.fixture
def ddpm(monkeypatch, capsys, tmp_path):
    """Run a command; return (exit code, stderr). Nothing may be started or made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ddpm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not (tmp_path / "home").exists()
        return stopped.value.code, " ".join(capsys.readouterr().err.split())

    return run


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "Missing argument"),
        (["serving.port=1"], 2, "name a model to serve: runs:/ID"),
        (["nowhere"], 1, "nowhere names no model; MODEL is runs:/ID"),
        (["empty"], 1, "is not a model folder: model.json is missing"),
        (["model", "serving.prot=1"], 2, "there is no 'prot' in serving. Allowed: batch_size"),
        (["model", "serving.port=70000"], 2, "serving.port"),
        (["model", "serving.prefix=/a/"], 2, "serving.prefix"),
        (["model", "serving.batch_size=0"], 2, "serving.batch_size"),
    ],
)
def test_a_mistake_is_named(ddpm, tmp_path, arguments, code, message):
    model_folder(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    found = ddpm("serve", *arguments)
    assert found[0] == code
    assert message in found[1]
