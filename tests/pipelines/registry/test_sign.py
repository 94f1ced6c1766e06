import stat

import pytest

from pipelines.config import ConfigError, RegistryConfig
from pipelines.registry.sign import SignatureError, Signer, Trust, own_key, public_key


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"weights")
    return tmp_path / "model"


def config(**fields) -> RegistryConfig:
    return RegistryConfig(model="digits", **fields)


def other_key(tmp_path, monkeypatch, home):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "other"))
    key = own_key()
    monkeypatch.setenv("DDPM_HOME", str(home))
    return key


def test_a_key_is_made_on_first_use_for_its_owner_alone_and_kept(home):
    key = own_key()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    assert own_key().read_bytes() == before
    assert b"PRIVATE" not in public_key(key).read_bytes()


def test_what_was_signed_is_believed_by_whoever_trusts_the_key(home, folder, tmp_path):
    Signer.of(config()).sign_folder(folder, tmp_path / "model.sig")
    Trust.of(config()).check_folder(folder, tmp_path / "model.sig")


@pytest.mark.parametrize("change", ["changed", "more", "fewer"])
def test_any_change_after_signing_is_named(home, folder, tmp_path, change):
    (folder / "evidence").write_bytes(b"evidence")
    Signer.of(config()).sign_folder(folder, tmp_path / "model.sig")
    if change == "changed":
        (folder / "weights").write_bytes(b"weightz")
    elif change == "more":
        (folder / "code.py").write_bytes(b"import os")
    else:
        (folder / "evidence").unlink()
    with pytest.raises(SignatureError, match="changed after it was signed"):
        Trust.of(config()).check_folder(folder, tmp_path / "model.sig")


def test_no_signature_and_that_of_a_stranger_are_not_believed(home, folder, tmp_path, monkeypatch):
    with pytest.raises(SignatureError, match="not signed"):
        Trust.of(config()).check_folder(folder, tmp_path / "model.sig")
    stranger = other_key(tmp_path, monkeypatch, home)
    Signer.of(config(signing_key=str(stranger))).sign_folder(folder, tmp_path / "model.sig")
    with pytest.raises(SignatureError, match=r"by none of registry\.trusted_keys"):
        Trust.of(config()).check_folder(folder, tmp_path / "model.sig")
    trusted = [str(public_key(own_key())), str(public_key(stranger))]
    Trust.of(config(trusted_keys=trusted)).check_folder(folder, tmp_path / "model.sig")


def test_a_file_that_is_no_signature_is_not_believed(home, folder, tmp_path):
    (tmp_path / "model.sig").write_text("{}")
    with pytest.raises(SignatureError):
        Trust.of(config()).check_folder(folder, tmp_path / "model.sig")


def test_texts_are_signed_too(home):
    signature = Signer.of(config()).sign_text('{"passed": true}')
    Trust.of(config()).check_text('{"passed": true}', signature)
    with pytest.raises(SignatureError, match="changed"):
        Trust.of(config()).check_text('{"passed": false}', signature)


def test_a_key_that_is_not_there_is_named(home):
    with pytest.raises(ConfigError, match=r"registry\.signing_key = /nowhere: there is no such file"):
        Signer.of(config(signing_key="/nowhere"))
    with pytest.raises(ConfigError, match=r"registry\.trusted_keys = /nowhere"):
        Trust.of(config(trusted_keys=["/nowhere"]))
