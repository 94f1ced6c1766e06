"""Signatures of model folders and of the gate's verdicts, by key or certificate, without network access.

The format is that of `model-signing` (OpenSSF), whose command line verifies our folders too. The verifier's
configuration decides which signatures are trusted, never the signed data.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import RegistryConfig
from pipelines.environment.scratch import temporary_folder
from pipelines.presentation.errors import ConfigError, PipelineError
from pipelines.signing.keys import (
    check_public_key,
    check_signing_certificate,
    load_certificates,
    load_private_key,
    own_key,
    own_key_path,
    public_key,
)
from pipelines.storage import file_sha256

if TYPE_CHECKING:
    from model_signing import signing, verifying


def differences(recorded: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Return descriptions, file by file, of how digests by path differ from recorded ones."""
    other = [f"{name} is another" for name in sorted(recorded.keys() & there.keys()) if recorded[name] != there[name]]
    missing = [f"{name} is missing" for name in sorted(recorded.keys() - there.keys())]
    return other + missing + [f"{name} is new" for name in sorted(there.keys() - recorded.keys())]


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, relative to it, in order; a link is one, wherever it leads."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file; empty for a link, which is not content of the folder."""
    return "" if path.is_symlink() else file_sha256(path)


SIGNED_TEXT = "text"


class SignatureError(PipelineError):
    """A signature is missing, not by a trusted key, or of something else; the message says which."""


