"""Secrets on their way: out of addresses and command lines into environment variables, and to workers by file.

Addresses are visible to others: in MLflow, Ray's dashboard, logs and the process list. User info in an address
(`https://USER:PASSWORD@host`) therefore moves into the variables that the clients of the service read, before
anything is printed, logged or pickled. Processes on other nodes get the path of a file, never what is in it.
"""

from __future__ import annotations

import atexit
import configparser
import os
import re
import secrets
import tempfile
from collections.abc import Collection, Mapping, Sequence
from io import StringIO
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from pipelines.presentation.errors import ConfigError

MLFLOW_FILE = "DDPM_MLFLOW_CREDENTIALS_FILE"
"""The variable that names a file in the form of MLflow's own `~/.mlflow/credentials`."""
MLFLOW_VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
AWS_FILE = "AWS_SHARED_CREDENTIALS_FILE"
AWS_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SETTINGS = {"tracking.uri": "mlflow", "storage.endpoint_url": "s3", "cluster.address": "ray"}
"""Fields of the configuration that hold an address, and the service that is there."""
TITLES = {"mlflow": "MLflow", "s3": "S3", "ray": "Ray"}
"""Names of the services in messages."""
ADDRESS_VARIABLES = {
    "MLFLOW_TRACKING_URI": "mlflow",
    "AWS_ENDPOINT_URL": "s3",
    "AWS_ENDPOINT_URL_S3": "s3",
    "RAY_ADDRESS": "ray",
}
_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+@(?=[^\s@])")
_ARGUMENT = re.compile(rf"\+*({'|'.join(map(re.escape, SETTINGS))})=(['\"]?)(?P<address>.*)\2")


def redact(text: str) -> str:
    """Return a text in which the user info of every address is replaced by ***."""
    return _USER_INFO.sub("***@", text)


def split_address(address: str, service: str) -> tuple[str, dict[str, str]]:
    """Return an address without its user info, and the environment variables that say the same to its clients.

    Args:
        service: "mlflow", "s3" or "ray"; Ray's token is the password, or the user name where there is none.

    Raises:
        ConfigError: it is no address.
    """
    has_scheme = "://" in address
    try:
        parts = urlsplit(address if has_scheme else f"//{address}")
        _ = parts.port  # which is read, and checked, only now
    except ValueError as error:
        raise ConfigError(
            f"{address.rpartition('@')[2]!r} is not an address of {TITLES[service]}: {error}. Write HOST:PORT or "
            "http://HOST:PORT, with the HOST of IPv6 in brackets"
        ) from None
    info, separator, host = parts.netloc.rpartition("@")
    if not separator:
        return address, {}
    user, _, password = (unquote(part) for part in info.partition(":"))
    bare = urlunsplit(parts._replace(netloc=host))
    values = {
        "mlflow": dict(zip(MLFLOW_VARIABLES, (user, password), strict=False)),
        "s3": dict(zip(AWS_VARIABLES, (user, password), strict=False)),
        "ray": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": password or user},
    }[service]
    return bare if has_scheme else bare.removeprefix("//"), {key: value for key, value in values.items() if value}


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that differ once the addresses in an environment hold no user info; often none."""
    changed: dict[str, str] = {}
    for name, service in ADDRESS_VARIABLES.items():
        bare, found = split_address(environ.get(name, ""), service)
        if found:
            changed |= {name: bare, **found}
    return changed


def clean_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments of a command without user info in their addresses, and the variables that replace it."""
    cleaned: list[str] = []
    variables: dict[str, str] = {}
    for argument in arguments:
        match = _ARGUMENT.fullmatch(argument)
        bare, found = split_address(match["address"], SETTINGS[match[1]]) if match else ("", {})
        if match and found:
            start, end = match.span("address")
            argument = argument[:start] + bare + argument[end:]
            variables |= found
        cleaned.append(argument)
    return cleaned, variables


def hand_over(environ: Mapping[str, str], home: Path, services: Collection[str]) -> dict[str, str]:
    """Write the secrets of an environment into files for the processes of a training, and return what names the files.

    The files are readable by their user alone, and are removed when this process ends. Where the environment names a
    file already, that one counts.

    Args:
        home: the folder in which they are put; one below TMPDIR where it cannot be written.
        services: of "mlflow" and "s3", those whose secrets are wanted.
    """
    named: dict[str, str] = {}
    has_mlflow = any(environ.get(name) for name in MLFLOW_VARIABLES[1:])
    if "mlflow" in services and has_mlflow and not environ.get(MLFLOW_FILE):
        values = {name.lower(): environ[name] for name in MLFLOW_VARIABLES if environ.get(name)}
        named[MLFLOW_FILE] = _write(home, "mlflow", "mlflow", values)
    if "s3" in services and all(environ.get(name) for name in AWS_VARIABLES[:2]) and not environ.get(AWS_FILE):
        values = {name.lower(): environ[name] for name in AWS_VARIABLES if environ.get(name)}
        named[AWS_FILE] = _write(home, "aws", "default", values)
    return named


def read_mlflow_file(path: Path) -> dict[str, str]:
    """Return the variables in a file of MLflow credentials; empty if this node has no such file."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(path)
    found = parser["mlflow"] if parser.has_section("mlflow") else {}
    return {name: found[name.lower()] for name in MLFLOW_VARIABLES if found.get(name.lower())}


def write_private(path: Path, text: str) -> None:
    """Write a file atomically, readable by the user only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def create_private(path: Path, text: str) -> bool:
    """Create a file atomically, readable by the user only; return False, and leave it unchanged, where it exists."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    write_private(temporary, text)
    try:
        os.link(temporary, path)  # unlike a rename, it fails where the name is taken
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink()


def _write(home: Path, service: str, section: str, values: Mapping[str, str]) -> str:
    """Write an ini file that is deleted when this process ends, and return its path."""
    parser = configparser.ConfigParser(interpolation=None)
    parser[section] = dict(values)
    text = StringIO()
    parser.write(text)
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = home / f"{service}-credentials-{secrets.token_hex(6)}"
        write_private(path, text.getvalue())
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="ddpm-")) / f"{service}-credentials"
        write_private(path, text.getvalue())
    atexit.register(path.unlink, missing_ok=True)
    return str(path)
