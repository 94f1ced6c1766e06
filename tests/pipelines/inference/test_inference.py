"""Properties of the pictures that a request gives, of their files and of what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpm.model import load_model
from pipelines.checkpoints.references import Resolved
from pipelines.inference.files import PictureSource, file_name, grid_of, write, written_as_drawn
from pipelines.inference.inputs import read_images, read_mask
from pipelines.inference.pictures import encoder_of, picture
from pipelines.inference.request import (
    EditRequest,
    InpaintRequest,
    RequestError,
    SampleRequest,
    read_fields,
    read_request,
)
from tests.pipelines.drawing import CLASSES, WORDS, encode, model_folder, save_picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "classes": model_folder(root / "classes"),
        "plain": model_folder(root / "plain", classes=()),
        "painter": model_folder(root / "painter", inpaints=True),
        "text": model_folder(root / "text", classes=(), text_dim=WORDS),
        "colour": model_folder(root / "colour", channels=3),
    }


@pytest.fixture(scope="module")
def models(folders):
    return {name: load_model(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return save_picture(tmp_path_factory.mktemp("given") / "image.png")


def near(one, other):
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1


def read(path):
    return np.asarray(Image.open(path)).reshape(8, 8, -1)


def test_pictures_do_not_depend_on_the_size_of_a_batch(models, image):
    for request in (
        SampleRequest.of(count=2),
        InpaintRequest.of(images=[image], masks=["half:left"], count=3, method_settings={"steps": 4, "resamplings": 2}),
        EditRequest.of(images=[image], count=3, labels=["плюс"]),
    ):
        whole = picture(request, models["classes"]).pixels
        assert near(whole, picture(request.model_copy(update={"batch_size": 2}), models["classes"]).pixels)


def test_a_seed_of_a_row_gives_its_pictures_wherever_the_row_is(models):
    rows = picture(SampleRequest.of(seeds=[5, 6], labels=["a, b", 1]), models["classes"])
    assert [(r.label, r.seed, r.id) for r in rows.rows] == [
        ("a, b", 5, 0),
        ("../../up", 5, 0),
        ("a, b", 6, 0),
        ("../../up", 6, 0),
    ]
    alone = picture(SampleRequest.of(seeds=[6], labels=[1]), models["classes"])
    assert near(rows.pixels[3:], alone.pixels)
    assert near(picture(SampleRequest.of(seed=6, labels=[1]), models["classes"]).pixels, alone.pixels)
    assert not near(rows.pixels[1:2], alone.pixels)


def test_the_pictures_of_one_seed_are_numbered_over_all_classes(models):
    few = picture(SampleRequest.of(count=1), models["classes"])
    more = picture(SampleRequest.of(count=2), models["classes"])
    assert [row.label for row in more.rows] == [*CLASSES, *CLASSES]
    assert [row.id for row in more.rows] == list(range(10))
    assert near(more.pixels[:5], few.pixels)
    assert len(np.unique(more.pixels.reshape(10, -1), axis=0)) == 10
    assert len(picture(SampleRequest.of(count=3), models["plain"]).pixels) == 3


def test_an_interpolation_ends_at_the_pictures_of_its_seeds(models):
    between = picture(SampleRequest.of(interpolate=(3, 9), frames=4, labels=[0, 1]), models["classes"])
    ends = picture(SampleRequest.of(seeds=[3, 9], labels=[0, 1]), models["classes"])
    assert near(between.pixels[[0, 1, 6, 7]], ends.pixels)
    assert [round(row.fraction, 3) for row in between.rows] == [0, 0, 0.333, 0.333, 0.667, 0.667, 1, 1]


@pytest.mark.parametrize(
    "name, method", [("classes", "repaint"), ("classes", "replacement"), ("painter", None), ("painter", "trained")]
)
def test_known_pixels_are_kept_to_the_bit(models, image, tmp_path, name, method):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 1:7] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    settings = {} if name == "painter" else {"steps": 5}
    for written in (str(tmp_path / "mask.png"), "box:1,2,6,3"):
        request = InpaintRequest.of(images=[image], masks=[written], method=method, method_settings=settings, count=2)
        found = picture(request, models[name])
        assert np.array_equal(found.hidden[0], mask > 0)
        kept = ~found.hidden[0]
        assert all(np.array_equal(result[kept], read(image)[kept]) for result in found.pixels)
        assert not near(found.pixels[0], read(image))


def test_one_image_is_filled_within_each_of_several_masks(models, image, tmp_path):
    settings = {"steps": 4, "resamplings": 2}
    halves, notices = ["half:left", "half:right"], []
    request = InpaintRequest.of(images=[image], masks=halves, labels=[0, 1], count=2, method_settings=settings)
    found = picture(request, models["classes"], notice=notices.append)
    twice = request.model_copy(update={"images": (image, image)})
    assert np.array_equal(found.pixels, picture(twice, models["classes"]).pixels)
    assert [row.image for row in found.rows] == [0, 1, 0, 1]
    assert np.array_equal(found.hidden[0], ~found.hidden[1])
    written = write(found, tmp_path, PictureSource("x", "y", None, {}, {}))
    assert near(picture(read_request(written.manifest), models["classes"]).pixels, found.pixels)
    wide = save_picture(tmp_path / "wide.png", 16, 8)
    picture(request.model_copy(update={"images": (wide,)}), models["classes"], notice=notices.append)
    assert len(notices) == 1
    with pytest.raises(RequestError, match="3 labels, 1 images, 2 masks: give as many of each"):
        picture(InpaintRequest.of(images=[image], masks=halves, labels=[0, 1, 2]), models["classes"])


def test_a_method_without_a_sampler_refuses_what_only_a_sampler_has(models, image):
    painted = {"images": [image], "masks": ["half:top"], "method_settings": {"resamplings": 1, "jump_length": 1}}
    own = models["classes"].spec.sampling.to_json()
    request = InpaintRequest.of(**painted, sampling={"steps": 4, "kind": own["kind"], "scale": 1.5})
    assert picture(request, models["classes"]).request.method_settings["steps"] == 4  # type: ignore[attr-defined]
    other = "heun" if own["kind"] != "heun" else "ddim"
    with pytest.raises(
        RequestError, match="repaint takes the steps of a sampler's settings, and not kind: leave that out"
    ):
        picture(InpaintRequest.of(**painted, sampling={"steps": 4, "kind": other}), models["classes"])
    picture(
        InpaintRequest.of(images=[image], masks=["half:top"], sampling={"steps": 4, "kind": other}), models["painter"]
    )


def test_the_method_follows_what_the_model_was_trained_for(models, image):
    default = InpaintRequest.of(images=[image], masks=["half:top"], method_settings={"steps": 4})
    assert picture(default, models["classes"]).request.method == "repaint"  # type: ignore[attr-defined]
    trained = InpaintRequest.of(images=[image], masks=["half:top"])
    assert picture(trained, models["painter"]).request.method == "trained"  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match=r"not trained for inpainting .* use the method replacement or repaint"):
        picture(InpaintRequest.of(images=[image], masks=["half:top"], method="trained"), models["classes"])


def test_an_edit_of_no_strength_is_the_image_and_more_strength_changes_more(models, image):
    changes = []
    for strength in (0, 0.3, 1):
        found = picture(EditRequest.of(images=[image], strength=strength), models["classes"]).pixels[0]
        changes.append(np.abs(found.astype(int) - read(image)).mean())
    assert changes[0] == 0
    assert 0 < changes[1] < changes[2]


def test_an_inversion_with_the_images_own_class_gives_the_image_back(models, image):
    sampling = {"steps": 50, "scale": 1, "clip": None}
    own = EditRequest.of(images=[image], invert=True, strength=1, source_labels=[2], labels=[2], sampling=sampling)
    found = picture(own, models["classes"]).pixels[0].astype(int)
    assert np.abs(found - read(image)).max() <= 3
    other = picture(own.model_copy(update={"labels": (0,)}), models["classes"]).pixels[0]
    assert np.abs(other.astype(int) - read(image)).max() > 3


def test_prompts_are_embedded_and_a_negative_one_moves_away(models):
    request = SampleRequest.of(prompts=["a red heart", "two"], count=2)
    found = picture(request, models["text"], encode=encode)
    assert [row.prompt for row in found.rows] == ["a red heart", "two"] * 2
    alone = picture(SampleRequest.of(prompts=["two"], seeds=[0]), models["text"], encode=encode)
    same = picture(SampleRequest.of(prompts=["a red heart", "two"], seeds=[0]), models["text"], encode=encode)
    assert near(same.pixels[1:], alone.pixels)
    away = picture(request.model_copy(update={"negative_prompt": "a blue square"}), models["text"], encode=encode)
    assert not near(away.pixels, found.pixels)


@pytest.mark.parametrize("kind", ["sample", "interpolate", "inpaint", "replacement", "trained", "edit", "invert"])
def test_a_manifest_draws_its_pictures_again(folders, models, image, tmp_path, kind):
    wide = save_picture(tmp_path / "wide.png", 20, 12, mode="RGB")
    painted = {"images": [image, wide], "masks": ["half:left", "box:1,1,3,3"]}
    request = {
        "sample": SampleRequest.of(labels=["a, b", "3"], count=2, seed=7, sampling={"kind": "ancestral", "steps": 5}),
        "interpolate": SampleRequest.of(labels=[0], interpolate=(1, 2), frames=3),
        "inpaint": InpaintRequest.of(**painted, count=2, seed=3, sampling={"steps": 6}),
        "replacement": InpaintRequest.of(**painted, method="replacement", seeds=[4], method_settings={"steps": 5}),
        "trained": InpaintRequest.of(**painted, labels=["0", "1"]),
        "edit": EditRequest.of(images=[image, wide], strength=0.7, labels=["a, b"], count=2, sampling={"eta": 0.5}),
        "invert": EditRequest.of(images=[image], invert=True, source_labels=[0], labels=[1]),
    }[kind]
    name = "painter" if kind == "trained" else "classes"
    resolved = Resolved(str(folders[name]), models[name])
    found = picture(request, models[name])
    written = write(found, tmp_path / "out", PictureSource.of(resolved))
    again = picture(read_request(written.manifest), models[name])
    assert np.array_equal(again.pixels, found.pixels)
    assert all(np.array_equal(read(p), image) for p, image in zip(written.files, found.pixels, strict=True))
    plain = json.loads(written.manifest.read_text())
    assert plain["request"]["sampling"] == found.request.sampling
    assert {"kind", "steps", "scale", "interval", "guidance", "clip"} <= plain["request"]["sampling"].keys()
    assert [p["file"] for p in plain["pictures"]] == [path.name for path in written.files]
    assert len(plain["model"]["digest"]) == 64
    assert {"code_version", "git_commit", "torch", "device"} <= plain["versions"].keys()
    assert written.grid.exists()


@pytest.mark.parametrize("kind", ["one class", "two classes", "inpaint", "edit"])
def test_a_grid_is_about_as_wide_as_high_whatever_it_shows(models, image, kind):
    steps = {"steps": 2}
    request = {
        "one class": SampleRequest.of(labels=[0], count=9, sampling=steps),
        "two classes": SampleRequest.of(labels=[0, 3], count=16, sampling=steps),
        "inpaint": InpaintRequest.of(images=[image], masks=["half:left"], count=12, method_settings=steps),
        "edit": EditRequest.of(images=[image], strength=0.5, count=16, sampling=steps),
    }[kind]
    height, width, _ = grid_of(picture(request, models["classes"])).shape
    assert 0.6 * height < width < 1.4 * height


def test_pictures_are_written_batch_by_batch_and_a_manifest_says_that_all_are_there(folders, models, tmp_path):
    out, seen, write_batch = tmp_path / "out", [], written_as_drawn(tmp_path / "out")

    def watch(first, rows, pixels):
        write_batch(first, rows, pixels)
        seen.append(len(list(out.glob("0*.png"))))
        assert not (out / "manifest.json").exists()

    request = SampleRequest.of(count=1, batch_size=2)
    for _ in range(2):  # an earlier manifest is taken away
        pictures = picture(request, models["classes"], finished=watch)
        early = {path.name: path.read_bytes() for path in out.glob("0*.png")}
        source = PictureSource.of(Resolved(str(folders["classes"]), models["classes"]))
        written = write(pictures, out, source, as_drawn=True)
        assert {path.name: path.read_bytes() for path in written.files} == early
        assert written.manifest.exists()
    assert seen[:3] == [2, 4, 5]


def test_files_of_any_class_lie_in_the_folder_and_can_be_told_apart(folders, models, tmp_path):
    resolved = Resolved(str(folders["classes"]), models["classes"])
    written = write(
        picture(SampleRequest.of(count=1, film=True), models["classes"]), tmp_path / "out", PictureSource.of(resolved)
    )
    everything = [*written.files, written.grid, written.manifest, *written.others]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in everything)
    assert [path.name for path in written.files[:4]] == [
        "00000-cat%2Fdog.png",
        "00001-..%2F..%2Fup.png",
        "00002-a, b.png",
        "00003-плюс.png",
    ]
    assert [path.name for path in written.others] == ["film.png", "film.webp"]
    assert Image.open(written.others[1]).n_frames == 4  # type: ignore[attr-defined]  # as many as there are steps


def test_an_ordinary_name_stays_as_it_is():
    assert file_name("maine coon") == "maine coon"
    assert file_name("a%2Fb") != file_name("a/b")
    assert len(file_name("é" * 300).encode()) <= 200


def test_labels_are_separated_by_commas_unless_a_class_is_named_so():
    for field in ("labels", "source_labels"):
        assert read_fields(EditRequest, {field: "a, b"}, CLASSES) == {field: ["a, b"]}
        assert read_fields(EditRequest, {field: "cat/dog, 1"}, CLASSES) == {field: ["cat/dog", "1"]}


def test_a_request_from_a_manifest_is_embedded_by_the_encoder_that_the_model_carries(tmp_path, monkeypatch):
    model = load_model(model_folder(tmp_path, classes=(), text_dim=WORDS, text_encoder="/gone/model"))
    resolved, opened = Resolved(str(tmp_path), model, text_encoder="/carried/model"), []

    def open_encoder(name, digest=None):
        opened.append(name)
        return encode

    monkeypatch.setattr("pipelines.inference.pictures.TextEncoder", open_encoder)
    asked = SampleRequest.of(prompts=["a red heart"])
    first = picture(asked, model, encode=encoder_of(resolved, asked))
    assert first.request.text_encoder == "/gone/model"
    again = picture(first.request, model, encode=encoder_of(resolved, first.request))
    assert near(again.pixels, first.pixels)
    other = asked.model_copy(update={"text_encoder": "/other"})
    picture(other, model, encode=encoder_of(resolved, other))
    assert opened == ["/carried/model", "/carried/model", "/other"]


def test_given_images_are_brought_to_the_models_form_and_that_is_said(models, tmp_path):
    said = []
    wide = save_picture(tmp_path / "wide.png", 40, 24, mode="RGBA")
    found = picture(EditRequest.of(images=[wide], strength=0), models["colour"], notice=said.append)
    assert found.pixels.shape == (1, 8, 8, 3)
    assert "RGBA made RGB" in said[0]
    assert "central square of 24x40 pixels, resized from 24 to the model's 8 pixels" in said[0]
    exact = save_picture(tmp_path / "exact.png", mode="RGB")
    picture(EditRequest.of(images=[exact], strength=0), models["colour"], notice=said.append)
    assert len(said) == 1


def test_images_and_masks_are_brought_to_a_form_that_is_not_square(tmp_path):
    tall, said = np.zeros((30, 16, 3), np.uint8), []
    tall[9:21] = 200  # the central part of 12x16
    Image.fromarray(tall).save(tmp_path / "tall.png")
    Image.fromarray(np.where(np.arange(30)[:, None] < 15, 255, np.zeros(16)).astype(np.uint8)).save(tmp_path / "m.png")
    (given,) = read_images([tmp_path / "tall.png"], (3, 6, 8), said.append)
    assert given.pixels.shape == (6, 8, 3)
    assert (given.pixels == 200).all()
    assert "cut to the central 12x16 pixels of 30x16 pixels, resized from 12x16 to the model's 6x8 pixels" in said[0]
    upper = read_mask(str(tmp_path / "m.png"), given, (3, 6, 8))
    assert np.array_equal(upper, np.arange(6)[:, None] < np.full(8, 3))
    assert np.array_equal(read_mask("half:top", given, (3, 6, 8)), upper)
    assert read_mask("box:1,0,7,6", given, (3, 6, 8)).sum() == 42
    with pytest.raises(RequestError, match="images, 8 pixels wide and 6 high"):
        read_mask("box:0,0,6,8", given, (3, 6, 8))


def test_a_mask_of_the_size_of_the_given_image_is_cut_as_the_image_is(models, tmp_path):
    wide, mask = save_picture(tmp_path / "wide.png", 32, 16), np.zeros((16, 32), np.uint8)
    mask[:8, 8:16] = 255  # the upper left quarter of the central square
    mask[:, :8] = 255  # outside of it
    Image.fromarray(mask).save(tmp_path / "mask.png")
    request = InpaintRequest.of(images=[wide], masks=[str(tmp_path / "mask.png")], method_settings={"steps": 3})
    hidden = picture(request, models["classes"]).hidden[0]
    assert hidden[:4, :4].all()
    assert hidden.sum() == 16


@pytest.mark.parametrize("task", ["edit", "inpaint"])
def test_an_image_whose_exif_is_damaged_is_taken_as_upright(models, tmp_path, task):
    path, said = tmp_path / "image.webp", []
    Image.new("RGB", (16, 8), "red").save(path, lossless=True, exif=b"Exif\0\0MM\0\x13\0\0\0\x08")
    mask = tmp_path / "mask.png"
    Image.fromarray(np.eye(8, 16, dtype=bool)).save(mask)
    request = {
        "edit": EditRequest.of(images=[path], strength=0),
        "inpaint": InpaintRequest.of(images=[path], masks=[str(mask)], method_settings={"steps": 3}),
    }[task]
    found = picture(request, models["colour"], notice=said.append)
    assert (found.originals[0] == [255, 0, 0]).all()
    assert "EXIF is damaged, taken as upright, cut to the central square of 8x16 pixels" in said[0]


def test_a_mask_is_turned_as_its_exif_says_and_its_16_bits_are_scaled(models, image, tmp_path):
    mask, exif = np.zeros((8, 8), np.uint16), Image.Exif()
    mask[:, :4] = 65535  # the left half, which turns to the top
    mask[:, 4:] = 300  # nearly black
    exif[0x0112] = 6
    Image.fromarray(mask).save(tmp_path / "mask.png", exif=exif)
    request = InpaintRequest.of(images=[image], masks=[str(tmp_path / "mask.png")], method_settings={"steps": 3})
    hidden = picture(request, models["classes"]).hidden[0]
    assert hidden[:4].all()
    assert hidden.sum() == 32


@pytest.mark.parametrize(
    "kind, given, message",
    [
        (SampleRequest, {"count": 0}, "count = 0: Input should be greater than or equal to 1"),
        (SampleRequest, {"seed": -1}, "seed = -1"),
        (SampleRequest, {"colour": "red"}, "colour: no such field of a request to sample; there are: labels, prompts"),
        (SampleRequest, {"seeds": [1, 2], "count": 3}, "2 seeds and a count of 3: give only one"),
        (SampleRequest, {"interpolate": [1, 2], "count": 3}, "leave seeds and count out"),
        (
            EditRequest,
            {"images": ["x.png"], "strength": 1.5},
            "strength = 1.5: Input should be less than or equal to 1",
        ),
        (EditRequest, {"images": ["x.png"], "source_labels": [1]}, "for an inversion"),
        (EditRequest, {"images": []}, "images = "),
        (InpaintRequest, {"images": ["x.png"]}, "masks"),
        (
            InpaintRequest,
            {"images": ["x.png"], "masks": ["half:left"], "method": "magic"},
            "unknown inpainting method 'magic'",
        ),
    ],
)
def test_a_request_that_is_wrong_by_itself_is_refused_before_a_model_is_read(kind, given, message):
    with pytest.raises(RequestError) as raised:
        kind.of(**given)
    assert message in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "name, request_of, message",
    [
        ("classes", lambda p: SampleRequest.of(labels=["cat"]), "no class 'cat'; the model has: cat/dog"),
        ("plain", lambda p: SampleRequest.of(labels=["0"]), "has no classes: leave the labels out"),
        ("classes", lambda p: SampleRequest.of(prompts=["a cat"]), "not trained on text (model.text_dim), leave it"),
        (
            "text",
            lambda p: SampleRequest.of(prompts=["a cat"]),
            "does not say which text encoder embedded its training data",
        ),
        (
            "text",
            lambda p: SampleRequest.of(prompts=["a"], text_encoder="/nowhere"),
            "cannot load the text encoder '/nowhere'",
        ),
        (
            "classes",
            lambda p: SampleRequest.of(labels=[0, 1, 2], prompts=["a", "b"]),
            "3 labels, 2 prompts: give as many of",
        ),
        (
            "classes",
            lambda p: SampleRequest.of(sampling={"steps": 51}),
            "steps must be in 1..50 for this model, got 51",
        ),
        (
            "classes",
            lambda p: SampleRequest.of(sampling={"stepps": 5}),
            "stepps: no setting of sampling; there are: steps",
        ),
        ("classes", lambda p: SampleRequest.of(sampling={"kind": "dpm"}), "unknown sampler 'dpm'; allowed: ddim"),
        ("classes", lambda p: SampleRequest.of(sampling={"scale": "much"}), "scale must be a number, got 'much'"),
        (
            "classes",
            lambda p: SampleRequest.of(count=10**8),
            "500,000,000 pictures are too many for one call, at most 16,777,216",
        ),
        ("classes", lambda p: EditRequest.of(images=[p / "none.png"]), "none.png cannot be read: No such file"),
        ("classes", lambda p: EditRequest.of(images=[p / "text.png"]), "text.png is not an image of a known kind"),
        (
            "classes",
            lambda p: EditRequest.of(images=[p / "8.png"], invert=True, sampling={"kind": "heun"}),
            "inversion needs deterministic steps",
        ),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"], masks=[str(p / "7x5.png")]),
            "7x5.png is 5x7 (height x width): it must have the size of",
        ),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"], masks=[str(p / "text.png")]),
            "is not an image of a known",
        ),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"], masks=["none.png"]),
            "cannot be read: No such file or",
        ),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"], masks=["box:1,2,9,1"]),
            "within the model's images, 8 pixels wide",
        ),
        ("classes", lambda p: InpaintRequest.of(images=[p / "8.png"], masks=["box:1,2"]), "write box:X,Y,WIDTH,HEIGHT"),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"], masks=["half:middle"]),
            "one of left, right, top, bott",
        ),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"], masks=["box:0,0,8,8"]),
            "8.png hides every pixel",
        ),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"] * 3, masks=["half:left"] * 2),
            "3 images, 2 masks: give as many",
        ),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"], masks=["half:left"], method_settings={"steps": 60}),
            "steps must be in 1..50",
        ),
        (
            "classes",
            lambda p: InpaintRequest.of(images=[p / "8.png"], masks=["half:left"], method_settings={"jumps": 6}),
            "jumps: no setting of a method of inpainting; there are: steps, spacing, timesteps, variance, jump_length",
        ),
    ],
)
def test_a_request_that_a_model_cannot_answer_says_what_it_can(models, tmp_path, name, request_of, message):
    save_picture(tmp_path / "8.png")
    save_picture(tmp_path / "7x5.png", 7, 5)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(RequestError) as raised:
        picture(request_of(tmp_path), models[name])
    assert message in str(raised.value)


def test_a_file_that_is_no_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"request": {"task": "paint"}}')
    with pytest.raises(RequestError, match="is no manifest of pictures"):
        read_request(tmp_path / "manifest.json")
