"""The files of a cluster on EC2: Ray's schema, roles that may do what they need, rules that delete no checkpoint."""

import json
import re
import warnings
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.config import ConfigError
from pipelines.launch import aws
from pipelines.launch.aws import lifecycle
from pipelines.storage import layout
from tests.pipelines.launch.rendered import GPU, TRAIN, command

AWS = ["launch.image=registry/ddpm:1-cuda", "launch.head_image=registry/ddpm:1-cpu", *GPU]
VARIANTS = {
    "plain": [],
    "on-demand": ["launch.spot=false"],
    "elastic": ["cluster.num_workers=[1,4]"],
    "packed": ["cluster.num_workers=16", "launch.workers_per_node=8", "launch.instance_type=p4d.24xlarge"],
    "cpu": ["cluster.gpus_per_worker=0"],
    "account": ["launch.account='123456789012'", "launch.ami=ami-1", "data.uri=s3://other/sets/birds"],
}
ALL = pytest.mark.parametrize("more", VARIANTS.values(), ids=VARIANTS)


@cache
def files(*more):
    return aws.files(command("aws", *TRAIN, *AWS, *more))


def cluster(*more):
    return yaml.safe_load(files(*more)["cluster.yaml"])


def policy(role, *more):
    return {s["Sid"]: s for s in json.loads(files(*more)[f"iam-{role}.json"])["Statement"]}


@ALL
def test_rays_own_schema_takes_the_cluster_file(more):
    config = prepare_config(cluster(*more))
    validate_config(config)
    # prepare_config fills gaps from Ray's defaults, among them the install of a nightly wheel.
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert not [command for command in commands if "pip install" in command]


def test_rays_schema_refuses_a_misspelt_field():
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**cluster(), "max_wrokers": 2}))


