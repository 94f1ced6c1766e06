import json
from dataclasses import replace

import pytest
import yaml

from ddpm.model import load_model, save_model
from pipelines.registry.contents import check_version, signature_file
from pipelines.signing import Signer, Trust
from tests.pipelines.registry.version import CONFIG, a_model, a_version, scores


def rows(version, tags=None, trust=None):
    evidence, found = check_version(version.folder, version.tags if tags is None else tags, trust or Trust.of(CONFIG))
    return evidence, {row.name: row for row in found}


def failed(version, **given) -> dict[str, str]:
    return {name: row.figure for name, row in rows(version, **given)[1].items() if not row.passed}


def test_a_version_as_it_was_made_passes_every_check(version):
    evidence, found = rows(version)
    assert [row.name for row in found.values() if row.passed] == [
        "signature", "evidence", "tags", "weights", "settings", "code",
    ]  # fmt: skip
    assert found["signature"].figure.startswith("by the key ")
    assert evidence.tags() == version.tags


def test_settings_that_have_gained_a_field_since_do_not_make_a_version_another(home, tmp_path):
    later = ("precision", "compile")
    recorded = {name: value for name, value in scores().sampling.items() if name not in later}
    older = a_version(tmp_path / "older", a_model(), replace(scores(), sampling=recorded))
    assert not any(name in older.tags["sampling"] for name in later)
    assert failed(older) == {}
    assert json.loads(rows(older)[0].tags()["scores"])["sampling"] == recorded


def test_a_folder_has_no_tags_to_compare(version):
    _, found = check_version(version.folder, None, Trust.of(CONFIG))
    assert "tags" not in {row.name for row in found}
    assert all(row.passed for row in found)


def test_one_bit_of_the_weights_is_found_and_the_evidence_not_believed(version):
    path = version.inside / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert failed(version) == {
        "signature": "it was changed after it was signed: model.safetensors is another",
        "weights": "model.safetensors is another",
    }
    assert rows(version)[0] is None


def test_weights_in_several_files_are_checked_and_served_as_one_model(version):
    model = load_model(version.inside)
    save_model(version.inside, model.spec, model.network.state_dict(), largest=2000)
    found = version.sign()
    assert failed(found) == {}
    evidence, checks = rows(found)
    assert checks["weights"].figure.endswith(f"served_digest {evidence.served_digest[:12]}")

    def served(name: str) -> str:
        return replace(evidence, files={**evidence.files, name: "another"}).served_digest

    for folder in ("", "weak/", "classifier/"):
        for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.safetensors"):
            assert served(folder + name) != evidence.served_digest
    for name in ("probe.safetensors", "model.json", "text_encoder/model-00001-of-00002.safetensors"):
        assert served(name) == evidence.served_digest


def test_a_file_that_the_signature_does_not_look_at_is_found_all_the_same(version):
    (version.inside / ".gitignore").write_text("*")
    assert failed(version) == {"weights": ".gitignore is new"}


def test_a_version_without_signature_and_one_by_a_stranger(version, home, monkeypatch):
    signature = signature_file(version.folder)
    content = signature.read_bytes()
    signature.unlink()
    assert failed(version) == {"signature": "it is not signed: model.sig is missing"}
    signature.write_bytes(content)
    monkeypatch.setenv("DDPM_HOME", str(home / "other"))
    told = failed(version)
    assert set(told) == {"signature"}
    assert "by none of registry.trusted_keys" in told["signature"]
    assert not (home / "other").exists()  # looking makes no key
    Signer.of(CONFIG).sign_folder(version.inside, signature)
    assert failed(version) == {}


def test_a_folder_without_evidence_says_how_to_come_by_it(version):
    (version.inside / "evidence.json").unlink()
    evidence, found = rows(version)
    assert evidence is None
    assert found["signature"].figure == "it was changed after it was signed: evidence.json is missing"
    assert "carries no evidence.json" in found["evidence"].figure


def test_tags_that_are_not_those_of_the_evidence_are_named(version):
    tags = {**version.tags, "frechet_distance": "0.1000", "note": "of a person"}
    del tags["code_digest"]
    assert failed(version, tags=tags) == {
        "tags": "frechet_distance is 0.1000, not 10.0000, code_digest is missing",
    }


