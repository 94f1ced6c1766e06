import io
import json

import pytest
import webdataset
from PIL import Image
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
        (["check"], 2, "Missing argument"),
        (["check", "data/birds"], 2, "data/birds is no address: write s3://BUCKET/PATH or file:///PATH"),
        (["check", "file:///nowhere", "--threads", "0"], 2, "--threads"),
        (["check", "file:///nowhere"], 1, "dataset.json is missing"),
        (["index", "birds"], 2, "birds is no address"),
        (["index", "file:///nowhere", "--split", "=x"], 2, "'=x' is no split: write NAME=PATTERN"),
        (["index", "file:///nowhere"], 1, "no *.tar at file:///nowhere"),
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


def run(monkeypatch, capsys, *arguments):
    """(exit code, last line of stdout, stderr) of a command."""
    monkeypatch.setattr("sys.argv", ["ddpm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    out = captured.out.splitlines()
    return stopped.value.code or 0, json.loads(out[-1]) if out else None, " ".join(captured.err.split())


def test_foreign_tars_are_indexed_checked_and_quarantined(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    for part in range(2):
        with webdataset.TarWriter(str(tmp_path / f"part-{part}.tar"), encoder=False) as writer:
            for i in range(3):
                writer.write({"__key__": f"{part}{i}", "png": picture.getvalue(), "cls": str(i).encode()})
    uri = f"file://{tmp_path}"
    code, answer, err = run(monkeypatch, capsys, "index", uri, "--json")
    assert (code, answer) == (1, None)
    assert "2 of 2 tars belong to no split: part-0.tar, part-1.tar" in err

    code, answer, err = run(monkeypatch, capsys, "index", uri, "--split", "train", "--classes", "a,b,c", "--json")
    assert code == 0
    assert (answer["samples"], answer["classes"], answer["image_size"]) == ({"train": 6}, ["a", "b", "c"], 8)
    assert f"train on it with data.uri={uri} data.image_size=8 data.channels=3 data.num_classes=3" in err
    assert "there is no split test" in err

    code, answer, err = run(monkeypatch, capsys, "check", uri + "/", "--json")
    assert (code, answer["clean"], answer["problems"]) == (0, True, [])

    shard = tmp_path / "part-1.tar"
    shard.write_bytes(shard.read_bytes()[:4096])
    code, answer, err = run(monkeypatch, capsys, "check", uri, "--quarantine", "--json")
    assert (code, answer["clean"], answer["quarantine"]["excluded"]) == (1, False, 1)
    assert {(p["shard"], p["sample"], p["kind"]) for p in answer["problems"]} == {
        ("part-1.tar", None, "truncated"),
        ("part-1.tar", "11", "lost"),
        ("part-1.tar", "12", "lost"),
    }
    assert "wrong part-1.tar (the shard) is cut short: 4,096 bytes, dataset.json says" in err
    assert "quarantine.json covers them: 1 entry" in err
