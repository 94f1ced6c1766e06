import base64
import json

import pytest

from pipelines.config import ConfigError, RegistryConfig
from pipelines.signing import SignatureError, Signer, Trust, check_signing
from pipelines.signing.keys import own_key, public_key
from tests.pipelines.signing.authority import DAY, NOW, issue


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


def test_what_was_signed_is_believed_by_whoever_trusts_the_key(home, folder, tmp_path):
    Signer.of(config()).sign_folder(folder, tmp_path / "model.sig")
    Trust.of(config()).check_folder(folder, tmp_path / "model.sig")


@pytest.mark.parametrize("change", ["weights is another", "evidence is missing", "code.py is new"])
def test_any_change_after_signing_is_named(home, folder, tmp_path, change):
    (folder / "evidence").write_bytes(b"evidence")
    Signer.of(config()).sign_folder(folder, tmp_path / "model.sig")
    if "another" in change:
        (folder / "weights").write_bytes(b"weightz")
    elif "new" in change:
        (folder / "code.py").write_bytes(b"import os")
    else:
        (folder / "evidence").unlink()
    with pytest.raises(SignatureError, match=f"changed after it was signed: {change}$"):
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
    for text in ("{}", "[]", "", '{"dsseEnvelope": {"payload": "e30="}}'):
        (tmp_path / "model.sig").write_text(text)
        with pytest.raises(SignatureError, match="its signature is damaged"):
            Trust.of(config()).check_folder(folder, tmp_path / "model.sig")


def test_a_signature_over_another_statement_is_forged(home, folder, tmp_path):
    signature = tmp_path / "model.sig"
    Signer.of(config()).sign_folder(folder, signature)
    (folder / "weights").write_bytes(b"weightz")
    other = tmp_path / "other.sig"
    Signer.of(config()).sign_folder(folder, other)
    forged = json.loads(signature.read_text())
    forged["dsseEnvelope"]["payload"] = json.loads(other.read_text())["dsseEnvelope"]["payload"]
    signature.write_text(json.dumps(forged))
    with pytest.raises(SignatureError, match="it is forged"):
        Trust.of(config()).check_folder(folder, signature)


