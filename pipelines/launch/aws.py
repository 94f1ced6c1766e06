"""A command on EC2: files for `ray up`, the IAM policies of two roles, and the lifecycle rules of the bucket.

The policies grant the minimum: objects below the prefixes that this program writes, and the machines of one cluster.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from pipelines.config import AwsLaunch, Config, ConfigError
from pipelines.launch.command import ClusterCommand, require_reachable
from pipelines.launch.kuberay import dump
from pipelines.launch.pods import cache_gib
from pipelines.storage import layout

VERSION = "2012-10-17"
ABORT_DAYS = 7
TRANSIENT_DAYS = 1

Statement = dict[str, Any]


def worker_policy(config: Config) -> dict[str, Any]:
    """Return the policy of every node: the folders of this program in the bucket, and the dataset if it is elsewhere.

    Listing has the condition `…IfExists`: a request for a missing object returns 404 only to users who may list the
    bucket, and such a request has no prefix. Without it, the answer would be "forbidden".
    """
    bucket, prefix = split(config.storage.root)
    folders = [*(f"{prefix}{folder}/*" for folder in layout.FOLDERS), f"{prefix}{layout.PROBE_PREFIX}*"]
    statements = [
        _list("ListFolders", bucket, [f"{prefix}{folder}/*" for folder in layout.FOLDERS]),
        {
            "Sid": "ReadAndWriteFolders",
            "Effect": "Allow",
            "Action": ["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"],
            "Resource": [f"arn:aws:s3:::{bucket}/{folder}" for folder in folders],
        },
    ]
    addresses = dict.fromkeys([config.data.uri, *(source.uri for source in config.data.sources)])
    for number, address in enumerate(uri for uri in addresses if uri.startswith("s3://")):
        data_bucket, data_prefix = split(address)
        if data_bucket != bucket or not data_prefix.startswith(f"{prefix}{layout.DATASETS}/"):
            more = str(number) if number else ""
            statements += [
                _list(f"ListData{more}", data_bucket, [f"{data_prefix}*"]),
                {
                    "Sid": f"ReadData{more}",
                    "Effect": "Allow",
                    "Action": ["s3:GetObject"],
                    "Resource": [f"arn:aws:s3:::{data_bucket}/{data_prefix}*"],
                },
            ]
            if address == config.data.uri:
                beside = [f"arn:aws:s3:::{data_bucket}/{data_prefix}{folder}/*" for folder in layout.BESIDE_DATA]
                judges: Statement = {"Sid": "KeepWhatJudges", "Effect": "Allow", "Action": ["s3:PutObject"]}
                statements.append({**judges, "Resource": beside})
    return {"Version": VERSION, "Statement": statements}


def head_policy(config: Config, launch: AwsLaunch, cluster_name: str) -> dict[str, Any]:
    """Return the additional policy of the head, whose autoscaler starts and terminates machines.

    It may start machines that are tagged with the name of this cluster, and terminate or tag only those.
    """
    account = launch.account or "*"
    arn = f"arn:aws:ec2:{launch.region}:{account}"
    tag = "ray-cluster-name"
    needed = ("network-interface", "security-group", "subnet", "volume", "key-pair")
    statements: list[Statement] = [
        {
            "Sid": "LookAtMachines",  # these calls cannot be limited to resources
            "Effect": "Allow",
            "Action": ["ec2:DescribeImages", "ec2:DescribeInstances", "ec2:DescribeInstanceTypes"],
            "Resource": "*",
            "Condition": {"StringEquals": {"aws:RequestedRegion": launch.region}},
        },
        {
            "Sid": "StartWorkers",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [f"{arn}:instance/*"],
            "Condition": {
                "StringEquals": {f"aws:RequestTag/{tag}": cluster_name, "ec2:InstanceType": launch.instance_type}
            },
        },
        {
            "Sid": "StartWorkersWith",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [
                *(f"{arn}:{kind}/*" for kind in needed),
                f"arn:aws:ec2:{launch.region}::image/*",
                *([f"{arn}:spot-instances-request/*"] if launch.spot else []),
            ],
        },
        {
            "Sid": "TagWhatIsStarted",
            "Effect": "Allow",
            "Action": "ec2:CreateTags",
            "Resource": f"{arn}:instance/*",
            "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
        },
        {
            "Sid": "TagAndEndOwnWorkers",
            "Effect": "Allow",
            "Action": ["ec2:CreateTags", "ec2:TerminateInstances"],
            "Resource": f"{arn}:instance/*",
            "Condition": {"StringEquals": {f"aws:ResourceTag/{tag}": cluster_name}},
        },
        {
            "Sid": "GiveWorkersTheirRole",
            "Effect": "Allow",
            "Action": "iam:PassRole",
            "Resource": f"arn:aws:iam::{account}:role/{launch.worker_profile}",
            "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        },
    ]
    if launch.ami.startswith("resolve:ssm:/aws/service/"):
        parameter = launch.ami.removeprefix("resolve:ssm:")
        statements.append(
            {
                "Sid": "FindTheMachineImage",
                "Effect": "Allow",
                "Action": ["ssm:GetParameters"],
                "Resource": f"arn:aws:ssm:{launch.region}::parameter{parameter}",
            }
        )
    return {"Version": VERSION, "Statement": statements}


def lifecycle(root: str) -> dict[str, Any]:
    """Return the lifecycle configuration of the bucket.

    No rule deletes data of runs by age: `checkpoints.json` lists the checkpoints that a restart may use, and a run that
    pauses for a month still needs the newest one. Only the owner of the list and `ddpm gc` delete those. S3 deletes
    parts of incomplete uploads, which no listing shows, and probes.
    """
    prefix = split(root)[1]
    return {
        "Rules": [
            {
                "ID": "ddpm-abort-incomplete-uploads",
                "Status": "Enabled",
                "Filter": {"Prefix": prefix},
                "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": ABORT_DAYS},
            },
            {
                "ID": "ddpm-expire-probes",
                "Status": "Enabled",
                "Filter": {"Prefix": f"{prefix}{layout.PROBE_PREFIX}"},
                "Expiration": {"Days": TRANSIENT_DAYS},
            },
        ]
    }


def split(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of an address; the prefix is "" or ends with a slash."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    key = key.strip("/")
    return bucket, f"{key}/" if key else ""


def _list(sid: str, bucket: str, prefixes: list[str]) -> Statement:
    return {
        "Sid": sid,
        "Effect": "Allow",
        "Action": ["s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{bucket}"],
        "Condition": {"StringLikeIfExists": {"s3:prefix": prefixes}},
    }


CLUSTER_FILE = "cluster.yaml"


def files(command: ClusterCommand) -> dict[str, str]:
    """Return the files of a cluster by name.

    Raises:
        ConfigError: settings are incompatible or missing.
    """
    launch, config = launch_of(command), command.config
    require_reachable(config)
    if not config.storage.root.startswith("s3://"):
        raise ConfigError(f"storage.root = {config.storage.root}: a cluster on EC2 has a role for S3: use s3://BUCKET")
    name = command.object_name
    return {
        CLUSTER_FILE: dump(cluster(command)),
        "iam-head.json": _json(head_policy(config, launch, name)),
        "iam-worker.json": _json(worker_policy(config)),
        "s3-lifecycle.json": _json(lifecycle(config.storage.root)),
    }


def cluster(command: ClusterCommand) -> dict[str, Any]:
    """Return the cluster file of `ray up`: an on-demand head, and workers on spot instances if `launch.spot`.

    Raises:
        ConfigError: the workers do not divide evenly into instances.
    """
    launch, config = launch_of(command), command.config
    fewest, most = (_nodes(count, launch) for count in (config.cluster.min_workers, config.cluster.max_workers))
    if launch.spot:
        command = command.on_spot()
    return {
        "cluster_name": command.object_name,
        "max_workers": most,
        "idle_timeout_minutes": launch.idle_min,
        # Not read by Ray: the command is stored with its cluster.
        "metadata": {"entrypoint": command.shell(), "submission_id": command.name},
        "provider": {
            "type": "aws",
            "region": launch.region,
            "availability_zone": launch.zone,
            "cache_stopped_nodes": False,  # `ray down` terminates; stopped nodes would keep billing their disks
        },
        "auth": {"ssh_user": "ubuntu"},
        "docker": _docker(command, launch),
        "head_node_type": "head",
        "available_node_types": {
            # Services, driver and autoscaler; no CPUs and GPUs are offered, so no training runs here.
            "head": {
                "resources": {"CPU": 0, "GPU": 0},
                "node_config": _node(launch.head_instance_type, launch.head_profile, launch.disk_gib, launch),
            },
            "worker": {
                "resources": {},  # `ray up` fills in the resources of the instance type
                "min_workers": fewest,
                "max_workers": most,
                "node_config": {
                    **_node(launch.instance_type, launch.worker_profile, launch.disk_gib + cache_gib(config), launch),
                    **({"InstanceMarketOptions": {"MarketType": "spot"}} if launch.spot else {}),
                },
            },
        },
        "initialization_commands": ["sudo usermod -aG docker $USER"],  # on the machine, before the container starts
        # Empty, not absent: Ray fills in a missing list with its own, which installs a nightly build of Ray.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        # In the container. The dashboard listens on loopback only, because its users can run commands.
        "head_start_ray_commands": [
            "ray stop",
            "ray start --head --port=6379 --object-manager-port=8076 --num-cpus=0 --num-gpus=0 "
            "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", "ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076"],
    }


def next_steps(command: ClusterCommand, folder: Path) -> list[str]:
    """Return the next commands of the user, after the files are written."""
    file, launch = shlex.quote(str(folder / CLUSTER_FILE)), launch_of(command)
    if launch.spot:
        command = command.on_spot()
    submit = (
        f"ray job submit --no-wait --address http://127.0.0.1:8265 --submission-id {command.name} -- {command.shell()}"
    )
    return [
        f"roles: {launch.head_profile} with iam-head.json and iam-worker.json, {launch.worker_profile} with "
        "iam-worker.json",
        f"ray up {file}",
        f"ray exec {file} {shlex.quote(submit)}",
        f"ray exec {file} {shlex.quote(f'ray job logs --follow {command.name}')}",
        f"ray down {file}      (the nodes cost money until here)",
    ]


def launch_of(command: ClusterCommand) -> AwsLaunch:
    """Return the settings of the launch."""
    assert isinstance(command.config.launch, AwsLaunch)
    return command.config.launch


def _docker(command: ClusterCommand, launch: AwsLaunch) -> dict[str, Any]:
    """Return the containers. Their variables reach `ray start` and so every Ray worker: addresses, no keys."""
    variables = command.environment() | {"AWS_REGION": launch.region, "AWS_DEFAULT_REGION": launch.region}
    variables |= command.stop_variables
    options = [f"--env={name}={value}" for name, value in variables.items()]
    return {
        "container_name": "ddpm",
        "image": launch.image,
        "head_image": launch.head_image or launch.image,
        "pull_before_run": True,
        "run_options": [*options, "--ulimit=nofile=65536:65536"],
        "worker_run_options": ["--gpus=all"] if command.config.cluster.gpus_per_worker else [],
    }


def _node(instance_type: str, profile: str, disk_gib: int, launch: AwsLaunch) -> dict[str, Any]:
    """Return the EC2 request of a node."""
    return {
        "InstanceType": instance_type,
        "ImageId": launch.ami,
        "IamInstanceProfile": {"Name": profile},
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 2},
        "BlockDeviceMappings": [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": disk_gib, "VolumeType": "gp3", "Encrypted": True}}
        ],
    }


def _nodes(workers: int, launch: AwsLaunch) -> int:
    if workers % launch.workers_per_node:
        raise ConfigError(
            f"cluster.num_workers: {workers} workers do not divide into instances of "
            f"launch.workers_per_node = {launch.workers_per_node}"
        )
    return workers // launch.workers_per_node


def _json(plain: dict[str, Any]) -> str:
    return json.dumps(plain, indent=2) + "\n"
