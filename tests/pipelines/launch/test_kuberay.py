"""The RayJob of a command: what it asks of Kubernetes, KubeRay and Kueue, and where each setting shows."""

import json
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipelines.config import ConfigError
from pipelines.launch.kuberay import manifest, rayjob
from tests.pipelines.launch.rendered import (
    GPU,
    KUBERAY,
    SPOT,
    TRAIN,
    command,
    container,
    job,
    leaves,
    templates,
    variables,
)

SCHEMA = json.loads((Path(__file__).parent / "rayjob-kuberay-1.7.schema.json").read_text())
KUBERNETES = "1.33"
VARIANTS = {
    "cpu": [],
    "elastic": ["cluster.num_workers=[1,4]"],
    "gpu": GPU,
    "spot": [*GPU, "cluster.num_workers=[2,8]", SPOT, "launch.on_demand=1"],
    "queue": [*GPU, "launch.queue=team"],
    "elastic-queue": [*GPU, "cluster.num_workers=[1,4]", "launch.queue=team"],
    "role": ["launch.s3_secret=null", "launch.service_account=trainer"],
    "no-token": ["launch.token=false"],
    "token": ["launch.token_secret=ray-token"],
    "volume": ["launch.cache_class=gp3", "data.cache_gib=100"],
    "placed": [*GPU, "launch.zone=us-east-1a", "launch.gpu_product=NVIDIA-A10G"],
    "packed": [*GPU, "cluster.num_workers=16", "launch.workers_per_node=8", "launch.deadline_s=3600"],
    "private": ["launch.image_pull_secret=registry", "launch.head_image=registry/ddpm:1-cpu"],
}
ALL = pytest.mark.parametrize("more", VARIANTS.values(), ids=VARIANTS)


def cluster(*more):
    return job(*more)["spec"]["rayClusterSpec"]


def groups(*more):
    return {
        g["groupName"]: (g["replicas"], g["minReplicas"], g["maxReplicas"]) for g in cluster(*more)["workerGroupSpecs"]
    }


@ALL
def test_every_rayjob_has_the_form_that_kuberay_takes(more):
    jsonschema.Draft202012Validator(SCHEMA).validate(job(*more))


