import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm.generate import Sampling
from pipelines.checkpoints import ModelError
from pipelines.cli import main
from pipelines.registry import RegistryError, Trust, verify
from pipelines.registry import probe as probe_module
from pipelines.registry.evidence import Evidence, code_files
from pipelines.registry.probe import ProbeError, compare, redraw
from pipelines.registry.verify import check_data
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.erase import erase
from pipelines.shards.erased import ImageFile
from pipelines.shards.forgotten import Forgetting, quarantine_forgotten, record_forgetting
from pipelines.shards.index import make_dataset, read_dataset
from pipelines.shards.quarantine import Problem, make_quarantine, read_quarantine, store_quarantine, stream_digest
from pipelines.signing import Authority
from pipelines.storage import Storage
from tests.pipelines.checkpoints.tiny import DATASET
from tests.pipelines.registry.version import CONFIG, Version, a_model, a_version, scores
from tests.pipelines.shards.tars import picture, write_shard

CHECKS = ["signature", "evidence", "weights", "settings", "code", "data", "stream", "pictures"]
HERE = {"device": "cpu", "torch": "2", "capability": "AVX2", "processor": "x", "threads": 1}


@pytest.fixture
def dataset(tmp_path):
    content = {name: getattr(DATASET, name) for name in ("splits", "classes", "channels", "image_size", "mean", "std")}
    made = make_dataset(f"file://{tmp_path}/data", **content)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(made.to_json())
    return made


@pytest.fixture
def complete(version, dataset) -> Version:
    """A version that was scored on data that is there."""
    return version.sign(
        lambda evidence: replace(
            evidence,
            dataset_uri=dataset.uri,
            scores=replace(evidence.scores, dataset_digest=dataset.digest, stream_digest=dataset.digest),
        )
    )


def look(version: Version):
    return verify(str(version.folder), tracking_uri=None, storage=Storage(), trust=Trust.of(CONFIG))


def failed(version: Version) -> dict[str, str]:
    return {row.name: row.figure for row in look(version).rows if not row.passed}


def test_a_version_as_it_was_made_passes_and_is_left_as_it_was(complete):
    before = {path: path.read_bytes() for path in complete.folder.rglob("*") if path.is_file()}
    found = look(complete)
    assert [row.name for row in found.rows] == CHECKS
    assert (found.passed, found.failed) == (True, ())
    assert found.rows[-1].figure == "all 1,024 pixels are equal"
    assert found.rows[-1].bound == "equal, as on the same machine"
    assert {path: path.read_bytes() for path in complete.folder.rglob("*") if path.is_file()} == before


def test_the_pictures_are_drawn_by_the_code_of_the_version(complete):
    path = complete.folder / "code" / "ddpm" / "generate.py"
    path.write_text(
        path.read_text().replace(".to(torch.uint8).permute(0, 2, 3, 1)", ".to(torch.uint8).permute(0, 3, 2, 1)")
    )
    code = code_files(complete.folder / "code" / "ddpm", complete.folder / "served_model.py")
    changed = complete.sign(lambda evidence: replace(evidence, code=code))
    told = failed(changed)
    assert set(told) == {"pictures"}
    assert "pixels differ, by up to" in told["pictures"]


def test_pictures_by_other_code_than_that_of_the_version_do_not_count(complete):
    (complete.folder / "code" / "ddpm").rename(complete.folder / "code" / "elsewhere")
    probe = {"seed": 0, "count": 16, "threads": 1}
    with pytest.raises(ProbeError, match=r"ddpm/__init__\.py.* was used, which is not the version's"):
        redraw(complete.folder, complete.inside, probe)


def test_code_that_draws_nothing_any_more_is_not_waited_for(complete, monkeypatch):
    monkeypatch.setattr(probe_module, "REDRAW_S", 0.3)
    path = complete.folder / "code" / "ddpm" / "__init__.py"
    path.write_text(f"{path.read_text()}\nimport time\n\ntime.sleep(60)\n")
    with pytest.raises(ProbeError, match="has drawn nothing for 0 minutes"):
        redraw(complete.folder, complete.inside, {"seed": 0, "count": 16, "threads": 1})


