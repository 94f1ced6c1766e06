"""The training images nearest to a sample: which they are, when it is taken for a copy, how often they were given."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm.memorisation import pixel_neighbours, relative_distance
from ddpm.model import save_model
from pipelines.checkpoints.references import Resolved
from pipelines.cli import main
from pipelines.config import compose
from pipelines.presentation.errors import ConfigError
from pipelines.provenance.find import Query
from pipelines.provenance.nearest import LEAST, nearest
from pipelines.provenance.neighbours import NEIGHBOURS, Found, NearestTar, picture_digest, small_copies
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.audit.recorded import IN_THREADS, stored_shards
from pipelines.shards.index import read_dataset
from pipelines.shards.quarantine import Problem, make_quarantine, read_quarantine, store_quarantine, stream_digest
from pipelines.storage import Storage
from tests.pipelines.provenance.logged import BATCH, config_of, given, id_of, train_logged
from tests.pipelines.provenance.test_find import encoded, photograph
from tests.pipelines.provenance.test_forget import forgotten
from tests.pipelines.registry.version import SPEC, a_model
from tests.pipelines.shards.tars import picture, write_shard
from tests.pipelines.shards.test_joined import write_source

STORAGE = Storage()
SIZE, SHARD = 32, 20
TEST = 1_000
"""The test images are the photographs from this number on."""


def write_photographs(folder, numbers, test=range(TEST, TEST + 120)):
    """Write tars of another tool, with photographs of these numbers for training; return the dataset."""
    folder.mkdir()
    for split, chosen in (("train", list(numbers)), ("test", list(test))):
        for first in range(0, len(chosen), SHARD):
            some = chosen[first : first + SHARD]
            entries = [(f"{first + i:04d}.png", encoded(photograph(number, SIZE))) for i, number in enumerate(some)]
            write_shard(folder / f"{split}-{first:04d}.tar", entries)
    return index_tars(f"file://{folder}", STORAGE).dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training images 0 to 79, of which number 7 is there three times."""
    return write_photographs(tmp_path_factory.mktemp("nearest") / "data", [*range(80), 7, 7])


def trained_on(*datasets, judge=None, **lineage):
    """A model that says it was trained on these data."""
    digests = [stream_digest(each, read_quarantine(each.uri, STORAGE)) for each in datasets]
    if len(datasets) > 1:
        sources = zip(datasets, digests, strict=True)
        lineage["sources"] = [{"uri": each.uri, "stream_digest": digest} for each, digest in sources]
    origin = {"dataset_uri": (judge or datasets[0]).uri, "stream_digest": digests[0], "images_seen": 100}
    model = a_model()
    return Resolved("a model", replace(model, spec=replace(SPEC, lineage=origin | lineage)))


def settings(root):
    return compose(["storage=file", f"storage.root=file://{root}", f"data.cache_dir={root}/cache", "tracking.uri=null"])


def asked(sample, resolved, root, reading=IN_THREADS):
    return nearest(Query.of_picture(sample, "a sample"), resolved, settings(root), lambda: reading)


