"""A local stack that other users of the machine cannot use: certificates for SeaweedFS, a password for MLflow.

S3 always requires its key and Ray its token. SeaweedFS's own ports (master, volume, filer, admin, by HTTP and gRPC)
require no credentials unless they use TLS and accept only clients with a certificate of the same authority: then all
other requests are refused. MLflow's app `basic-auth` requires a password.
"""

from __future__ import annotations

import configparser
import datetime
import importlib.util
import ipaddress
import json
import secrets
import ssl
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.environment.credentials import write_private
from pipelines.stack.home import StackError

if TYPE_CHECKING:
    from cryptography import x509

USER = "ddpm"
_DAYS = 3650
_GRPC = ("master", "volume", "filer", "s3", "admin", "worker", "msg_broker", "msg_agent", "mq", "client")
_HTTPS = ("master", "volume", "filer", "admin", "client")


def read_private(home: Path) -> bool:
    """Return whether the stack of this folder was last started as a private one."""
    file = home / "settings.json"
    return file.is_file() and bool(json.loads(file.read_text()).get("private"))


def choose_private(home: Path, private: bool) -> None:
    """Store whether the stack of this folder is private, and create or remove SeaweedFS's settings.

    Raises:
        StackError: a package that a private stack needs is missing.
    """
    if private:
        missing = [name for name in ("cryptography", "flask_wtf") if importlib.util.find_spec(name) is None]
        if missing:
            raise StackError(
                f"a private stack needs {' and '.join(missing)}, which is not installed: "
                "python -m pip install 'ddpm-pipelines[local]'"
            )
        home.chmod(0o700)  # it may exist already
        _ensure_certificates(home / "tls")
        _ensure_password(home)
        write_private(home / "security.toml", security_settings(home / "tls"))
    else:
        (home / "security.toml").unlink(missing_ok=True)  # SeaweedFS reads it wherever it is
    write_private(home / "settings.json", json.dumps({"private": private}))


def security_settings(tls: Path) -> str:
    """Return SeaweedFS's security.toml: mutual TLS for every server and client with the certificates in a folder."""
    authority, certificate, key = (json.dumps(str(tls / name)) for name in ("ca.crt", "node.crt", "node.key"))
    lines = ["[grpc]", f"ca = {authority}"]
    for name in _GRPC:
        lines += [f"[grpc.{name}]", f"cert = {certificate}", f"key = {key}"]
    for name in _HTTPS:
        lines += [f"[https.{name}]", f"cert = {certificate}", f"key = {key}", f"ca = {authority}"]
    return "\n".join([*lines, "enabled = true", ""])  # of https.client, the last


def client_context(home: Path) -> ssl.SSLContext:
    """Return the TLS context with which the owner of a private stack connects to SeaweedFS's own ports."""
    context = ssl.create_default_context(cafile=str(home / "tls" / "ca.crt"))
    context.load_cert_chain(home / "tls" / "node.crt", home / "tls" / "node.key")
    return context


def mlflow_environment(home: Path) -> dict[str, str]:
    """Return the environment of the MLflow server's process; its settings are in a file."""
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "mlflow-auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": (home / "mlflow-session-key").read_text(),
    }


def credentials_file(home: Path) -> Path:
    """Return the credentials file for clients of a private MLflow."""
    return home / "mlflow-credentials"


def _ensure_password(home: Path) -> None:
    """Create MLflow's administrator with a random password, unless it exists."""
    if credentials_file(home).exists():
        return
    password = secrets.token_urlsafe(24)
    server = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{home / 'mlflow-auth.db'}".replace("%", "%%"),
        "admin_username": USER,
        "admin_password": password,
        "grant_default_workspace_access": "false",
    }
    write_private(home / "mlflow-auth.ini", _ini(server))
    write_private(home / "mlflow-session-key", secrets.token_hex(32))
    write_private(
        credentials_file(home), _ini({"mlflow_tracking_username": USER, "mlflow_tracking_password": password})
    )


def _ini(values: dict[str, str]) -> str:
    parser = configparser.ConfigParser(interpolation=None)
    parser["mlflow"] = values
    text = StringIO()
    parser.write(text)
    return text.getvalue()


def _ensure_certificates(folder: Path) -> None:
    """Create an authority and its certificate for both servers and clients, unless they exist."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if (folder / "node.crt").exists():
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ddpm local stack")])

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return x509.CertificateBuilder(
            issuer_name=issuer,
            subject_name=subject,
            public_key=public,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(days=1),
            not_valid_after=now + datetime.timedelta(days=_DAYS),
        )

    def sign(builder: x509.CertificateBuilder) -> str:
        return builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    authority = certificate(issuer, authority_key.public_key())
    authority = authority.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    node = certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, USER)]), key.public_key())
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    node = node.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    node = node.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    encoding = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(folder / "ca.crt", sign(authority))  # its key is not kept
    write_private(folder / "node.key", key.private_bytes(*encoding).decode())
    write_private(folder / "node.crt", sign(node))