@pytest.mark.parametrize("signed", [True, False])
def test_code_for_which_nobody_vouches_is_not_run(complete, tmp_path, signed):
    path = complete.folder / "code" / "ddpm" / "__init__.py"
    path.write_text(f"{path.read_text()}\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    if not signed:
        (complete.folder / "artifacts" / "model.sig").unlink()
    told = failed(complete)
    assert told["code"] == "code/ddpm/__init__.py is another"
    assert told["pictures"].startswith("not drawn" if signed else "not looked at")
    assert not (tmp_path / "ran").exists()


def test_an_unsigned_version_has_no_word_on_data_and_pictures(complete):
    (complete.folder / "artifacts" / "model.sig").unlink()
    assert set(failed(complete)) == {"signature", "data", "pictures"}


def test_weights_that_are_not_numbers_draw_nothing_that_passes(complete):
    path = complete.inside / "model.safetensors"
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(path).items()}, path)
    told = failed(complete.sign())
    assert told == {"pictures": "the packaged code draws nothing: RuntimeError: its pictures are not numbers"}


def test_other_weights_that_are_signed_draw_other_pictures(complete):
    path = complete.inside / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    assert "pixels differ" in failed(complete.sign())["pictures"]


def with_pixels(version: Version, count: int, by: int, **probe) -> Version:
    """With recorded pictures that differ from those that it draws, recorded elsewhere."""
    path = version.inside / "probe.safetensors"
    tensors = load_file(path)
    flat = tensors["images"].view(-1)
    inner = ((flat > 5) & (flat < 250)).nonzero()[:count, 0]
    flat[inner] += by
    save_file(tensors, path)
    return version.sign(lambda evidence: replace(evidence, probe={**evidence.probe, **probe}))


def test_under_another_release_of_torch_one_pixel_in_a_thousand_may_differ_by_one_level(complete):
    (told,) = [row for row in look(with_pixels(complete, 1, 1, torch="1.0")).rows if row.name == "pictures"]
    assert told.figure.startswith("1 of 1,024 pixels differ, by up to 1 grey level (torch 1.0 -> ")
    assert (told.bound, told.passed) == ("within 1 grey level, at most 1 pixel in 1,000", True)


@pytest.mark.parametrize(
    "count, by, passes", [(0, 0, True), (4, 1, True), (5, 1, False), (1, 2, False), (1, -1, True), (4, -1, True)]
)
@pytest.mark.parametrize("name", HERE)
def test_pictures_of_another_machine_are_nearly_equal(name, count, by, passes):
    recorded = torch.full((4, 32, 32, 1), 128, dtype=torch.uint8)
    drawn = recorded.clone()
    drawn.view(-1)[:count] += by if by >= 0 else 256 + by
    elsewhere = compare(drawn, recorded, {**HERE, name: "other"}, HERE)
    assert elsewhere.passed is passes
    assert compare(drawn, recorded, HERE, HERE).passed is (count == 0)


def test_another_number_of_pictures_is_no_comparison():
    with pytest.raises(ProbeError, match="of shape"):
        compare(torch.zeros(2, 8, 8, 1), torch.zeros(3, 8, 8, 1), HERE, HERE)


def test_a_version_that_a_weaker_model_guides_draws_its_pictures(home, tmp_path, dataset):
    settings = Sampling.of(steps=2, scale=2.0, guidance="auto", weak="runs:/abc")
    found = scores(settings, dataset_digest=dataset.digest, stream_digest=dataset.digest)
    made = a_version(tmp_path / "v", a_model(weak=a_model(1)), found, dataset.uri)
    assert failed(made) == {}
    path = made.inside / "weak" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    assert failed(made)["weights"] == "weak/model.safetensors is another"


def data(version: Version, storage: Storage | None = None, trust: Trust | None = None) -> dict[str, tuple[str, bool]]:
    rows = check_data(Evidence.read(version.inside), storage or Storage(), trust or Trust.of(CONFIG))
    return {row.name: (row.figure, row.passed) for row in rows}


def test_data_that_is_as_it_was_passes(complete, dataset):
    assert data(complete) == {
        "data": (f"digest {dataset.digest[:12]} at {dataset.uri}", True),
        "stream": (f"digest {dataset.digest[:12]}, no quarantine", True),
    }


def test_data_that_is_gone_or_damaged_does_not_pass(complete, tmp_path):
    for content, told in ((None, "no dataset at file://"), ("{", "is damaged"), ('{"schema_version": 9}', "version 9")):
        (tmp_path / "data" / "dataset.json").unlink()
        if content is not None:
            (tmp_path / "data" / "dataset.json").write_text(content)
        ((figure, passed),) = data(complete).values()
        assert (told in figure, passed) == (True, False)
        (tmp_path / "data" / "dataset.json").touch()


