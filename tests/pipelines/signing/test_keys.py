import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pipelines.config import ConfigError, RegistryConfig
from pipelines.environment.credentials import create_private
from pipelines.signing import Signer, Trust, check_signing, keys
from pipelines.signing.keys import own_key, public_key
from tests.pipelines.signing.authority import write_key


def test_a_key_is_made_on_first_use_for_its_owner_alone_and_kept(home):
    before = os.umask(0)
    try:
        key = own_key()
    finally:
        os.umask(before)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    content = key.read_bytes()
    assert own_key().read_bytes() == content
    assert b"PRIVATE" not in public_key(key).read_bytes()
    assert sorted(path.name for path in home.iterdir()) == ["signing.pem", "signing.pub"]


def test_of_several_that_make_a_key_at_the_same_time_all_get_that_of_the_first(home, monkeypatch):
    """The second finds no key, makes one, and the first is there before it is written."""
    others = []

    def late(path: Path, text: str) -> bool:
        monkeypatch.setattr(keys, "create_private", create_private)
        others.append(own_key().read_text())
        return create_private(path, text)

    monkeypatch.setattr(keys, "create_private", late)
    assert own_key().read_text() == others[0]
    assert sorted(path.name for path in home.iterdir()) == ["signing.pem", "signing.pub"]


def test_many_threads_end_with_one_key(home):
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: own_key().read_bytes(), range(8)))
    assert len(made) == 1


def test_a_public_key_is_that_of_the_private_one_even_where_an_old_one_lies_beside_it(home):
    key = own_key()
    old = public_key(key).read_bytes()
    key.unlink()
    assert public_key(own_key()).read_bytes() != old


def test_a_key_in_a_folder_that_cannot_be_written_is_trusted_too(tmp_path, monkeypatch):
    key = write_key(tmp_path / "signing.pem", ec.generate_private_key(ec.SECP384R1()))
    replace = Path.replace

    def read_only(path: Path, target: Path) -> Path:
        if Path(target).parent == tmp_path:
            raise PermissionError(13, "read-only")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", read_only)
    config = RegistryConfig(model="digits", signing_key=str(key))
    assert Trust.of(config).keys[0].parent != tmp_path
    check_signing(config)


KEYS = {
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_other_kinds_are_refused_by_name(tmp_path, kind):
    key = KEYS[kind]()
    path = write_key(tmp_path / "key.pem", key)
    with pytest.raises(ConfigError, match=rf"registry\.signing_key = .*{kind}; signatures need a key on P-256, P-384"):
        Signer.of(RegistryConfig(model="digits", signing_key=str(path)))
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(key.public_key().public_bytes(*form))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"registry\.trusted_keys = .*{kind}"):
        Trust.of(RegistryConfig(model="digits", trusted_keys=[str(path)]))


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_that_is_named_signs(tmp_path, curve):
    key = write_key(tmp_path / "key.pem", ec.generate_private_key(curve))
    check_signing(RegistryConfig(model="digits", signing_key=str(key)))


def test_a_key_with_a_password_is_refused_with_what_to_do(tmp_path):
    path = write_key(tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1()), b"secret")
    with pytest.raises(ConfigError, match=r"protected by a password.*openssl pkey -in"):
        check_signing(RegistryConfig(model="digits", signing_key=str(path)))


def test_files_of_something_else_are_named_by_their_field(tmp_path):
    (tmp_path / "text").write_text("no key")
    path = str(tmp_path / "text")
    for field, said in {
        "signing_key": "is no private key",
        "trusted_keys": "is no public key",
        "trusted_certificates": "holds no certificate",
        "signing_certificate": "holds no certificate",
        "signing_chain": "holds no certificate",
    }.items():
        key = write_key(tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1()))
        value = [path] if field.startswith("trusted") or field.endswith("chain") else path
        with pytest.raises(ConfigError, match=rf"registry\.{field} = .*{said}"):
            check_signing(RegistryConfig(model="digits", **{"signing_key": str(key), field: value}))


def test_a_home_in_which_no_key_can_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ConfigError, match=r"no key can be made at .*: name one with registry.signing_key"):
        own_key()
