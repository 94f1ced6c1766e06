"""The command that a cluster runs: its words, its name, and the addresses in the environment of its processes."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pipelines.config import Config, ConfigError, conf_dir
from pipelines.environment.credentials import split_address
from pipelines.environment.loopback import is_loopback
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import StageNotice

VERBS = ("ingest", "index", "check", "train", "evaluate", "register", "flow", "search")
"""Verbs that can run on a cluster: those that write to storage, not to the caller's disk."""
OF_DATASETS = ("index", "check")
"""Those about the dataset at an address."""
FLAGS = ("--dry-run", "--json", "--quarantine", "--quiet", "--replace", "--resume")
"""Options of these verbs that take no value."""
BY_ENVIRONMENT = ("tracking.uri", "storage.endpoint_url", "storage.region", "cluster.address")
"""Settings that are passed to the processes of a cluster as environment variables, which all clients read."""
REGION = "us-east-1"
NAME_LENGTH = 47
"""Largest number of characters of a RayJob's name: KubeRay 1.7 appends to it for the cluster and its services."""


class LaunchError(PipelineError):
    """A command could not be started on a cluster, or failed there."""


@dataclass(frozen=True)
class ClusterCommand:
    """A command for a cluster.

    Attributes:
        verb: verb, such as "train" or "search training".
        arguments: words after the verb, without settings of the launch and addresses.
        config: configuration with every address.
    """

    verb: str
    arguments: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        """Name of the job, always the same for the same command: the name of the run, or of the dataset that a verb is
        about, and the verb unless it is `train`."""
        about = self.config.name
        if self.verb in OF_DATASETS and not any(_key(word) == "name" for word in self.arguments):
            about = _last_part(self.arguments) or about
        return about if self.verb == "train" else f"{about}-{self.verb.replace(' ', '-')}"

    @property
    def stop_variables(self) -> dict[str, str]:
        """Environment variables with the time that Ray's job server gives a stopped command; its default of 3 s is
        too short."""
        assert self.config.launch is not None
        return {"RAY_JOB_STOP_WAIT_TIME_S": str(self.config.launch.stop_wait_s)}

    @property
    def object_name(self) -> str:
        """The name in the form of Kubernetes."""
        return object_name(self.name)

    def with_default(self, key: str, value: object) -> ClusterCommand:
        """Return the command with an override, unless the command sets the field already."""
        if any(_key(word) == key for word in self.arguments):
            return self
        return replace(self, arguments=(*self.arguments, f"{key}={value}"))

    def on_spot(self) -> ClusterCommand:
        """Return the command for spot nodes, whose losses do not count as failures."""
        return self.with_default("cluster.max_preemption_failures", -1)

    def shell(self, program: str = "ddpm") -> str:
        """Return the command as one line for a shell.

        Args:
            program: command of this program on the cluster; it may be several words.
        """
        return f"{program} {shlex.join([*self.verb.split(), *self.arguments])}"

    def environment(self) -> dict[str, str]:
        """Return the environment variables for storage and tracking: addresses, no secrets."""
        storage, found = self.config.storage, {}
        if self.config.tracking.uri:
            found["MLFLOW_TRACKING_URI"] = self.config.tracking.uri
        if storage.root.startswith("s3://"):
            if storage.endpoint_url:
                found["AWS_ENDPOINT_URL"] = storage.endpoint_url
            # boto3 reads the first, pyarrow the second.
            found["AWS_DEFAULT_REGION"] = found["AWS_REGION"] = storage.region or REGION
        return found


