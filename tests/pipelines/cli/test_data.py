import io
import json

import pytest
import webdataset
from PIL import Image

from pipelines.cli import main


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

    code, answer, err = run(monkeypatch, capsys, "index", uri, "--split", "train", "--classes", "a, b,c", "--json")
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