@ALL
def test_every_pod_template_has_the_form_that_kubernetes_takes(more):
    for name, template in templates(job(*more)).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_schemas_refuse_a_misspelt_field():
    wrong = job()
    wrong["spec"]["rayClusterSpec"]["authOption"] = {"mode": "token"}
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        jsonschema.Draft202012Validator(SCHEMA).validate(wrong)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **templates(job())["head"]}
    pod["spec"] = pod["spec"] | {"nodeSelectors": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@ALL
def test_the_printed_manifest_is_that_rayjob_in_plain_yaml(more):
    text = manifest(command("kuberay", *TRAIN, *KUBERAY, *more))
    assert yaml.safe_load(text) == job(*more)
    assert not re.search(r"(^|\s)[&*]\w+", text.replace("'*'", ""))  # no anchors: other tools patch these files
    assert text == manifest(command("kuberay", *TRAIN, *KUBERAY, *more))


RESOURCES = r"/template/spec/containers/ray-worker/resources/(requests|limits)/"
WORKERS = r"/spec/rayClusterSpec/workerGroupSpecs/(gpu|spot)"


@pytest.mark.parametrize(
    "setting, places",
    [
        ("name=second", [r"/metadata/name", r"/metadata/annotations/ddpm-pipelines/run", "/spec/entrypoint"]),
        ("optim.lr=0.5", ["/spec/entrypoint"]),
        ("seed=3", ["/spec/entrypoint"]),
        ("cluster.max_preemption_failures=5", ["/spec/entrypoint"]),
        ("cluster.cpus_per_worker=7", ["/spec/entrypoint", WORKERS + RESOURCES + "cpu"]),
        ("cluster.num_workers=[2,9]", ["/spec/entrypoint", WORKERS + "/maxReplicas"]),
        ("tracking.uri=http://other", [r".*/ray-(head|worker)/env/MLFLOW_TRACKING_URI/value"]),
        ("storage.endpoint_url=http://s3:1", [r".*/ray-(head|worker)/env/AWS_ENDPOINT_URL/(name|value)"]),
        ("storage.region=eu-west-1", [r".*/ray-(head|worker)/env/AWS_(DEFAULT_)?REGION/value"]),
        (
            "data.cache_gib=40",
            ["/spec/entrypoint", WORKERS + RESOURCES + "ephemeral-storage", WORKERS + ".*/cache/emptyDir/sizeLimit"],
        ),
        ("launch.image=other:1", [WORKERS + ".*/image"]),
        ("launch.head_image=other:1", [r".*/(ray-head|ray-job-submitter)/image"]),
        (
            "launch.image_pull_secret=registry",
            [
                r".*/template/spec/imagePullSecrets/registry/name",
                r"/spec/submitterPodTemplate/spec/imagePullSecrets/registry/name",
            ],
        ),
        ("launch.namespace=team", ["/metadata/namespace"]),
        ("launch.service_account=trainer", [r".*[tT]emplate/spec/serviceAccountName"]),
        ("launch.s3_secret=other", [r".*/volumes/s3/secret/secretName"]),
        (
            "launch.signing_secret=signing",
            [
                "/spec/entrypoint",
                r".*/ray-head/volumeMounts/signing/.*",
                r".*/headGroupSpec/template/spec/volumes/signing/.*",
            ],
        ),
        ("launch.mlflow_secret=other", [r".*/envFrom/0/secretRef/name"]),
        ("launch.token=false", ["/spec/rayClusterSpec/authOptions/mode"]),
        ("launch.token_secret=ray-token", ["/spec/rayClusterSpec/authOptions/secretName"]),
        (
            "launch.queue=team",
            [r"/metadata/labels/kueue.x-k8s.io/queue-name", r"/metadata/annotations/kueue.x-k8s.io/elastic-job"],
        ),
        ("launch.memory_gib=30", [WORKERS + RESOURCES + "memory"]),
        ("launch.shm_gib=2", [WORKERS + ".*/volumes/shm/emptyDir/sizeLimit"]),
        ("launch.head_cpus=3", [r".*/ray-head/resources/(requests|limits)/cpu"]),
        ("launch.gpu_product=L4", [WORKERS + ".*/nodeSelector/nvidia.com/gpu.product"]),
        ("launch.zone=a", [WORKERS + ".*/nodeSelector/topology.kubernetes.io/zone"]),
        ("launch.on_demand=2", [WORKERS + "/(replicas|minReplicas|maxReplicas)"]),
        (
            "launch.spot_notice_s=60",
            [r".*/spot/.*/terminationGracePeriodSeconds", r".*/spot/.*/preStop/exec/command/2"],
        ),
        ("launch.cache_class=gp3", [WORKERS + r".*/volumes/cache/.*", WORKERS + RESOURCES + "ephemeral-storage"]),
        ("launch.backoff_limit=9", ["/spec/backoffLimit"]),
        ("launch.submitter_backoff_limit=9", ["/spec/submitterConfig/backoffLimit"]),
        ("launch.deadline_s=60", ["/spec/activeDeadlineSeconds"]),
        ("launch.ttl_s=60", ["/spec/ttlSecondsAfterFinished"]),
        ("launch.stop_wait_s=60", [r".*/ray-head/env/RAY_JOB_STOP_WAIT_TIME_S/value"]),
    ],
)
def test_a_setting_shows_in_its_places_and_nowhere_else(setting, places):
    """Each named place changes, and every change is at a named place."""
    base = [*VARIANTS["spot"], "launch.head_image=registry/ddpm:1-cpu"]
    key = setting.partition("=")[0]
    words = [word for word in [*TRAIN, *KUBERAY, *base] if not word.startswith(f"{key}=")]
    before = dict(leaves(job(*base)))
    after = dict(leaves(rayjob(command("kuberay", *words, setting))))
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    for place in places:
        assert any(re.fullmatch(place, path) for path in changed), (place, changed)
    for path in changed:
        assert any(re.fullmatch(place, path) for place in places), path


def test_the_number_of_workers_is_that_of_the_pods():
    assert groups("cluster.num_workers=3") == {"cpu": (3, 3, 3)}
    assert groups(*GPU, "cluster.num_workers=16", "launch.workers_per_node=8") == {"gpu": (2, 2, 2)}
    limits = container(templates(job(*VARIANTS["packed"]))["gpu"])["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["cpu"], limits["memory"]) == ("8", "34", "192Gi")
    with pytest.raises(ConfigError, match=r"3 workers do not divide into pods of launch.workers_per_node = 2"):
        job("cluster.num_workers=3", "launch.workers_per_node=2")


def test_an_elastic_run_has_an_autoscaler_and_a_fixed_one_has_none():
    elastic = cluster("cluster.num_workers=[1,4]")
    assert groups("cluster.num_workers=[1,4]") == {"cpu": (1, 1, 4)}  # it begins with what can train
    assert elastic["enableInTreeAutoscaling"] is True
    assert elastic["autoscalerOptions"]["version"] == "v2"
    assert "enableInTreeAutoscaling" not in cluster()
    assert "autoscalerOptions" not in cluster()
    # The second autoscaler refuses pods whose containers are started again in place.
    assert {t["spec"]["restartPolicy"] for t in templates(job("cluster.num_workers=[1,4]")).values()} == {"Never"}


def test_spot_workers_are_a_group_of_their_own_beside_those_that_stay():
    more = [*GPU, "cluster.num_workers=[2,8]", SPOT]
    assert groups(*more) == {"spot": (2, 2, 8)}
    assert groups(*more, "launch.on_demand=1") == {"gpu": (1, 1, 1), "spot": (1, 1, 7)}
    assert groups(*more, "launch.on_demand=2") == {"gpu": (2, 2, 2), "spot": (0, 0, 6)}
    with pytest.raises(ConfigError, match=r"launch.on_demand = 3 exceeds the smallest number of workers, 2"):
        job(*more, "launch.on_demand=3")
    with pytest.raises(ConfigError, match="on_demand = 1 has no effect without spot"):
        job("launch.on_demand=1")


def test_spot_workers_ask_for_and_tolerate_spot_nodes_and_all_else_keeps_off_them():
    found = templates(job(*VARIANTS["spot"]))
    spot, stay = found["spot"]["spec"], found["gpu"]["spec"]
    assert spot["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    taint = {"key": "karpenter.sh/capacity-type", "operator": "Equal", "value": "spot", "effect": "NoSchedule"}
    assert taint in spot["tolerations"]
    assert taint not in stay["tolerations"]
    assert "affinity" not in spot
    for other in (stay, found["head"]["spec"], found["submitter"]["spec"]):
        assert "nodeSelector" not in other
        required = other["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (rule,) = required["nodeSelectorTerms"][0]["matchExpressions"]
        assert rule == {"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]}
    assert "affinity" not in templates(job(*GPU))["head"]["spec"]


def test_a_spot_pod_that_has_to_go_says_so_to_ray_while_it_may_still_write_a_checkpoint():
    spec = templates(job(*VARIANTS["spot"], "launch.spot_notice_s=40"))["spot"]["spec"]
    (script,) = container({"spec": spec})["lifecycle"]["preStop"]["exec"]["command"][2:]
    assert "ray drain-node --reason=DRAIN_NODE_REASON_PREEMPTION" in script
    assert "--deadline-remaining-seconds=40 && sleep 40" in script  # no waiting where the cluster is gone
    assert spec["terminationGracePeriodSeconds"] > 40
    assert "lifecycle" not in container(templates(job(*VARIANTS["spot"]))["gpu"])


def test_spot_nodes_that_are_taken_away_never_end_a_run_unless_that_is_asked_for():
    override = "cluster.max_preemption_failures"
    assert f"{override}=-1" in job(*VARIANTS["spot"])["spec"]["entrypoint"]
    given = job(*VARIANTS["spot"], f"{override}=4")["spec"]["entrypoint"]
    assert f"{override}=4" in given
    assert f"{override}=-1" not in given
    assert override not in job(*GPU)["spec"]["entrypoint"]


def test_a_command_that_fails_is_not_tried_again_and_one_whose_head_was_lost_is_submitted_anew():
    spec = job()["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["submitterConfig"]["backoffLimit"] > 0
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert "name=first" in spec["entrypoint"].split()
    assert job() == job()  # nothing in it is of its day


def test_tokens_are_asked_for_unless_they_are_switched_off():
    assert cluster()["authOptions"] == {"mode": "token"}
    assert cluster("launch.token=false")["authOptions"] == {"mode": "disabled"}
    with pytest.raises(ConfigError, match="token_secret has no effect with token = False"):
        job("launch.token=false", "launch.token_secret=x")


def test_a_queue_is_a_label_and_an_elastic_run_says_that_it_grows():
    fixed, elastic = job(*VARIANTS["queue"])["metadata"], job(*VARIANTS["elastic-queue"])["metadata"]
    assert fixed["labels"]["kueue.x-k8s.io/queue-name"] == elastic["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert elastic["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert "kueue.x-k8s.io/elastic-job" not in fixed["annotations"]


def test_no_training_on_the_head():
    start = cluster(*GPU)["headGroupSpec"]["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("0", "0")
    assert "nvidia.com/gpu" not in container(templates(job(*GPU))["head"])["resources"]["limits"]
    assert "entrypointNumCpus" not in job(*GPU)["spec"]  # it would be moved to a node whose CPUs the training needs


def test_keys_are_a_mounted_file_that_only_the_user_reads_or_a_role():
    for name in ("head", "cpu"):
        template = templates(job())[name]
        path = Path(variables(template)["AWS_SHARED_CREDENTIALS_FILE"])
        (mount,) = [m for m in container(template)["volumeMounts"] if Path(m["mountPath"]) == path.parent]
        (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == mount["name"]]
        assert volume["secret"] == {"secretName": "keys", "defaultMode": 0o440}
        assert template["spec"]["securityContext"]["fsGroup"] == template["spec"]["securityContext"]["runAsGroup"]
        role = templates(job(*VARIANTS["role"]))[name]
        assert role["spec"]["serviceAccountName"] == "trainer"
        assert "AWS_SHARED_CREDENTIALS_FILE" not in variables(role)
        assert "s3" not in {v["name"] for v in role["spec"]["volumes"]}
    with pytest.raises(ConfigError, match=r"the cluster has no access to the bucket: set launch.service_account=NAME"):
        job("launch.s3_secret=null")


def test_versions_are_signed_by_a_mounted_key_where_one_is_named():
    signed = job("launch.signing_secret=signing")
    (path,) = re.findall(r"registry\.signing_key=(\S+)", signed["spec"]["entrypoint"])
    mounts = {m["mountPath"]: m["name"] for m in container(templates(signed)["head"])["volumeMounts"]}
    volumes = {v["name"]: v for v in templates(signed)["head"]["spec"]["volumes"]}
    assert volumes[mounts[str(Path(path).parent)]]["secret"]["secretName"] == "signing"
    assert "signing" not in {v["name"] for v in templates(signed)["cpu"]["spec"]["volumes"]}  # workers sign nothing


@ALL
def test_no_manifest_holds_a_secret(more):
    for path, value in leaves(job(*more)):
        assert not re.search(r"(?i)password|access_key|AUTH_TOKEN", f"{path} {value}"), path
    assert "runtimeEnvYAML" not in job(*more)["spec"]  # Ray's dashboard shows it


def test_shards_are_kept_on_a_volume_of_the_size_that_the_cache_may_have():
    found = templates(job("data.cache_gib=100"))["cpu"]
    cache = {v["name"]: v for v in found["spec"]["volumes"]}["cache"]
    assert cache["emptyDir"]["sizeLimit"] == "110Gi"
    assert container(found)["resources"]["limits"]["ephemeral-storage"] == "120Gi"  # with Ray's logs
    folder = variables(found)["XDG_CACHE_HOME"]
    assert {m["name"]: m["mountPath"] for m in container(found)["volumeMounts"]}["cache"] == folder
    own = templates(job(*VARIANTS["volume"]))["cpu"]
    claim = own["spec"]["volumes"][-1]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("gp3", "110Gi")
    assert container(own)["resources"]["limits"]["ephemeral-storage"] == "10Gi"
    named = templates(job("data.cache_dir=/mnt/shards"))["cpu"]
    assert {m["name"]: m["mountPath"] for m in container(named)["volumeMounts"]}["cache"] == "/mnt/shards"


@ALL
def test_shared_memory_is_a_bounded_memory_volume_within_the_limit(more):
    for name, template in templates(job(*more)).items():
        if name == "submitter":
            continue
        mounts = {m["mountPath"]: m["name"] for m in container(template)["volumeMounts"]}
        volume = {v["name"]: v for v in template["spec"]["volumes"]}[mounts["/dev/shm"]]["emptyDir"]
        assert volume["medium"] == "Memory"
        limit = container(template)["resources"]["limits"]["memory"]
        assert int(volume["sizeLimit"].removesuffix("Gi")) < int(limit.removesuffix("Gi"))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="shm_gib = 9 must be below memory_gib = 8"):
        job("launch.memory_gib=8", "launch.shm_gib=9")
    with pytest.raises(ConfigError, match=r"launch.spot: .*pattern"):
        job("launch.spot=spot")
    with pytest.raises(ConfigError, match=r"launch\.image has no value: set it with launch\.image=VALUE"):
        command("kuberay", *TRAIN)
    with pytest.raises(ConfigError, match=r"launch\.imgae.*Did you mean 'image'"):
        command("kuberay", *TRAIN, "launch.imgae=x")