def object_name(name: str) -> str:
    """Return the Kubernetes name (RFC 1035) of a job, with a part of its digest if the name has to be changed.

    Different names stay different.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain == name and plain[0].isalpha() and len(plain) <= NAME_LENGTH:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    start = plain if plain[:1].isalpha() else f"run-{plain}"
    return f"{start[: NAME_LENGTH - 9].strip('-')}-{digest}"


def check_same(job: str, running: str, asked: str, stop: str) -> None:
    """Check that a running job of the same name has the requested command: a name does not determine settings or MODEL.

    Args:
        job: description of the job.
        running: its command; empty if unknown.
        asked: requested command.
        stop: command that stops the job.

    Raises:
        LaunchError: the commands differ.
    """
    if running not in ("", asked):
        raise LaunchError(
            f"{job} already runs another command: `{running}`. The new one is `{asked}`: wait until that has ended, "
            f"stop it with `{stop}`, or choose another name="
        )


@contextmanager
def detachable(notice: StageNotice, text: str) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM end this block, which follows a command, and say that the command keeps running."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # background processes of a shell ignore SIGINT
            before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        notice("launch", f"detached; {text}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_command(words: Sequence[str], config: Config) -> ClusterCommand:
    """Return the command of these words in the form for a cluster; studies resume.

    Args:
        words: verb and arguments, as on the command line.
        config: configuration of the overrides among them.

    Raises:
        ConfigError: the verb cannot run on a cluster, or an argument is about this machine.
    """
    verb, rest = _split(words)
    for word in rest:
        if word in ("--config", "--out", "--save") or word.startswith(("--config=", "--out=", "--save=")):
            raise ConfigError(f"{word} names a file of this machine, which a cluster does not have: omit it")
        if word.startswith("budget="):
            raise ConfigError(
                f"{word}: a plan is made for the machine that it is made on. Make it with `ddpm plan`, and launch "
                "`flow` with the settings that it proposes and data.source=…"
            )
        if _key(word) == "storage.credentials_file":
            raise ConfigError(f"{word} is a file of this machine: a cluster has a role, or keys in a Secret of its own")
    for option, value in itertools.pairwise(word for given in rest for word in given.split("=", 1)):
        if option == "--space" and value.endswith((".yaml", ".yml")):
            shipped = ", ".join(sorted(path.stem for path in (conf_dir() / "search").glob("*.yaml")))
            raise ConfigError(
                f"--space {value} is a file of this machine, which a cluster does not have: name one of {shipped}, and "
                "change it by overrides such as search.space.optim.lr.log=[1e-4,1e-2]"
            )
    kept = [word for word in rest if _key(word) not in BY_ENVIRONMENT and not _is_launch(word)]
    if verb.startswith("search "):  # a launch is repeated, by who types it again and by KubeRay
        kept = ["--resume", *(word for word in kept if word != "--resume")]
    return ClusterCommand(verb, tuple(kept), config)


def overrides_of(words: Sequence[str]) -> list[str]:
    """Return the overrides of the configuration among the words of a command; `search.…` belongs to the verb."""
    rest = _split(words)[1]
    found, value_of_option = [], False
    for word in rest:
        if not value_of_option and _key(word) and not _key(word).startswith(("search.", "budget")):
            found.append(word)
        value_of_option = word.startswith("--") and "=" not in word and word not in FLAGS
    return found


def with_addresses(config: Config, environ: Mapping[str, str]) -> Config:
    """Return the configuration with addresses from the environment filled in, without user info in them."""
    storage, track = config.storage, config.tracking
    uri = track.uri or environ.get("MLFLOW_TRACKING_URI")
    endpoint = storage.endpoint_url or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    region = storage.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    track = track.model_copy(update={"uri": split_address(uri, "mlflow")[0] if uri else None})
    storage = storage.model_copy(
        update={"endpoint_url": split_address(endpoint, "s3")[0] if endpoint else None, "region": region or None}
    )
    return config.model_copy(update={"storage": storage, "tracking": track})


def require_reachable(config: Config, *, share_folders: bool = False) -> None:
    """Check that the nodes of a cluster can reach storage and tracking.

    Args:
        share_folders: whether the nodes may share a folder.

    Raises:
        ConfigError: an address is missing or is of this machine.
    """
    storage, uri = config.storage, config.tracking.uri
    if storage.local_stack and not storage.endpoint_url:
        raise ConfigError(
            "storage=local is the S3 of this machine's stack, which a cluster cannot reach: use "
            "storage=s3 storage.root=s3://BUCKET, and storage.endpoint_url=… where it is not AWS's"
        )
    if storage.root.startswith("file://") and not share_folders:
        raise ConfigError(
            f"storage.root = {storage.root}: the nodes of a new cluster share no folder; use s3://BUCKET or another "
            "store that all of them reach"
        )
    if uri is None:
        raise ConfigError(
            "tracking.uri has no value, and a cluster has no local stack: set tracking.uri=http://HOST:5000, as its "
            "nodes see it, or MLFLOW_TRACKING_URI"
        )
    here = is_loopback(config.cluster.address or "")  # then the cluster may be on this machine
    for setting, address in (("tracking.uri", uri), ("storage.endpoint_url", storage.endpoint_url)):
        if address and is_loopback(address) and not here:
            raise ConfigError(f"{setting} = {address} is this machine: name the address that the cluster's nodes see")


def _split(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb and the words after it."""
    verb = words[0] if words else ""
    if verb not in VERBS:
        raise ConfigError(f"'{verb}' cannot be launched on a cluster. Allowed: {', '.join(VERBS)}")
    if verb != "search":
        return verb, list(words[1:])
    if len(words) < 2 or words[1] not in ("training", "guidance"):
        raise ConfigError("search: write `search training` or `search guidance`")
    return f"search {words[1]}", list(words[2:])


def _key(word: str) -> str:
    """Return the field or group that an override sets; "" for other words."""
    match = re.fullmatch(r"(?:\+{0,2})([A-Za-z_][\w./@]*)=.*", word, re.DOTALL)
    return match[1] if match else ""


def _last_part(words: Sequence[str]) -> str:
    """Return the last part of the first address among words, in the characters of a name."""
    address = next((word for word in words if re.match(r"[a-z][a-z0-9+.-]*://", word)), "")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", address.rstrip("/").rpartition("/")[2]).strip("._-")


def _is_launch(word: str) -> bool:
    return _key(word) == "launch" or _key(word).startswith("launch.")
