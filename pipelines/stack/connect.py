"""Addresses of S3, MLflow and Ray: from the configuration, else the environment, else the local stack."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipelines import stack
from pipelines.config import Config, ConfigError
from pipelines.environment.credentials import (
    MLFLOW_FILE,
    SETTINGS,
    TITLES,
    clean_environment,
    hand_over,
    redact,
    split_address,
)
from pipelines.presentation.progress import StageNotice, no_stage_notice
from pipelines.stack import StackState
from pipelines.storage import StorageError, address_forms, check_address


def missing_services(config: Config, environ: Mapping[str, str], wanted: Collection[str]) -> list[str]:
    """Return the services of `wanted` ("s3", "mlflow", "ray") without an address in configuration and environment."""
    named = {
        "s3": not config.storage.root.startswith("s3://")
        or not config.storage.local_stack
        or bool(config.storage.endpoint_url or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")),
        "mlflow": bool(config.tracking.uri or environ.get("MLFLOW_TRACKING_URI")),
        "ray": bool(config.cluster.address or environ.get("RAY_ADDRESS")),
    }
    return [service for service in stack.SERVICES if service in wanted and not named[service]]


def check_addresses(config: Config) -> None:
    """Check the addresses of a configuration before any service is started or contacted.

    Raises:
        ConfigError: no registered storage answers `storage.root`, `data.uri` or the address of a source.
    """
    for setting, address in (("storage.root", config.storage.root), *data_addresses(config)):
        try:
            check_address(address.rstrip("/"))
        except StorageError:
            raise ConfigError(f"{setting} = {address}: addresses are {address_forms()}") from None


def data_addresses(config: Config) -> list[tuple[str, str]]:
    """Return the addresses of datasets in a configuration, with the setting that each is of."""
    sources = [(f"data.sources: uri of '{source.name}'", source.uri) for source in config.data.sources]
    return [("data.uri", config.data.uri), *sources]


def fill(
    config: Config, environ: Mapping[str, str], state: StackState | None, services: Collection[str] = stack.SERVICES
) -> Config:
    """Return the configuration with every address filled in, and model folders by their absolute paths.

    Args:
        state: state of the local stack; None if it is not needed.
        services: whose addresses the local stack may give. A verb gets no address of a service for which it has no
            `client_environment`: without the token, a driver would wait for the local Ray head for many minutes.

    Raises:
        ConfigError: the local stack does not have the requested bucket.
    """
    storage, track, cluster = config.storage, config.tracking, config.cluster
    track = track.model_copy(update={"uri": track.uri or environ.get("MLFLOW_TRACKING_URI") or None})
    cluster = cluster.model_copy(update={"address": cluster.address or environ.get("RAY_ADDRESS") or None})
    if state is not None:
        given = missing_services(config, environ, services)
        if state.s3_endpoint and "s3" in given:
            if storage.root != f"s3://{state.bucket}" and not storage.root.startswith(f"s3://{state.bucket}/"):
                raise ConfigError(
                    f"storage.root = {storage.root}: the local stack has the bucket {state.bucket}; "
                    f"use storage.root=s3://{state.bucket}, or storage=s3 for another server"
                )
            storage = storage.model_copy(
                update={"endpoint_url": state.s3_endpoint, "credentials_file": str(state.credentials_file)}
            )
        if "mlflow" in given:
            track = track.model_copy(update={"uri": state.tracking_uri})
        if "ray" in given:
            cluster = cluster.model_copy(update={"address": state.ray_address})
    update: dict[str, object] = {"storage": storage, "tracking": track, "cluster": cluster}
    if config.init_from is not None:
        update["init_from"] = anywhere(config.init_from)
    guiding = {name: getattr(config.guidance, name) for name in ("classifier", "weak")}
    if named := {name: anywhere(reference) for name, reference in guiding.items() if reference is not None}:
        update["guidance"] = config.guidance.model_copy(update=named)
    return config.model_copy(update=update)


def anywhere(reference: str) -> str:
    """Return a MODEL reference that is valid in other working directories, such as those of workers."""
    return reference if ":/" in reference else str(Path(reference).absolute())


def connect(
    config: Config,
    environ: Mapping[str, str],
    wanted: Collection[str],
    *,
    home: Path | None = None,
    notice: StageNotice = no_stage_notice,
) -> Config:
    """Start the required services of the local stack, and return the configuration with every address filled in.

    No address keeps user info: it moves into this process's environment, from which a training's processes get the
    paths of files. Call it before ray is imported, because a driver of the local Ray head needs
    `stack.ray_environment` by then.

    Args:
        wanted: required services, of "s3", "mlflow" and "ray".
        home: folder of the local stack; None for the default.
        notice: called with a service and its phase.

    Raises:
        StackError: a service of the local stack does not start.
    """
    config, environ = _without_secrets_here(config, environ)
    missing = missing_services(config, environ, wanted)
    state = stack.up(home, missing, notice=notice) if missing else None
    os.environ.update(client_environment(state, missing))
    filled = fill(config, environ, state, missing)
    if "ray" in wanted:
        has_keys = filled.storage.credentials_file or not filled.storage.root.startswith("s3://")
        services = ["mlflow"] if has_keys else ["mlflow", "s3"]
        os.environ.update(hand_over(os.environ, home or stack.default_home(), services))
    return filled


def connect_running(
    config: Config, environ: Mapping[str, str], wanted: Collection[str], *, home: Path | None = None
) -> tuple[Config, list[str]]:
    """Return the configuration with the addresses of running services, and the services that the local stack has to
    run.

    It starts nothing: services that do not run have no address.
    """
    config, environ = _without_secrets_here(config, environ)
    missing = missing_services(config, environ, wanted)
    state = stack.read_state(home) if missing else None
    os.environ.update(client_environment(state, missing))
    return fill(config, environ, state, missing), missing


def find_running(
    config: Config,
    environ: Mapping[str, str],
    wanted: Collection[str],
    *,
    optional: Collection[str] = (),
    home: Path | None = None,
) -> Config:
    """Return the configuration with every address filled in, without starting anything, for verbs that only read or
    delete.

    Call it before ray is imported, as `connect`.

    Args:
        wanted: required services, of "s3", "mlflow" and "ray".
        optional: services whose addresses are filled in if they are running.
        home: folder of the local stack; None for the default.

    Raises:
        StackError: a required service has no address in configuration and environment, and is not running here.
    """
    config, environ = _without_secrets_here(config, environ)
    missing = missing_services(config, environ, [*wanted, *optional])
    state = stack.read_state(home) if missing else None
    running = {
        "s3": state is not None and state.s3_endpoint is not None,
        "mlflow": state is not None and state.tracking_uri is not None,
        "ray": state is not None and state.ray_address is not None,
    }
    down = [service for service in missing if service in wanted and not running[service]]
    if down:
        raise stack.StackError(
            f"{' and '.join(TITLES[service] for service in down)} of the local stack "
            f"{'is' if len(down) == 1 else 'are'} not running, and no other is named: start the stack with `ddpm up`, "
            f"or set {' and '.join(_SETTINGS[service] for service in down)}"
        )
    found = [service for service in missing if running[service]]
    os.environ.update(client_environment(state, found))
    return fill(config, environ, state, found)


def _without_secrets_here(config: Config, environ: Mapping[str, str]) -> tuple[Config, dict[str, str]]:
    """Return configuration and environment without user info in addresses, which is moved into this process's
    environment.

    Raises:
        ConfigError: an address is malformed, or has a password in it that cannot be moved.
    """
    os.environ.update(clean_environment(os.environ))
    config, variables = without_secrets(config)
    os.environ.update(variables)
    check_addresses(config)
    return config, {**environ, **clean_environment(environ), **variables}


def client_environment(state: StackState | None, missing: Collection[str]) -> dict[str, str]:
    """Return the environment variables that a process has to set for the services of the local stack.

    Args:
        missing: services without an address in configuration and environment.
    """
    if state is None:
        return {}
    variables = stack.ray_environment(state.home) if "ray" in missing else {}
    if "mlflow" in missing and state.mlflow_credentials_file:
        variables[MLFLOW_FILE] = str(state.mlflow_credentials_file)
    return variables


def without_secrets(config: Config) -> tuple[Config, dict[str, str]]:
    """Return the configuration without user info in its addresses, and the variables that give it to clients.

    Raises:
        ConfigError: an address for which there is no such variable has a password in it.
    """
    variables: dict[str, str] = {}
    for setting, service in SETTINGS.items():
        section, field = setting.split(".")
        address = getattr(getattr(config, section), field)
        bare, found = split_address(address or "", service)
        if found:
            changed = getattr(config, section).model_copy(update={field: bare})
            config = config.model_copy(update={section: changed})
            variables |= found
    others = [("storage.root", config.storage.root), ("data.source", config.data.source)]
    for setting, address in [*others, *data_addresses(config)]:
        if address and (urlsplit(address).password or "") != "":
            raise ConfigError(
                f"{setting} = {redact(address)} has a password in it, which would be shown with the address: "
                "put it into a file of the folder that FSSPEC_CONFIG_DIR names, and leave it out here"
            )
    return config, variables


_SETTINGS = {"s3": "storage=s3 storage.root=…", "mlflow": "tracking.uri=…", "ray": "cluster.address=…"}