def moved(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    return Image.fromarray(np.concatenate([pixels[:, 1:], pixels[:, -1:]], 1))


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(5).normal(0, 6, (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("change", [lambda image: image, ImageOps.mirror, moved, noisy])
def test_a_copy_is_taken_for_one_with_the_picture_and_every_sample_that_is_it(data, tmp_path, change):
    found = asked(encoded(change(photograph(7, SIZE))), trained_on(data), tmp_path)
    assert found.copy is True
    first = found.images[0]
    assert [each.key for each in first.samples] == ["0007", "0080", "0081"]
    assert {each.shard for each in first.samples} == {"train-0000.tar", "train-0080.tar"}
    assert np.array_equal(first.pixels, np.asarray(photograph(7, SIZE)))
    assert first.mirrored is (change is ImageOps.mirror)
    assert found.verdict().startswith("A COPY of 0007 of train-0000.tar")
    assert (found.searched, len(found.held_out), len(found.images)) == (82, 120, NEIGHBOURS)


def test_pictures_that_were_not_trained_on_are_taken_for_no_copies(data, tmp_path):
    held_out = [asked(encoded(photograph(number, SIZE)), trained_on(data), tmp_path) for number in range(2_000, 2_012)]
    assert [found.copy for found in held_out] == [False] * len(held_out)
    assert all(found.verdict().startswith("no copy: ") for found in held_out)
    test_image = asked(encoded(photograph(TEST + 3, SIZE)), trained_on(data), tmp_path)
    assert test_image.copy is False


def small(numbers):
    return small_copies([np.asarray(photograph(number, SIZE)) for number in numbers])


def test_tars_one_by_one_give_what_a_search_of_all_images_at_once_gives(data):
    images = small([7, 30, 2_000, TEST, TEST + 1])
    work = NearestTar(data.uri, STORAGE, {}, SIZE, 3, images)
    parts = [work(tar, lambda count: None) for tar in stored_shards(data, ["train"], STORAGE)[1]]
    digests = np.array([picture_digest(each) for each in small(range(80))], np.uint64)
    direct = pixel_neighbours(images, small(range(80)))
    for order in (parts, parts[::-1]):
        found = sum(order, Found.nothing(len(images)))
        assert np.allclose(found.distance, direct.distance, atol=1e-3)
        assert np.array_equal(found.digest, digests[direct.index])
        assert np.array_equal(found.mirrored, direct.mirrored)
        assert found.count == 82
        assert found.places.keys() == set(map(int, found.digest[0]))
        assert [i for _, _, i in sorted(found.places[int(found.digest[0, 0])])] == [7, 0, 1]


def test_the_measure_is_that_of_the_memorisation_test(data, tmp_path):
    found = asked(encoded(photograph(30, SIZE)), trained_on(data), tmp_path)
    direct = relative_distance(pixel_neighbours(small(range(TEST, TEST + 120)), small(range(80))).distance)
    assert np.allclose(np.sort(found.held_out), direct.sort().values, atol=1e-4)
    assert found.relative == 0


def test_samples_in_quarantine_were_not_trained_on_and_are_not_compared(tmp_path):
    dataset = write_photographs(tmp_path / "data", range(40))
    problems = [
        Problem("train-0000.tar", 7, "0007", "decode", ""),
        Problem("train-0020.tar", None, None, "corrupt", ""),
    ]
    store_quarantine(make_quarantine(dataset, problems), dataset.uri, STORAGE)
    found = asked(encoded(photograph(7, SIZE)), trained_on(dataset), tmp_path)
    assert (found.copy, found.searched, found.notes[:-1]) == (False, 19, ())
    before = trained_on(dataset)
    store_quarantine(make_quarantine(dataset, problems[1:]), dataset.uri, STORAGE)
    assert asked(encoded(photograph(7, SIZE)), before, tmp_path).searched == 19  # as it was when it was trained on
    changed = trained_on(dataset, stream_digest="d" * 64)
    now = asked(encoded(photograph(7, SIZE)), changed, tmp_path)
    assert (now.copy, now.searched) == (True, 20)
    assert "has changed since it was trained on" in now.notes[0]


def test_images_that_were_erased_since_are_said_not_to_be_compared(tmp_path, home):
    (tmp_path / "datasets").mkdir()
    uri = write_source(tmp_path / "datasets/one", ["cat", "dog"], np.arange(30), splits=("train", "test"))
    resolved = trained_on(read_dataset(uri, STORAGE))
    forgotten(tmp_path, 7, erase_bytes=True)
    found = asked(picture(7, mode="L"), resolved, tmp_path)
    assert f"1 image of {uri} cannot be compared: erased since" in found.notes
    assert {int(image.pixels[0, 0, 0]) for image in found.images} == {4, 5, 6, 8, 9, 10}
    assert found.searched == 29


def test_all_sources_of_a_mixture_are_compared_and_the_judge_has_the_test_images(data, tmp_path):
    planted = write_photographs(tmp_path / "planted", [5_000], test=())
    found = asked(encoded(photograph(5_000, SIZE)), trained_on(data, planted), tmp_path)
    assert (found.copy, found.searched, len(found.held_out)) == (True, 83, 120)
    assert [each.uri for each in found.images[0].samples] == [planted.uri]
    assert asked(encoded(photograph(5_001, SIZE)), trained_on(data, planted), tmp_path).copy is False


def test_too_few_test_images_say_nothing(tmp_path):
    some = write_photographs(tmp_path / "some", range(40), test=range(TEST, TEST + LEAST - 1))
    found = asked(encoded(photograph(7, SIZE)), trained_on(some), tmp_path)
    assert (found.copy, found.images[0].distance) == (None, 0)
    assert found.verdict() == f"not known: that needs {LEAST} test images, and there are {LEAST - 1}"
    one = write_photographs(tmp_path / "one", [7], test=())
    alone = asked(encoded(photograph(7, SIZE)), trained_on(one), tmp_path)
    assert (alone.copy, alone.relative, len(alone.images)) == (None, None, 1)
    assert "fewer than two different training images" in alone.verdict()


def test_where_the_test_images_are_in_the_training_data_an_exact_copy_says_nothing(tmp_path):
    dataset = write_photographs(tmp_path / "data", range(120), test=range(120))
    found = asked(encoded(photograph(7, SIZE)), trained_on(dataset), tmp_path)
    assert (found.copy, found.relative, found.level) == (False, 0, 1)


def test_the_counts_are_those_of_what_the_training_was_given(tmp_path):
    values = [3, 40, 80, 120, 160, 200, 240, 40]
    uri = write_source(tmp_path / "data", ["cat", "dog"], np.array(values), splits=("train", "test"))
    train_logged(tmp_path, config_of(tmp_path, 5, f"data.uri={uri}", "name=logged"))
    seen = 3 * BATCH
    lineage = {"run_id": id_of("logged"), "images_seen": seen}
    found = asked(picture(40, mode="L"), trained_on(read_dataset(uri, STORAGE), **lineage), tmp_path)
    log = [value for ordinal, value in given(tmp_path).items() if ordinal < seen]
    by_value = {int(image.pixels[0, 0, 0]): image for image in found.images}
    assert len(by_value) == NEIGHBOURS
    assert {value: image.times for value, image in by_value.items()} == {value: log.count(value) for value in by_value}
    assert [len(by_value[value].samples) for value in (40, 80)] == [2, 1]
    assert found.images[0].counted == f"given {log.count(40)} times"


@pytest.mark.parametrize(
    ("lineage", "says"),
    [({}, "no checkpoint of its training is stored"), ({"init_from": "models:/a/1"}, "began from models:/a/1, whose")],
)
def test_what_is_not_known_is_said(data, tmp_path, lineage, says):
    found = asked(encoded(photograph(7, SIZE)), trained_on(data, **lineage), tmp_path)
    assert any(says in note for note in found.notes)
    assert found.images[0].times is None
    assert "how often is not known" in found.verdict()


def test_a_model_that_does_not_say_its_data_is_refused_and_so_is_what_is_no_picture(data, tmp_path):
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        asked(encoded(photograph(7)), Resolved("folder", a_model()), tmp_path)
    with pytest.raises(ConfigError, match=r"--of compares a picture, and 0007 is none"):
        nearest(Query.parse("0007", STORAGE), trained_on(data), settings(tmp_path), lambda: IN_THREADS)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["ddpm", "seen", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_the_verb_writes_the_pictures_side_by_side(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HOME", str(tmp_path))
    model = trained_on(data).model
    save_model(tmp_path / "model", model.spec, model.network.state_dict())
    (tmp_path / "drawn.png").write_bytes(encoded(photograph(7, SIZE)))
    places = ["storage=file", f"storage.root=file://{tmp_path}", f"data.cache_dir={tmp_path}/cache"]
    assert not run(monkeypatch, "drawn.png", "--of", "model", *places, "--json")
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["copy"], answer["page"]) == (True, "nearest-drawn.html")
    assert answer["nearest"][0]["samples"][0] == {
        "uri": data.uri, "shard": "train-0000.tar", "index": 7, "key": "0007"
    }  # fmt: skip
    page = (tmp_path / "nearest-drawn.html").read_text()
    assert page.count("<img") == 1 + NEIGHBOURS
    assert answer["verdict"] in page
    assert set(re.findall(r'src="(?!data:)([^"]*)"', page)) == set()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--of", "model", "--exact"], "--exact: not with --of"),
        (["--page", "a.html"], "--page: only with --of MODEL"),
        (["--of", "model", "--page", "nowhere/a.html"], "there is no folder nowhere"),
        (["--of", "model"], "drawn.png: there is no such file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "drawn.png", *options, "storage=file", f"storage.root=file://{tmp_path}")
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