def test_other_data_at_the_same_place_does_not_pass(complete, dataset, tmp_path):
    content = {name: getattr(dataset, name) for name in ("splits", "channels", "image_size", "mean", "std")}
    other = make_dataset(dataset.uri, classes=tuple("abcdefghij"), **content)
    (tmp_path / "data" / "dataset.json").write_text(other.to_json())
    assert data(complete) == {
        "data": (f"digest {other.digest[:12]} at {dataset.uri}", False),
        "stream": (f"digest {other.digest[:12]}, no quarantine", False),
    }


def test_another_quarantine_does_not_pass(complete, dataset, tmp_path):
    quarantine = make_quarantine(dataset, [Problem("train-000000.tar", 1, "k", "decode", "cut")])
    (tmp_path / "data" / "quarantine.json").write_text(quarantine.to_json())
    found = data(complete)
    assert found["data"][1]
    assert found["stream"] == (f"digest {stream_digest(dataset, quarantine)[:12]}, 1 quarantined", False)


@pytest.mark.parametrize("trusted", [True, False])
def test_data_from_which_somebody_who_is_trusted_erased_samples_passes(version, home, tmp_path, trusted):
    (tmp_path / "pictures").mkdir()
    write_shard(tmp_path / "pictures/train-0.tar", [(f"{n}.png", picture(n)) for n in range(4)])
    dataset = index_tars(f"file://{tmp_path}/pictures", Storage()).dataset
    first = make_quarantine(dataset, [Problem("train-0.tar", 0, "0", "decode", "cut")])
    store_quarantine(first, dataset.uri, Storage())
    digests = {"dataset_digest": dataset.digest, "stream_digest": stream_digest(dataset, first)}
    scored = version.sign(
        lambda evidence: replace(evidence, dataset_uri=dataset.uri, scores=replace(evidence.scores, **digests))
    )
    assert all(passed for _, passed in data(scored).values())
    record_forgetting(Forgetting((ImageFile.of(picture(2)),), "2026-01-01", ""), dataset.uri, Storage())
    quarantine_forgotten(dataset, Storage())
    erase(dataset.uri, [("train-0.tar", 2, "2")], Storage(), Authority.of(CONFIG), at="2026-01-01", notice=str)
    found = data(scored, trust=Trust.of(CONFIG) if trusted else Trust())
    assert {name: passed for name, (_, passed) in found.items()} == {"data": trusted, "stream": trusted}
    assert (f"which is {dataset.digest[:12]} without what was erased" in found["data"][0]) is trusted
    now = read_dataset(dataset.uri, Storage())
    more = make_quarantine(now, [*read_quarantine(now.uri, Storage()).excluded, replace(first.excluded[0], index=1)])
    store_quarantine(more, now.uri, Storage())
    assert not data(scored)["stream"][1]  # that it stays out was not for what was erased


def test_a_storage_that_is_away_says_so_and_does_not_pass(complete, tmp_path, monkeypatch, no_pauses_of_boto):
    monkeypatch.setattr(sys.modules["pipelines.registry.verify"], "PATIENCE_S", 0.0)
    away = complete.sign(lambda evidence: replace(evidence, dataset_uri="s3://bucket/data"))
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    ((figure, passed),) = data(away, Storage("http://127.0.0.1:9", str(tmp_path / "credentials"), "us-east-1")).values()
    assert (figure.startswith("cannot be reached: s3://bucket/data"), passed) == (True, False)


def test_what_is_no_version_says_what_is(tmp_path):
    def of(reference: str):
        return verify(reference, tracking_uri=None, storage=Storage(), trust=Trust())

    with pytest.raises(RegistryError, match="MLmodel is missing"):
        of(str(tmp_path))
    with pytest.raises(ModelError, match="needs an MLflow server"):
        of("models:/digits/1")


def ddpm(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["ddpm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_command_shows_every_check_and_fails_where_one_does(complete, monkeypatch, capsys):
    folder, storage = str(complete.folder), ["storage=file", "storage.root=file:///nowhere"]
    assert ddpm(monkeypatch, "verify", folder, "--json", *storage) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    assert (answer["passed"], answer["failed"], [row["name"] for row in answer["rows"]]) == (True, [], CHECKS)
    for name in CHECKS:
        assert f"ok  {name}: " in captured.err
    (complete.folder / "requirements.txt").write_text("evil==1\n")
    assert ddpm(monkeypatch, "verify", folder, *storage) == 1
    err = capsys.readouterr().err
    assert "failed  code: requirements.txt is another" in err
    assert f"{folder} failed: code, pictures" in err
