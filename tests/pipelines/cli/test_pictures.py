"""`ddpm sample`, `inpaint`, `edit`, `likelihood`, `export` and `import` on model folders, without services."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.model import load_model
from pipelines.cli import main
from tests.pipelines.drawing import model_folder, save_picture

NAMES = ("circle", "square", "a, b")


@pytest.fixture
def ddpm(monkeypatch, capsys, tmp_path):
    """Run a command; return (exit code, answer, stderr). A local stack must not be needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ddpm", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        out = captured.out.splitlines()
        assert not (tmp_path / "home").exists()
        return stopped.value.code or 0, json.loads(out[-1]) if out else None, " ".join(captured.err.split())

    return run


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path / "model", classes=NAMES)


def pixels(path):
    return np.asarray(Image.open(path))


def manifest(answer):
    with open(answer["manifest"]) as file:
        return json.load(file)


def test_sample_writes_what_its_options_say(ddpm, model):
    options = ["--labels", "square,0", "--seeds", "4,5", "--sampler", "dpm_solver", "--steps", 3, "--guidance", 3]
    more = ["--interval", "0.2,0.8", "--set", "clip=null", "--set", "threshold=0.9", "--film"]
    code, answer, err = ddpm("sample", model, "--out", "out", *options, *more)
    assert code == 0, err
    plain = manifest(answer)
    assert [(p["label"], p["seed"]) for p in plain["pictures"]] == [
        ("square", 4),
        ("circle", 4),
        ("square", 5),
        ("circle", 5),
    ]
    changed = {"kind": "dpm_solver", "steps": 3, "scale": 3.0, "interval": [0.2, 0.8], "clip": None, "threshold": 0.9}
    assert changed.items() <= plain["request"]["sampling"].items()
    assert [name.rpartition("/")[2] for name in answer["others"]] == ["film.png", "film.webp"]
    assert "sample 100% 3 steps" in err
    assert "4 images and out/grid.png" in err


def test_a_class_with_a_comma_in_its_name_is_one_class(ddpm, model):
    _, answer, _ = ddpm("sample", model, "--out", "out", "--labels", "a, b")
    assert [p["label"] for p in manifest(answer)["pictures"]] == ["a, b"]


def test_a_request_may_name_another_model_that_guides(ddpm, model, tmp_path):
    weak = model_folder(tmp_path / "weak", classes=NAMES, seed=1)
    settings = ["--set", "guidance=auto", "--set", f"weak={weak}", "--guidance", 3]
    code, answer, err = ddpm("sample", model, "--out", "guided", *settings)
    assert code == 0, err
    assert manifest(answer)["request"]["sampling"]["weak"] == str(weak)
    own = ddpm("sample", model, "--out", "own", "--guidance", 1)[1]
    assert any(not np.array_equal(pixels(a), pixels(b)) for a, b in zip(answer["files"], own["files"], strict=True))
    other = model_folder(tmp_path / "other", classes=("x",))
    code, _, err = ddpm("sample", model, "--out", "x", "--set", "guidance=auto", "--set", f"weak={other}")
    assert code == 1
    assert "does not go with the model: classes" in err


def test_an_interpolation_ends_at_the_samples_of_its_seeds(ddpm, model):
    _, between, _ = ddpm("sample", model, "--out", "a", "--labels", 0, "--interpolate", "1,2", "--frames", 3)
    _, ends, _ = ddpm("sample", model, "--out", "b", "--labels", 0, "--seeds", "1,2")
    for here, there in ((0, 0), (2, 1)):
        assert np.abs(pixels(between["files"][here]).astype(int) - pixels(ends["files"][there])).max() <= 1
    assert Image.open("a/interpolation.webp").n_frames == 4  # type: ignore[attr-defined]  # there and back


def test_inpaint_fills_and_shows_known_result_and_original(ddpm, model, tmp_path):
    given = [save_picture(tmp_path / f"{i}.png", seed=i) for i in range(2)]
    options = ["--steps", 5, "--resamplings", 2, "--jump-length", 1, "--mask", "half:left", "--mask", "box:0,0,2,2"]
    code, answer, err = ddpm("inpaint", model, *given, *options, "--out", "out")
    assert code == 0, err
    assert "inpaint 100% 9 steps" in err  # 5 + (2 - 1) * 4
    for path, image, where in zip(answer["files"], given, (np.s_[:, 4:], np.s_[2:, :]), strict=False):
        assert np.array_equal(pixels(path)[where], pixels(image)[where])
        assert not np.array_equal(pixels(path), pixels(image))
    plain = manifest(answer)
    assert plain["request"]["method"] == "repaint"
    assert (
        plain["request"]["method_settings"] | {"resamplings": 2, "jump_length": 1, "steps": 5}
        == (plain["request"]["method_settings"])
    )
    assert pixels(answer["grid"]).shape[1] == 3 * 52 + 4  # three columns of 48 pixels


