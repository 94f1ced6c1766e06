"""IAM policies of the roles of an EC2 cluster, and the lifecycle rules of the S3 bucket.

They grant the minimum: objects below the prefixes that this program writes, and the machines of one cluster.
"""

from __future__ import annotations

from typing import Any

from pipelines.config import AwsLaunch, Config
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
    if config.data.uri.startswith("s3://"):
        data_bucket, data_prefix = split(config.data.uri)
        if data_bucket != bucket or not data_prefix.startswith(f"{prefix}{layout.DATASETS}/"):
            statements += [
                _list("ListData", data_bucket, [f"{data_prefix}*"]),
                {
                    "Sid": "ReadData",
                    "Effect": "Allow",
                    "Action": ["s3:GetObject"],
                    "Resource": [f"arn:aws:s3:::{data_bucket}/{data_prefix}*"],
                },
                {
                    "Sid": "KeepWhatJudges",
                    "Effect": "Allow",
                    "Action": ["s3:PutObject"],
                    "Resource": [
                        f"arn:aws:s3:::{data_bucket}/{data_prefix}{folder}/*" for folder in layout.BESIDE_DATA
                    ],
                },
            ]
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