def test_what_a_statement_ignores_is_what_its_signer_said(home, folder, tmp_path):
    """Nobody who is not trusted can make a file be passed over."""
    signature = tmp_path / "model.sig"
    Signer.of(config()).sign_folder(folder, signature)
    (folder / "more").write_bytes(b"x")
    forged = json.loads(signature.read_text())
    statement = json.loads(base64.b64decode(forged["dsseEnvelope"]["payload"]))
    statement["predicate"]["serialization"]["ignore_paths"] = ["more"]
    forged["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    signature.write_text(json.dumps(forged))
    with pytest.raises(SignatureError, match="it is forged"):
        Trust.of(config()).check_folder(folder, signature)


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


def test_trust_in_oneself_makes_no_key(home, folder, tmp_path):
    trust = Trust.of(config())
    assert not home.exists()
    Signer.of(config()).sign_folder(folder, tmp_path / "model.sig")
    trust.check_folder(folder, tmp_path / "model.sig")


def test_without_trusted_keys_the_own_one_is_that_of_the_configuration(home, folder, tmp_path, monkeypatch):
    named = config(signing_key=str(other_key(tmp_path, monkeypatch, home)))
    Signer.of(named).sign_folder(folder, tmp_path / "model.sig")
    Trust.of(named).check_folder(folder, tmp_path / "model.sig")
    with pytest.raises(SignatureError, match="by none of"):
        Trust.of(config()).check_folder(folder, tmp_path / "model.sig")


@pytest.fixture
def authority(tmp_path):
    (tmp_path / "ca").mkdir()
    root = issue(tmp_path / "ca", "root", authority=True)
    return tmp_path / "ca", root, issue(tmp_path / "ca", "between", root, authority=True)


def by_certificate(authority, signer, **fields) -> RegistryConfig:
    _, root, between = authority
    given = {
        "signing_key": str(signer.key_path),
        "signing_certificate": str(signer.path),
        "signing_chain": [str(between.path)],
        "trusted_certificates": [str(root.path)],
    }
    return config(**{**given, **fields})


@pytest.mark.parametrize("usage", ["digital_signature", "code_signing"])
def test_whoever_trusts_the_root_believes_what_is_signed_by_certificate(authority, folder, tmp_path, usage):
    used = by_certificate(authority, issue(authority[0], "signer", authority[2], usage=usage))
    check_signing(used)
    Signer.of(used).sign_folder(folder, tmp_path / "model.sig")
    by = Trust.of(used).check_folder(folder, tmp_path / "model.sig")
    assert by.startswith("by the certificate of CN=signer, valid until ")
    (folder / "weights").write_bytes(b"weightz")
    with pytest.raises(SignatureError, match="changed after it was signed: weights is another"):
        Trust.of(used).check_folder(folder, tmp_path / "model.sig")


def test_a_signer_right_below_the_root_needs_no_chain(authority):
    check_signing(by_certificate(authority, issue(authority[0], "signer", authority[1]), signing_chain=[]))


def test_another_root_vouches_for_nobody_here(authority, folder, tmp_path):
    place, _, between = authority
    used = by_certificate(authority, issue(place, "signer", between))
    Signer.of(used).sign_folder(folder, tmp_path / "model.sig")
    stranger = issue(place, "stranger", authority=True)
    with pytest.raises(SignatureError, match=r"by the certificate of CN=signer.* is by none of"):
        Trust.of(config(trusted_certificates=[str(stranger.path)])).check_folder(folder, tmp_path / "model.sig")


def test_a_certificate_that_may_vouch_for_nobody_makes_none_that_counts(authority, folder, tmp_path):
    place, _, between = authority
    signer = issue(place, "signer", between)
    below = issue(place, "below", signer)
    used = by_certificate(authority, below, signing_chain=[str(signer.path), str(between.path)])
    with pytest.raises(ConfigError, match="would not be believed here"):
        check_signing(used)


def test_a_chain_with_a_gap_is_found_before_anything_starts(authority):
    used = by_certificate(authority, issue(authority[0], "signer", authority[2]), signing_chain=[])
    with pytest.raises(ConfigError, match=r"would not be believed here.*registry\.signing_chain"):
        check_signing(used)


def test_nobody_signs_with_a_certificate_that_has_ended_and_what_it_signed_before_counts(authority, folder, tmp_path):
    ended = issue(authority[0], "ended", authority[2], valid=(NOW - 9 * DAY, NOW - DAY))
    used = by_certificate(authority, ended)
    with pytest.raises(ConfigError, match=r"registry\.signing_certificate = .* and not today: have it renewed"):
        check_signing(used)
    Signer(ended.key_path, ended.path, (authority[2].path,)).sign_folder(folder, tmp_path / "model.sig")
    assert "which ended on" in Trust.of(used).check_folder(folder, tmp_path / "model.sig")


def test_a_certificate_for_something_else_or_of_another_key_is_refused(authority):
    place, _, between = authority
    server = issue(place, "server", between, usage=None)
    with pytest.raises(ConfigError, match="it needs the key usage digitalSignature"):
        check_signing(by_certificate(authority, server))
    signer = issue(place, "signer", between)
    with pytest.raises(ConfigError, match="is the certificate of another key"):
        check_signing(by_certificate(authority, signer, signing_key=str(server.key_path)))
    with pytest.raises(ConfigError, match=r"registry\.signing_certificate.* is not set"):
        check_signing(config(signing_key=str(signer.key_path), signing_chain=[str(between.path)]))


def test_a_signer_whom_nobody_here_believes_is_found_before_anything_starts(home, authority):
    signer = issue(authority[0], "signer", authority[2])
    check_signing(config())
    with pytest.raises(ConfigError, match=r"add its public key to registry\.trusted_keys"):
        check_signing(config(trusted_keys=[str(public_key(signer.key_path))]))
    with pytest.raises(ConfigError, match=r"add the root of registry\.signing_certificate"):
        check_signing(by_certificate(authority, signer, trusted_certificates=[]))