@dataclass(frozen=True)
class Signer:
    """Signs folders and texts.

    Attributes:
        key: path of the private key, PEM, on the curve P-256, P-384 or P-521.
        certificate: path of the certificate of the key; None to sign with the key only.
        chain: paths of the certificates between the certificate and the root.
    """

    key: Path
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: RegistryConfig) -> Signer:
        """Return the signer of a configuration; without a key in it, one with a key that is created on first use.

        Raises:
            ConfigError: the key or a certificate is not there, or cannot be used.
        """
        path = own_key() if config.signing_key is None else Path(config.signing_key).expanduser()
        key = load_private_key("registry.signing_key", path)
        chain = tuple(Path(entry).expanduser() for entry in config.signing_chain)
        for entry in chain:
            load_certificates("registry.signing_chain", entry)
        if config.signing_certificate is None:
            if chain:
                raise ConfigError(
                    "registry.signing_chain leads from registry.signing_certificate to its root, and that is not set"
                )
            return cls(path)
        certificate = Path(config.signing_certificate).expanduser()
        check_signing_certificate("registry.signing_certificate", certificate, key)
        return cls(path, certificate, chain)

    def sign_folder(self, folder: Path, signature: Path) -> None:
        """Write the signature of everything in a folder to a file outside it."""
        self._config().sign(folder, signature)

    def sign_text(self, text: str) -> str:
        """Return the signature of a text, as JSON."""
        with _as_folder(text) as folder:
            self.sign_folder(folder / SIGNED_TEXT, folder / "signature")
            return (folder / "signature").read_text()

    def sign_bytes(self, data: bytes) -> bytes:
        """Return the plain signature (ECDSA with SHA-256, DER) of bytes, as openssl verifies it with the public key."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return load_private_key("registry.signing_key", self.key).sign(data, ec.ECDSA(hashes.SHA256()))

    def _config(self) -> signing.Config:
        from model_signing import signing

        config = signing.Config()
        if self.certificate is None:
            return config.use_elliptic_key_signer(private_key=self.key)
        chain = self.chain or (self.certificate,)  # the library reads no empty chain; one more copy does no harm
        return config.use_certificate_signer(
            private_key=self.key, signing_certificate=self.certificate, certificate_chain=chain
        )


@dataclass(frozen=True)
class Trust:
    """The keys and root certificates whose signatures are trusted.

    Attributes:
        keys: paths of public keys, PEM; missing files are ignored.
        roots: paths of trusted root certificates, PEM.
    """

    keys: tuple[Path, ...] = ()
    roots: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: RegistryConfig) -> Trust:
        """Return the trust of a configuration; without keys in it, trust in the own key.

        The own key is `registry.signing_key`, or else the one created on first use; it is not created here.

        Raises:
            ConfigError: a key or certificate is not there, or cannot be used.
        """
        keys = tuple(Path(path).expanduser() for path in config.trusted_keys)
        roots = tuple(Path(path).expanduser() for path in config.trusted_certificates)
        for path in keys:
            check_public_key("registry.trusted_keys", path)
        for path in roots:
            load_certificates("registry.trusted_certificates", path)
        if keys or roots:
            return cls(keys, roots)
        own = own_key_path() if config.signing_key is None else Path(config.signing_key).expanduser()
        return cls((public_key(own) if own.exists() else own.with_suffix(".pub"),))

    def check_folder(self, folder: Path, signature: Path) -> str:
        """Check that a folder is unchanged since a trusted key signed it, and return a description of the signer.

        A signature by certificate is valid for ever: it does not contain its time, so the certificates are checked as
        of the first day of the signer's. The description says if the signer's certificate has expired since.

        Raises:
            SignatureError: it is not; the message says why, and names the changed files.
        """
        if not signature.is_file():
            raise SignatureError(f"it is not signed: {signature.name} is missing")
        try:
            signed = _Signed.read(signature)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise SignatureError(f"its signature is damaged: {signature.name} is none of model-signing's") from error
        from cryptography.exceptions import InvalidSignature

        for config in self._configs():
            try:
                config.verify(folder, signature)
                return signed.by
            except InvalidSignature as error:
                raise SignatureError(f"its signature says that it is {signed.by}, and is not: it is forged") from error
            except Exception as error:
                # The library raises ValueError for everything else; only trusted signatures are compared.
                if "Signature mismatch" in str(error):
                    changes = signed.changes(folder)
                    raise SignatureError(f"it was changed after it was signed: {changes or error}") from error
        raise SignatureError(
            f"its signature, {signed.by}, is by none of registry.trusted_keys and registry.trusted_certificates"
        )

    def check_text(self, text: str, signature: str) -> None:
        """Check that a text is unchanged since a trusted key signed it.

        Raises:
            SignatureError: it is not.
        """
        with _as_folder(text) as folder:
            (folder / "signature").write_text(signature)
            self.check_folder(folder / SIGNED_TEXT, folder / "signature")

    def _configs(self) -> list[verifying.Config]:
        from model_signing import verifying

        there = [key for key in self.keys if key.is_file()]
        found = [verifying.Config().use_elliptic_key_verifier(public_key=key) for key in there]
        if self.roots:
            found.append(verifying.Config().use_certificate_verifier(certificate_chain=self.roots))
        return found


@dataclass(frozen=True)
class _Signed:
    """The contents of a signature, unverified; `model-signing` verifies it.

    Attributes:
        by: description of the signer.
        files: path in the folder -> SHA-256.
    """

    by: str
    files: dict[str, str]

    @classmethod
    def read(cls, signature: Path) -> _Signed:
        bundle = json.loads(signature.read_text())
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        files = {entry["name"]: entry["digest"] for entry in statement["predicate"]["resources"]}
        material = bundle["verificationMaterial"]
        if "x509CertificateChain" not in material:
            return cls(f"by the key {material['publicKey']['hint'][:12]}", files)
        from cryptography import x509

        raw = material["x509CertificateChain"]["certificates"][0]["rawBytes"]
        certificate = x509.load_der_x509_certificate(base64.b64decode(raw))
        last = certificate.not_valid_after_utc
        until = f"valid until {last:%Y-%m-%d}" if datetime.now(UTC) <= last else f"which ended on {last:%Y-%m-%d}"
        return cls(f"by the certificate of {certificate.subject.rfc4514_string()}, {until}", files)

    def changes(self, folder: Path) -> str:
        """Return a description of the files of a folder that differ from the signed ones."""
        return ", ".join(differences(self.files, {name: sha256(folder / name) for name in files_below(folder)}))


def check_signing(config: RegistryConfig) -> None:
    """Check, before anything starts, that versions can be signed and that this configuration trusts the signature.

    Raises:
        ConfigError: a key or certificate cannot be used, or this configuration does not trust signatures with it.
    """
    signer, trust = Signer.of(config), Trust.of(config)
    try:
        trust.check_text(SIGNED_TEXT, signer.sign_text(SIGNED_TEXT))
    except SignatureError as error:
        field = "registry.trusted_keys"
        if signer.certificate is not None:
            field = "registry.trusted_certificates, and what is between, to registry.signing_chain"
        wanted = "its public key" if signer.certificate is None else "the root of registry.signing_certificate"
        raise ConfigError(
            f"what this configuration signs would not be believed here, and no alias could move: {error}; "
            f"add {wanted} to {field}"
        ) from error


@contextmanager
def _as_folder(text: str) -> Iterator[Path]:
    """Yield a temporary folder that contains a text as a file."""
    with temporary_folder("signed") as folder:
        (folder / SIGNED_TEXT).mkdir()
        (folder / SIGNED_TEXT / "text.json").write_text(text)
        yield folder
