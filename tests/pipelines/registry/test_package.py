import json
from dataclasses import replace
from importlib.metadata import version
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from ddpm.generate import Sampling, to_uint8
from ddpm.model import Model, load_model
from ddpm.models.classifier import NoisyClassifier
from ddpm.models.unet import UNet
from pipelines.checkpoints.references import Resolved
from pipelines.registry.evidence import Evidence, EvidenceError, code_files, requirements
from pipelines.registry.package import RegistryError, bundled_encoder, contents_of, register, write_version
from pipelines.registry.probe import ProbeError
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.quarantine import stream_digest
from pipelines.signing import Signer, Trust
from pipelines.storage import Storage
from tests.pipelines.registry.version import CONFIG, SAMPLING, SPEC, UNET, a_model, scores
from tests.pipelines.shards.tars import picture, write_shard


def written(folder, model=None, found=None, contents=()) -> Evidence:
    model, found = model or a_model(), found or scores()
    return write_version(folder, model, found, "m" * 64, "file:///data", Signer.of(CONFIG), training_data=contents)


def test_a_version_is_signed_and_serves_what_was_scored(home, tmp_path):
    scored = SAMPLING.with_fields(steps=2, scale=4.0)
    evidence = written(tmp_path, found=scores(scored))
    Trust.of(CONFIG).check_folder(tmp_path / "model", tmp_path / "model.sig")
    served = load_model(tmp_path / "model")
    assert served.spec.sampling == scored
    assert Evidence.read(tmp_path / "model") == evidence
    assert set(evidence.files) == {"model.json", "model.safetensors", "probe.safetensors"}
    assert evidence.lineage == {"images_seen": 7}


def test_its_pictures_are_those_that_it_draws(home, tmp_path):
    evidence = written(tmp_path)
    drawn = load_file(tmp_path / "model" / "probe.safetensors")
    assert drawn["labels"].tolist() == [0, 1] * 8
    again = load_model(tmp_path / "model").generate(drawn["labels"], seed=evidence.probe["seed"])
    assert torch.equal(to_uint8(again), drawn["images"])
    assert drawn["images"].unique().numel() > 10
    assert evidence.probe["torch"] == torch.__version__
    assert evidence.probe["capability"] == torch.backends.cpu.get_cpu_capability()


def test_a_model_without_classes_has_pictures_without_labels(home, tmp_path):
    torch.manual_seed(0)
    unet = replace(UNET, num_classes=0)
    spec = replace(SPEC, network=unet, classes=())
    written(tmp_path, Model(spec, UNet(unet).eval()), scores(Sampling.of(steps=2)))
    assert set(load_file(tmp_path / "model" / "probe.safetensors")) == {"images"}


@pytest.mark.parametrize("kind", ["auto", "classifier"])
def test_a_version_carries_the_network_that_guides_it(home, tmp_path, kind):
    if kind == "auto":
        parts, name = {"weak": a_model(1)}, "weak"
    else:
        parts, name = {"classifier": NoisyClassifier(UNET, 2).eval()}, "classifier"
    scored = scores(Sampling.of(steps=2, scale=2.0, guidance=kind, **{name: "runs:/abc"}))
    with pytest.raises(RegistryError, match=rf"name guidance\.{name} = runs:/abc, and the model was loaded without it"):
        written(tmp_path / "without", found=scored)
    evidence = written(tmp_path / "with", a_model(**parts), scored)
    assert {f"{name}/model.json", f"{name}/model.safetensors"} < set(evidence.files)
    drawn = load_file(tmp_path / "with" / "model" / "probe.safetensors")
    again = load_model(tmp_path / "with" / "model").generate(drawn["labels"], seed=0)
    assert torch.equal(to_uint8(again), drawn["images"])


@pytest.fixture
def encoder(tmp_path):
    folder = tmp_path / "encoder"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "1_Pooling/config.json", ".gitattributes"):
        (folder / name).write_text("{}")
    return folder


def text_model():
    torch.manual_seed(0)
    unet = replace(UNET, num_classes=0, text_dim=4)
    return Model(replace(SPEC, network=unet, classes=()), UNet(unet).eval())


def test_a_version_on_text_carries_its_encoder_and_asks_for_what_reads_it(home, tmp_path, encoder):
    plain = written(tmp_path / "plain")
    assert not [line for line in requirements(plain.packages) if line.startswith("sentence-transformers")]
    scored = scores(Sampling.of(steps=2))
    arguments = (text_model(), scored, "m" * 64, "file:///data", Signer.of(CONFIG))
    carried = write_version(tmp_path / "text", *arguments, bundled_encoder(str(encoder)))
    assert requirements(carried.packages)[-1] == f"sentence-transformers=={version('sentence-transformers')}"
    files = {name for name in carried.files if name.startswith("text_encoder/")}
    assert files == {"text_encoder/config.json", "text_encoder/1_Pooling/config.json"}
    Trust.of(CONFIG).check_folder(tmp_path / "text" / "model", tmp_path / "text" / "model.sig")
    by_name = write_version(tmp_path / "hub", *arguments, bundled_encoder("owner/name"))
    assert not [name for name in by_name.files if name.startswith("text_encoder/")]
    assert requirements(by_name.packages) == requirements(carried.packages)


