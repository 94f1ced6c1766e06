"""Signatures: of the folder of a model, and of the gate's verdicts, by key or certificate, without any network.

The format is that of `model-signing` (OpenSSF), whose own command line verifies our folders too. Whose signatures are
believed is decided by the configuration of whoever verifies, never by what is signed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import RegistryConfig
from pipelines.credentials import write_private
from pipelines.errors import ConfigError, PipelineError
from pipelines.scratch import scratch_folder

if TYPE_CHECKING:
    from model_signing import signing, verifying

OWN_KEY = "signing.pem"
"""Name of the key that is made on first use, in the folder of the local stack."""
SIGNED_TEXT = "text"


class SignatureError(PipelineError):
    """A signature is missing, by somebody who is not trusted, or of something else; the message says which."""


@dataclass(frozen=True)
class Signer:
    """Signs folders and texts.

    Attributes:
        key: path of the private key, PEM, on the curve P-256, P-384 or P-521.
        certificate: path of the certificate of the key; None to sign by the key alone.
        chain: paths of the certificates between that and the root.
    """

    key: Path
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: RegistryConfig) -> Signer:
        """Return the signer that the configuration names; without one, that of a key that is made on first use.

        Raises:
            ConfigError: there is no such key or certificate.
        """
        chain = tuple(Path(path).expanduser() for path in config.signing_chain)
        certificate = None if config.signing_certificate is None else Path(config.signing_certificate).expanduser()
        if config.signing_key is None:
            return cls(own_key(), certificate, chain)
        return cls(_there("registry.signing_key", config.signing_key), certificate, chain)

    def sign_folder(self, folder: Path, signature: Path) -> None:
        """Write the signature of everything in a folder to a file outside it."""
        self._config().sign(folder, signature)

    def sign_text(self, text: str) -> str:
        """Return the signature of a text, as JSON."""
        with _as_folder(text) as folder:
            self.sign_folder(folder / SIGNED_TEXT, folder / "signature")
            return (folder / "signature").read_text()

    def _config(self) -> signing.Config:
        from model_signing import signing

        config = signing.Config()
        if self.certificate is None:
            return config.use_elliptic_key_signer(private_key=self.key)
        return config.use_certificate_signer(
            private_key=self.key, signing_certificate=self.certificate, certificate_chain=self.chain
        )


@dataclass(frozen=True)
class Trust:
    """Whose signatures are believed.

    Attributes:
        keys: paths of public keys, PEM.
        roots: paths of certificates, PEM, that vouch for whoever has a certificate below one of them.
    """

    keys: tuple[Path, ...] = ()
    roots: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: RegistryConfig) -> Trust:
        """Return the trust that the configuration names; where it names none, that in the own key.

        Raises:
            ConfigError: there is no such file.
        """
        keys = tuple(_there("registry.trusted_keys", path) for path in config.trusted_keys)
        roots = tuple(_there("registry.trusted_certificates", path) for path in config.trusted_certificates)
        return cls(keys, roots) if keys or roots else cls((public_key(own_key()),))

    def check_folder(self, folder: Path, signature: Path) -> None:
        """Check that a folder is as somebody who is trusted has signed it.

        Raises:
            SignatureError: it is not.
        """
        if not signature.is_file():
            raise SignatureError("it is not signed")
        untrusted = "its signature is by none of registry.trusted_keys and registry.trusted_certificates"
        for config in self._configs():
            try:
                config.verify(folder, signature)
                return
            except Exception as error:
                # The library raises ValueError for both; only of what a trusted key has signed it compares the files.
                if "Signature mismatch" in str(error):
                    raise SignatureError(f"it was changed after it was signed: {error}") from error
        raise SignatureError(untrusted)

    def check_text(self, text: str, signature: str) -> None:
        """Check that a text is as somebody who is trusted has signed it.

        Raises:
            SignatureError: it is not.
        """
        with _as_folder(text) as folder:
            (folder / "signature").write_text(signature)
            self.check_folder(folder / SIGNED_TEXT, folder / "signature")

    def _configs(self) -> list[verifying.Config]:
        from model_signing import verifying

        found = [verifying.Config().use_elliptic_key_verifier(public_key=key) for key in self.keys]
        if self.roots:
            found.append(verifying.Config().use_certificate_verifier(certificate_chain=self.roots))
        return found


def own_key() -> Path:
    """Return the private key of this user's local stack, which is made where there is none; only its owner reads it."""
    path = Path(os.environ.get("DDPM_HOME") or ".ddpm").resolve() / OWN_KEY
    if not path.exists():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, pem.decode())
    return path


def public_key(private: Path) -> Path:
    """Return the path of the public half of a key, beside it; it is written where it is not there."""
    path = private.with_suffix(".pub")
    if not path.exists():
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(private.read_bytes(), None)
        path.write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    return path


def _there(field: str, path: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise ConfigError(f"{field} = {path}: there is no such file")
    return found


@contextmanager
def _as_folder(text: str) -> Iterator[Path]:
    """Give a folder in which a text lies as a file, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="signed-", dir=scratch_folder()) as scratch:
        folder = Path(scratch)
        (folder / SIGNED_TEXT).mkdir()
        (folder / SIGNED_TEXT / "text.json").write_text(text)
        yield folder
