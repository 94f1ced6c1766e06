"""Private keys, public keys and certificates: the key of this user, and checks of files before they are used.

Errors that `model-signing` would raise hours later, in the middle of a registration, are raised here in terms of the
configuration.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.environment.credentials import create_private
from pipelines.environment.scratch import scratch_folder
from pipelines.presentation.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509 import Certificate

OWN_KEY = "signing.pem"
"""Name of the key that is made on first use, in the folder of the local stack."""
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
"""Curves that `model-signing` accepts: name in files -> common name."""
_MAKE_KEY = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out FILE`"


def own_key_path() -> Path:
    """Return the path of this user's own key, which may not exist yet."""
    return Path(os.environ.get("DDPM_HOME") or ".ddpm").resolve() / OWN_KEY


def own_key() -> Path:
    """Return the private key of this user, which is created if it does not exist; only its owner can read it.

    If several processes create it at the same time, one succeeds, and all get its key.

    Raises:
        ConfigError: it can neither be read nor made there.
    """
    path = own_key_path()
    if not path.exists():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            create_private(path, pem.decode())
        except OSError as error:
            raise ConfigError(
                f"no key can be made at {path} ({error.strerror}): name one with registry.signing_key, or a folder "
                "that can be written with DDPM_HOME"
            ) from error
    public_key(path)
    return path


def public_key(private: Path, field: str = "registry.signing_key") -> Path:
    """Return the path of the public half of a key: beside it, or in a temporary folder if that is not writable.

    Args:
        field: field of the configuration that names the key.

    Raises:
        ConfigError: the key cannot be used.
    """
    from cryptography.hazmat.primitives import serialization

    content = (
        load_private_key(field, private)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    path = private.with_suffix(".pub")
    if path.is_file() and path.read_bytes() == content:
        return path
    try:
        _replace(path, content)
    except OSError:  # a mounted secret
        path = Path(tempfile.mkdtemp(prefix="key-", dir=scratch_folder())) / path.name
        _replace(path, content)
    return path


def load_private_key(field: str, path: Path) -> ec.EllipticCurvePrivateKey:
    """Return a private key that can sign.

    Args:
        field: field of the configuration that names the key.

    Raises:
        ConfigError: it is missing, protected by a password, not a private key, or of another kind.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    content = _read(field, path)
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError as error:
        raise ConfigError(
            f"{field} = {path} is protected by a password, which nobody types while a run goes on: name an unprotected "
            f"copy that only this user reads (`openssl pkey -in {path} -out FILE && chmod 600 FILE`)"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{field} = {path} is no private key (PEM): {_MAKE_KEY}") from error
    _check_curve(field, path, key)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def check_public_key(field: str, path: Path) -> None:
    """Check that a file has a public key that can verify signatures.

    Raises:
        ConfigError: it does not.
    """
    from cryptography.hazmat.primitives import serialization

    content = _read(field, path)
    try:
        key = serialization.load_pem_public_key(content)
    except ValueError as error:
        raise ConfigError(
            f"{field} = {path} is no public key (PEM): that of a private key comes from `openssl pkey -in KEY -pubout`"
        ) from error
    _check_curve(field, path, key)


def load_certificates(field: str, path: Path) -> list[Certificate]:
    """Return the certificates in a file, at least one.

    Raises:
        ConfigError: it holds none.
    """
    from cryptography import x509

    content = _read(field, path)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ConfigError(f"{field} = {path} holds no certificate (PEM)") from error


def check_signing_certificate(field: str, path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Check that a certificate belongs to a key, is valid today, and may be used for signatures.

    Raises:
        ConfigError: it is not.
    """
    certificate = load_certificates(field, path)[0]
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"{field} = {path} is the certificate of another key than registry.signing_key")
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= datetime.now(UTC) <= last:
        raise ConfigError(
            f"{field} = {path} is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, and not today: have it renewed"
        )
    if not may_sign(certificate):
        raise ConfigError(
            f"{field} = {path} may not be used for signatures: it needs the key usage digitalSignature, "
            "or the extended key usage codeSigning"
        )


def may_sign(certificate: Certificate) -> bool:
    """Return whether a certificate has a key usage that `model-signing` requires."""
    from cryptography import x509

    extensions = certificate.extensions
    try:
        if extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
            return True
    except x509.ExtensionNotFound:
        pass
    try:
        usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return x509.oid.ExtendedKeyUsageOID.CODE_SIGNING in usage


def _check_curve(field: str, path: Path, key: object) -> None:
    """Check that a key is on one of `CURVES`.

    Raises:
        ConfigError: it is not.
    """
    curve = getattr(key, "curve", None)
    if curve is None or curve.name not in CURVES:
        kind = type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey").lstrip("_")
        found = f"on the curve {curve.name}" if curve is not None else f"of the kind {kind}"
        raise ConfigError(
            f"{field} = {path} is {found}; signatures need a key on {', '.join(CURVES.values())}: {_MAKE_KEY}"
        )


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step, because others may be reading it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{field} = {path}: there is no such file") from error
    except OSError as error:
        raise ConfigError(f"{field} = {path} cannot be read: {error.strerror}") from error