def test_other_settings_than_the_scored_ones_do_not_pass_even_where_they_are_signed(version):
    path = version.inside / "model.json"
    plain = json.loads(path.read_text())
    plain["sampling"]["scale"] = 9.0
    path.write_text(json.dumps(plain))
    assert failed(version.sign()) == {"settings": "scale is 9.0, scored was 2.0"}


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("code/ddpm/generate.py", "\n", "code/ddpm/generate.py is another"),
        ("served_model.py", "\n", "served_model.py is another"),
        ("code/ddpm/generate.so", "x", "code/ddpm/generate.so is new"),
        ("code/numpy/__init__.py", "x", "code/numpy/__init__.py is new"),
        ("artifacts/other/model.json", "x", "artifacts/other/model.json is new"),
        (
            "code/ddpm/__pycache__/generate.cpython-311.pyc",
            "x",
            "code/ddpm/__pycache__ holds compiled code, which Python would run: delete it",
        ),
        ("requirements.txt", "evil==1\n", "requirements.txt is another"),
        ("requirements.txt", "--index-url http://127.0.0.1\n", "requirements.txt is another"),
    ],
)
def test_whatever_would_run_where_it_is_served_is_as_it_was_registered(version, name, change, told):
    path = version.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(change)
    assert failed(version) == {"code": told}


def test_code_that_is_missing_is_named(version):
    (version.folder / "code" / "ddpm" / "noise.py").unlink()
    (version.folder / "served_model.py").unlink()
    assert failed(version) == {"code": "served_model.py is missing"}


@pytest.mark.parametrize(
    "keys, value, told",
    [
        (["loader_module"], "evil", "loader_module evil"),
        (["code"], "artifacts", "code artifacts"),
        (["model_code_path"], "code/ddpm/generate.py", "model code generate.py"),
        (["artifacts", "model", "path"], "artifacts/other", "artifacts {"),
        (["config"], {"a": 1}, "unknown setting config"),
    ],
)
def test_mlmodel_leads_to_the_signed_model_and_the_recorded_code(version, keys, value, told):
    path = version.folder / "MLmodel"
    plain = yaml.safe_load(path.read_text())
    place = plain["flavors"]["python_function"]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(yaml.safe_dump(plain))
    assert told in failed(version)["code"]


def test_mlmodel_with_other_defaults_or_flavors_does_not_pass(version):
    path = version.folder / "MLmodel"
    plain = yaml.safe_load(path.read_text())
    other = json.loads(plain["signature"]["params"])
    other[0]["default"] = 5.0
    path.write_text(yaml.safe_dump({**plain, "signature": {**plain["signature"], "params": json.dumps(other)}}))
    assert "MLmodel has the defaults" in failed(version)["code"]
    path.write_text(yaml.safe_dump({**plain, "flavors": {**plain["flavors"], "sklearn": {}}}))
    assert "MLmodel has the flavors python_function, sklearn" in failed(version)["code"]
    path.write_text(yaml.safe_dump({**plain, "flavors": {"python_function": "ours"}}))
    assert failed(version)["code"].startswith("MLmodel cannot be read")


@pytest.mark.parametrize("name", ["conda.yaml", "python_env.yaml"])
def test_environments_ask_for_nothing_else(version, name):
    path = version.folder / name
    plain = yaml.safe_load(path.read_text())
    plain["dependencies"].append("evil==1")
    path.write_text(yaml.safe_dump(plain))
    assert failed(version) == {"code": f"{name} is another"}
    path.write_text(": [")
    assert failed(version) == {"code": f"{name} is another"}


def test_many_differences_are_counted(version):
    for number in range(7):
        (version.folder / f"more{number}").write_text("x")
    assert failed(version)["code"].endswith("more4 is new, and 2 more")


def test_a_link_is_not_its_content(version, tmp_path):
    code = version.folder / "code" / "ddpm" / "generate.py"
    (tmp_path / "elsewhere.py").write_bytes(code.read_bytes())
    code.unlink()
    code.symlink_to(tmp_path / "elsewhere.py")
    assert failed(version) == {"code": "code/ddpm/generate.py is another"}


def test_evidence_of_other_scores_needs_another_signature(version):
    better = version.sign(lambda evidence: replace(evidence, dataset_uri="file:///other"))
    assert failed(better) == {}
    text = (better.inside / "evidence.json").read_text()
    (better.inside / "evidence.json").write_text(text.replace("file:///other", "file:///third"))
    assert failed(better) == {"signature": "it was changed after it was signed: evidence.json is another"}