def test_edit_goes_as_far_as_its_strength(ddpm, model, tmp_path):
    given, distances = save_picture(tmp_path / "given.png"), []
    for strength in (0, 0.5, 1):
        _, answer, _ = ddpm("edit", model, given, "--strength", strength, "--labels", "square", "--out", f"{strength}")
        distances.append(np.abs(pixels(answer["files"][0]).astype(int) - pixels(given)).mean())
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]
    options = ["--invert", "--source-labels", "0", "--labels", "0", "--strength", "1", "--steps", 50, "--guidance", 1]
    code, answer, err = ddpm("edit", model, given, *options, "--set", "clip=null", "--out", "inverted")
    assert code == 0, err
    assert np.abs(pixels(answer["files"][0]).astype(int) - pixels(given)).max() <= 3


@pytest.fixture
def photos(tmp_path):
    """Twelve images in folders of their classes, and as both splits of a dataset's source."""
    for i, name in enumerate(sorted(NAMES * 4)):
        for folder in ("photos", "source/train", "source/test"):
            save_picture(tmp_path / folder / name / f"{i:02d}.png", seed=i)
    return tmp_path / "photos"


def test_the_bound_is_about_the_same_from_a_dataset_and_from_the_folder_that_it_was_made_of(ddpm, photos, tmp_path):
    image = ["data.image_size=8", "data.channels=1", "data.num_classes=3", "data.geometry=keep"]
    code, _, err = ddpm("ingest", "source", "--to", f"file://{tmp_path}/shards", *image)
    assert code == 0, err
    model, means = model_folder(tmp_path / "sorted", classes=sorted(NAMES)), []
    for data in (f"file://{tmp_path}/shards", photos):
        code, answer, err = ddpm("likelihood", model, data, "--out", "out")
        assert code == 0, err
        assert "without a class" not in err
        bits, terms = answer["bits_per_dim"], json.loads(Path("out/likelihood.json").read_text())["terms"]
        assert (answer["images"], terms["timesteps"]) == (12, [*range(1, 51), 50])
        assert bits["low"] < bits["mean"] < bits["high"]
        assert sum(terms["bits_per_dim"]) == pytest.approx(bits["mean"])
        assert "plotly" in Path("out/terms.html").read_text()
        means.append(bits["mean"])
    assert means[0] == pytest.approx(means[1], rel=0.02)  # the shards have another order, and so other noise
    save_picture(photos / "triangle" / "x.png")
    assert "without a class" in ddpm("likelihood", model, photos, "--out", "out")[2]


def test_the_bits_by_the_ode_have_no_terms(ddpm, model, photos):
    code, answer, err = ddpm("likelihood", model, photos, "--method", "ode", "--images", 3, "--out", "out")
    assert code == 0, err
    plain = json.loads(Path("out/likelihood.json").read_text())
    assert "terms" not in plain
    assert plain["bits_per_dim"] == answer["bits_per_dim"]
    assert (plain["images"], len(plain["each"]), plain["method"]) == (3, 3, "ode")


def test_a_model_is_the_same_after_export_and_import(ddpm, model):
    assert ddpm("export", model, "--to", "there")[0] == 0
    code, answer, err = ddpm("import", "there", "--to", "back")
    assert code == 0, err
    assert answer["classes"] == list(NAMES)
    first, second = load_model(model), load_model(Path("back"))
    assert first.spec == second.spec
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["sample", "{model}", "--labels", "triangle"], 2, "no class 'triangle'; the model has: circle, square, a, b"),
        (["sample", "{model}", "--seeds", "1,x"], 2, "seeds.1 = 'x': Input should be a valid integer"),
        (
            ["sample", "{model}", "--interpolate", "1"],
            2,
            "interpolate.1 is missing: a request to sample needs",
        ),
        (["sample", "{model}", "--interval", "0.5"], 2, "interval must be 2 numbers in a list, got (0.5,)"),
        (["sample", "{model}", "--set", "clip"], 2, "write FIELD=VALUE"),
        (["sample", "{model}", "--prompt-file", "none.txt"], 2, "none.txt cannot be read"),
        (["sample", "{model}", "--prompts", "a red heart"], 2, "was not trained on text"),
        (["sample", "{model}", "--steps", "51"], 2, "steps must be in 1..50"),
        (["inpaint", "{model}", "none.png", "--mask", "half:left"], 2, "none.png cannot be read"),
        (["inpaint", "{model}", "none.png"], 2, "Missing option '--mask'"),
        (["edit", "{model}"], 2, "Missing argument"),
        (["edit", "{model}", "none.png", "--strength", "2"], 2, "Invalid value for '--strength'"),
        (["likelihood", "{model}", "nowhere"], 2, "nowhere has 0 images and no dataset.json"),
        (["likelihood", "{model}", "nowhere", "--method", "exact"], 2, "unknown method 'exact'; allowed: bound, ode"),
        (["import", "nowhere", "--to", "x"], 1, "model_index.json is missing"),
        (["export", "nowhere", "--to", "x"], 1, "names no model"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(ddpm, model, tmp_path, arguments, code, message):
    arguments = [a.format(model=model) for a in arguments]
    out = ["--out", "out"] if arguments[0] not in ("import", "export") else []
    found, answer, err = ddpm(*arguments, *out)
    assert (found, answer) == (code, None), err
    assert message in err
    assert not (tmp_path / "out").exists()