def test_an_encoder_that_is_not_here_makes_no_version_on_text(encoder):
    assert bundled_encoder(None) is None
    with pytest.raises(RegistryError, match=r"text encoder /gone/model, which a version carries, .*data\.text_encoder"):
        bundled_encoder("/gone/model")


def test_what_a_version_serves_has_another_digest_with_other_weights_guides_or_settings(home, tmp_path):
    guided = scores(Sampling.of(steps=2, scale=2.0, guidance="auto", weak="runs:/abc"))
    made = [
        written(tmp_path / "1"),
        written(tmp_path / "2", a_model(1)),
        written(tmp_path / "3", found=scores(SAMPLING.with_fields(scale=3.0))),
        written(tmp_path / "4", a_model(weak=a_model(1)), guided),
        written(tmp_path / "5", a_model(weak=a_model(2)), guided),
    ]
    assert len({evidence.served_digest for evidence in made}) == 5
    again = written(tmp_path / "6", found=scores(evaluator_digest="other"))
    assert again.served_digest == made[0].served_digest


def test_a_model_whose_weights_are_not_numbers_becomes_no_version(home, tmp_path):
    model = a_model()
    with torch.no_grad():
        next(model.network.parameters()).fill_(torch.nan)
    with pytest.raises(ProbeError, match="pictures that are not numbers"):
        written(tmp_path, model)
    assert not (tmp_path / "model.sig").exists()


def test_a_model_of_a_folder_has_no_run_to_belong_to(home):
    with pytest.raises(RegistryError, match="has no MLflow run, to which a version belongs"):
        register(Resolved("folder", a_model()), "digits", scores(), "file:///data", Signer.of(CONFIG))


def test_code_has_another_digest_where_a_file_is_changed_added_or_renamed(tmp_path):
    package, served = tmp_path / "ddpm", tmp_path / "served_model.py"
    package.mkdir()
    (package / "a.py").write_text("a")
    served.write_text("s")

    def digest() -> str:
        return replace(evidence, code=code_files(package, served)).code_digest

    fields = {"scores": scores(), "lineage": {}, "model_digest": "m", "files": {}, "dataset_uri": "u"}
    evidence = Evidence(**fields, code={}, packages={}, probe={})
    seen = {digest()}
    for change in (
        lambda: (package / "a.py").write_text("b"),
        lambda: (package / "c.so").write_text(""),
        lambda: (package / "a.py").rename(package / "d.py"),
        lambda: served.write_text("t"),
    ):
        change()
        assert digest() not in seen
        seen.add(digest())
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "d.pyc").write_text("")
    assert digest() in seen


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"[]",
        b"\xff",
        {"files": ["a"]},
        {"code": {"a": 1}},
        {"scores": {}},
        {"scores": None},
        {"lineage": 1},
        {"more": 1},
        {"format": 9},
    ],
)
def test_evidence_that_somebody_has_damaged_says_so(home, tmp_path, change):
    text = written(tmp_path).to_json()
    damaged = change if isinstance(change, bytes) else json.dumps({**json.loads(text), **change}).encode()
    (tmp_path / "model" / "evidence.json").write_bytes(damaged)
    with pytest.raises(EvidenceError, match=r"evidence.json is (damaged|of another format).*register the model again"):
        Evidence.read(tmp_path / "model")


def test_evidence_reads_as_it_was_written(home, tmp_path):
    evidence = written(tmp_path)
    assert Evidence.from_json(evidence.to_json()) == evidence
    assert json.loads(evidence.tags()["sampling"]) == SAMPLING.to_json()


def test_what_the_training_data_hold_is_in_the_signed_evidence_and_makes_no_other_model(home, tmp_path):
    """A champion that is registered anew has to be known as the same model, though more is counted by then."""
    (tmp_path / "data").mkdir()
    entries = [each for i in range(6) for each in ((f"{i}.png", picture(i)), (f"{i}.cls", str(i % 2).encode()))]
    write_shard(tmp_path / "data/train-0.tar", entries)
    storage, display = Storage(), Mock()
    dataset = index_tars(f"file://{tmp_path}/data", storage).dataset
    lineage = {"dataset_uri": dataset.uri, "stream_digest": stream_digest(dataset, None)}
    contents = contents_of(lineage, storage, display)
    display.stage.assert_not_called()
    model = replace(a_model(), spec=replace(SPEC, lineage=lineage))
    evidence, without = (
        written(tmp_path / name, model, contents=each) for name, each in {"a": contents, "b": ()}.items()
    )
    (data,) = Evidence.read(tmp_path / "a" / "model").training_data
    assert (data["images"], data["classes"]) == ({"train": 6}, {"0": 3, "1": 3})
    assert evidence.content_digest == without.content_digest
    assert evidence.tags() == without.tags()


def test_evidence_of_an_earlier_release_says_nothing_of_the_training_data(home, tmp_path):
    plain = json.loads(written(tmp_path).to_json())
    assert plain.pop("training_data") == []
    assert Evidence.from_json(json.dumps(plain)).training_data == []


@pytest.mark.parametrize("lineage", [{}, {"dataset_uri": "file:///nowhere", "stream_digest": "s"}])
def test_data_of_which_nothing_is_recorded_or_that_are_gone_keep_no_model_from_being_registered(lineage):
    display = Mock()
    assert contents_of(lineage, Storage(), display) == []
    assert display.stage.called is bool(lineage)