def test_the_head_is_on_demand_and_offers_nothing_and_the_workers_are_spot():
    types = cluster()["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "--num-cpus=0 --num-gpus=0" in cluster()["head_start_ray_commands"][-1]
    assert "InstanceMarketOptions" not in cluster("launch.spot=false")["available_node_types"]["worker"]["node_config"]


def test_the_number_of_instances_is_that_of_the_workers():
    def numbers(*more):
        found = cluster(*more)
        worker = found["available_node_types"]["worker"]
        return worker["min_workers"], worker["max_workers"], found["max_workers"]

    assert numbers() == (2, 2, 2)
    assert numbers("cluster.num_workers=[1,4]") == (1, 4, 4)
    assert numbers(*VARIANTS["packed"]) == (2, 2, 2)
    with pytest.raises(ConfigError, match="3 workers do not divide into instances"):
        files("cluster.num_workers=3", "launch.workers_per_node=2")


def test_the_command_is_kept_with_its_cluster():
    kept = cluster()["metadata"]
    assert kept["entrypoint"].startswith("ddpm train +experiment=digits name=first")
    assert kept["entrypoint"].endswith("cluster.max_preemption_failures=-1")
    assert "max_preemption_failures" not in cluster("launch.spot=false")["metadata"]["entrypoint"]
    steps = aws.next_steps(command("aws", *TRAIN, *AWS), Path("there"))
    assert any(step.startswith("ray exec there/cluster.yaml") and "--submission-id first" in step for step in steps)


def test_nodes_have_roles_instead_of_keys_and_their_own_region():
    found = cluster("launch.region=eu-west-1", "launch.zone=eu-west-1b", "storage.region=us-east-1")
    profiles = [t["node_config"]["IamInstanceProfile"]["Name"] for t in found["available_node_types"].values()]
    assert profiles == ["ddpm-head", "ddpm-worker"]  # the head may start machines, the workers may not
    options = found["docker"]["run_options"]
    assert "--env=AWS_REGION=eu-west-1" in options
    assert not re.search(r"(?i)secret|password|token|access_key", " ".join(options))
    assert all(
        t["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for t in found["available_node_types"].values()
    )


@ALL
@pytest.mark.parametrize("role", ["head", "worker"])
def test_policies_name_actions_one_by_one_and_resources_where_there_are_any(role, more):
    for sid, statement in policy(role, *more).items():
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert statement["Effect"] == "Allow"
        for action in actions:
            assert re.fullmatch(r"(s3|ec2|iam|ssm):[A-Z][A-Za-z]+", action), action  # no *
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions), sid


def test_ec2_and_ssm_know_every_action_by_that_name():
    """Their actions are their calls, which botocore lists."""
    import botocore.session

    session = botocore.session.get_session()
    known = {service: session.get_service_model(service).operation_names for service in ("ec2", "ssm")}
    for statement in policy("head").values():
        for action in [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]:
            service, _, name = action.partition(":")
            assert service not in known or name in known[service], action


def test_objects_may_be_changed_below_the_folders_of_this_program_alone():
    objects = policy("worker")["ReadAndWriteFolders"]
    assert set(objects["Action"]) == {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    wanted = {f"arn:aws:s3:::bucket/team/{name}/*" for name in layout.FOLDERS} | {"arn:aws:s3:::bucket/team/.ddpm-*"}
    assert set(objects["Resource"]) == wanted
    assert set(policy("worker")) == {"ListFolders", "ReadAndWriteFolders"}


def test_data_elsewhere_may_be_read_and_evaluators_kept_beside_it():
    found = policy("worker", "data.uri=s3://other/sets/birds")
    assert found["ReadData"]["Action"] == ["s3:GetObject"]
    assert found["ReadData"]["Resource"] == ["arn:aws:s3:::other/sets/birds/*"]
    assert found["ListData"]["Resource"] == ["arn:aws:s3:::other"]
    beside = {f"arn:aws:s3:::other/sets/birds/{folder}/*" for folder in ("evaluator", "features")}
    assert found["KeepWhatJudges"]["Action"] == ["s3:PutObject"]
    assert set(found["KeepWhatJudges"]["Resource"]) == beside


def test_sources_of_a_mixture_may_be_read_wherever_they_are_and_only_the_judge_keeps_something():
    mixed = "data.sources=[{name:a,uri:s3://other/sets/a},{name:b,uri:s3://third/b},{name:c,uri:s3://other/sets/a}]"
    found = policy("worker", "data.uri=s3://other/sets/a", mixed)
    assert found["ReadData"]["Resource"] == ["arn:aws:s3:::other/sets/a/*"]
    assert found["ReadData1"]["Resource"] == ["arn:aws:s3:::third/b/*"]
    assert found["ListData1"]["Resource"] == ["arn:aws:s3:::third"]
    assert [sid for sid in found if sid.startswith("Keep")] == ["KeepWhatJudges"]
    assert "ReadData2" not in found


def test_the_head_ends_and_tags_machines_of_its_own_cluster_alone():
    found = policy("head", "launch.account='123456789012'")
    own = {"aws:ResourceTag/ray-cluster-name": "first"}
    assert found["TagAndEndOwnWorkers"]["Condition"]["StringEquals"] == own
    started = found["StartWorkers"]["Condition"]["StringEquals"]
    assert started == {"aws:RequestTag/ray-cluster-name": "first", "ec2:InstanceType": "g5.2xlarge"}
    assert found["GiveWorkersTheirRole"]["Resource"] == "arn:aws:iam::123456789012:role/ddpm-worker"
    enders = [sid for sid, s in found.items() if "ec2:TerminateInstances" in s["Action"]]
    assert enders == ["TagAndEndOwnWorkers"]


@pytest.mark.parametrize("root", ["s3://bucket", "s3://bucket/team", "s3://bucket/a/b/"])
def test_no_rule_of_the_bucket_can_delete_what_a_run_has_written(root):
    """What expires by age lies outside every folder that this program writes to, checkpoints and all."""
    prefix = root.removeprefix("s3://bucket").strip("/")
    prefix = f"{prefix}/" if prefix else ""
    written = [f"{prefix}{folder}/x" for folder in layout.FOLDERS]
    written += [f"{prefix}runs/first/checkpoint_000000100-e1-x/state.json", f"{prefix}runs/first/checkpoints.json"]
    rules = lifecycle(root)["Rules"]
    for rule in rules:
        deletes = rule.keys() - {"ID", "Status", "Filter", "AbortIncompleteMultipartUpload"}
        if deletes:
            assert deletes == {"Expiration"}
            assert rule["Filter"]["Prefix"].startswith(f"{prefix}.ddpm-")
            assert not [key for key in written if key.startswith(rule["Filter"]["Prefix"])]
    assert [rule["Filter"]["Prefix"] for rule in rules if "AbortIncompleteMultipartUpload" in rule] == [prefix]


def test_s3_takes_the_rules():
    """botocore knows the form of the request, and refuses a misspelt one before it is sent."""
    import botocore.session
    from botocore.validate import validate_parameters

    shape = botocore.session.get_session().get_service_model("s3").operation_model("PutBucketLifecycleConfiguration")
    rules = lifecycle("s3://bucket/team")
    validate_parameters({"Bucket": "bucket", "LifecycleConfiguration": rules}, shape.input_shape)


def test_settings_that_cannot_work_on_ec2_are_refused():
    with pytest.raises(ConfigError, match="storage=local is the S3 of this machine's stack"):
        files("storage=local", "storage.root=s3://ddpm")
    with pytest.raises(ConfigError, match="a cluster on EC2 has a role for S3"):
        files("storage=file", "storage.root=gs://bucket")


def findings(policy):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parliament finds its own files by an old interface of setuptools
        import parliament
    return parliament.analyze_policy_string(policy).findings


@ALL
def test_parliament_finds_in_the_policies_only_what_it_cannot_know(more):
    assert findings(files(*more)["iam-worker.json"]) == []
    # It looks at one statement at a time, and what RunInstances may start and what it may use are two; and Ubuntu's
    # public parameter with the newest image is of no account.
    resources = ["*::image", "*:*:network-interface", "*:*:security-group", "*:*:subnet", "*:*:instance"]
    expected = {("RESOURCE_MISMATCH", "ec2:RunInstances", f"arn:*:ec2:{name}/*") for name in resources}
    details = [(f.issue, detail) for f in findings(files(*more)["iam-head.json"]) for detail in f.detail]
    found = {(issue, detail["action"], detail["required_format"]) for issue, detail in details}
    assert found - expected <= {("RESOURCE_MISMATCH", "ssm:GetParameters", "arn:*:ssm:*:*:parameter/*")}
    assert expected <= found


@pytest.mark.parametrize(("right", "wrong"), [("s3:GetObject", "s3:GetObjects"), ("arn:aws:s3:::", "arn:aws:sqs:::")])
def test_parliament_finds_a_misspelt_action_and_a_resource_of_another_service(right, wrong):
    policy = files()["iam-worker.json"]
    assert right in policy
    assert findings(policy.replace(right, wrong))
