"""What only a launch on a cluster needs to know: images, names of the cluster's objects, machines.

`ddpm launch --target KIND` chooses `conf/launch/KIND.yaml`. A run does not see these settings: they are left out of the
command that the cluster gets, of a run's identity and of its stored configuration.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipelines.config.choices import ConfigSection

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
"""Of an object in Kubernetes."""
SPOT_LABEL = r"^[A-Za-z0-9./_-]+:[A-Za-z0-9._-]+$"


class Launch(ConfigSection):
    """What clusters of every kind are told."""

    stop_wait_s: PositiveInt = Field(120, description="how long a stopped command may take to write its checkpoint")


class KubeRayLaunch(Launch):
    """A RayJob of KubeRay: a Ray cluster of its own for the command, which goes when the command ends."""

    kind: Literal["kuberay"] = Field("kuberay", description="kind of cluster on which the command runs")
    image: str = Field(description="image of the workers, with CUDA where they have GPUs")
    head_image: str | None = Field(
        None, description="image of head and submitter, which need no CUDA, with the same Python and Ray; null: image"
    )
    image_pull_secret: Name | None = Field(None, description="Secret for a private registry")
    namespace: Name = Field("default", description="namespace in Kubernetes, which has the Secrets")
    service_account: Name | None = Field(
        None,
        description="service account of head and workers; where its role may use the bucket (IRSA on AWS, Workload "
        "Identity on Google Cloud), no keys are needed",
    )
    s3_secret: Name | None = Field(
        None, description="Secret whose key `credentials` is a file in the form of ~/.aws/credentials; null: a role"
    )
    mlflow_secret: Name = Field(
        "ddpm-mlflow",
        description="Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; not needed without a login",
    )
    signing_secret: Name | None = Field(
        None,
        description="Secret whose key `signing.pem` is the private key that signs versions; null: one that the head "
        "makes, which goes with it",
    )
    token: bool = Field(True, description="whoever speaks to the Ray cluster needs its token; KubeRay makes one")
    token_secret: Name | None = Field(
        None, description="Secret whose key `auth_token` is that token; null: one that KubeRay makes for each cluster"
    )
    queue: Name | None = Field(None, description="LocalQueue of Kueue; null: the job starts at once")
    workers_per_node: PositiveInt = Field(1, description="how many of the cluster.num_workers workers a pod holds")
    memory_gib: PositiveFloat = Field(24, description="memory of a worker")
    shm_gib: PositiveFloat = Field(8, description="of that, the most that may lie in /dev/shm")
    head_cpus: PositiveFloat = Field(2, description="CPUs of the head, which trains nothing")
    head_memory_gib: PositiveFloat = Field(8, description="memory of the head")
    gpu_product: str | None = Field(None, description="label nvidia.com/gpu.product of the nodes; null: any GPU")
    zone: str | None = Field(None, description="where all workers run: gradients between zones are slow, and billed")
    spot: Annotated[str, Field(pattern=SPOT_LABEL)] | None = Field(
        None,
        description="label KEY:VALUE of spot nodes, tolerated as their taint too: karpenter.sh/capacity-type:spot, "
        "eks.amazonaws.com/capacityType:SPOT, cloud.google.com/gke-spot:true; null: no spot nodes",
    )
    on_demand: NonNegativeInt = Field(0, description="with spot, how many workers run on other nodes, as the head does")
    spot_notice_s: NonNegativeInt = Field(
        25, description="how long a pod that has to leave its spot node may go on: clouds give 30 to 120 s"
    )
    cache_class: Name | None = Field(
        None, description="storage class of a worker pod's own volume for shards; null: the disk of its node"
    )
    backoff_limit: NonNegativeInt = Field(
        0, description="how often KubeRay starts a new cluster after the command has failed, for whatever reason"
    )
    submitter_backoff_limit: NonNegativeInt = Field(
        4,
        description="how often the pod that submits the command and shows its output is replaced; the command goes on",
    )
    deadline_s: PositiveInt | None = Field(None, description="seconds after which the job is ended; null: no limit")
    ttl_s: NonNegativeInt = Field(600, description="how long the cluster stays after the command, to look at")

    @model_validator(mode="after")
    def _consistent(self) -> KubeRayLaunch:
        if self.shm_gib >= self.memory_gib:
            raise ValueError(
                f"shm_gib = {self.shm_gib:g} must be below memory_gib = {self.memory_gib:g}, which it is a part of"
            )
        if self.on_demand and not self.spot:
            raise ValueError(f"on_demand = {self.on_demand} has no use without spot: all workers are on other nodes")
        if self.token_secret and not self.token:
            raise ValueError("token_secret has no use with token = False: leave one of them out")
        return self


class AwsLaunch(Launch):
    """A cluster on EC2 that `ray up` starts: a head on demand, spot workers; with its policies and its bucket rules."""

    kind: Literal["aws"] = Field("aws", description="kind of cluster on which the command runs")
    image: str = Field(description="image of the workers, with CUDA where they have GPUs")
    head_image: str | None = Field(
        None, description="image of the head, which needs no CUDA, with the same Python and Ray; null: image"
    )
    account: Annotated[str, Field(pattern=r"^[0-9]{12}$")] | None = Field(
        None, description="number of the AWS account in the policies; null: a * in its place"
    )
    region: str = Field("us-east-1", description="AWS region")
    zone: str = Field("us-east-1a", description="zone of all nodes: gradients between zones are slow, and billed")
    instance_type: str = Field("g5.2xlarge", description="instance type of the workers")
    head_instance_type: str = Field("m6i.xlarge", description="instance type of the head, which trains nothing")
    workers_per_node: PositiveInt = Field(
        1, description="how many of the cluster.num_workers workers an instance holds"
    )
    spot: bool = Field(True, description="workers on spot instances; the head never is")
    head_profile: str = Field("ddpm-head", description="instance profile with iam-head.json")
    worker_profile: str = Field("ddpm-worker", description="instance profile with iam-worker.json")
    ami: str = Field(
        "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id",
        description="machine image with Docker and an NVIDIA driver; the default is AWS's newest, ami-… pins one",
    )
    disk_gib: PositiveInt = Field(100, description="disk of a node in GiB, beside the workers' cache of shards")
    idle_min: NonNegativeFloat = Field(10, description="minutes after which an idle node above the minimum is ended")


class RayLaunch(Launch):
    """A job on a Ray cluster that is there already, by Ray's Jobs API."""

    kind: Literal["ray"] = Field("ray", description="kind of cluster on which the command runs")
    command: str | None = Field(
        None, description="what the cluster calls this program; null: ddpm, or this very one on the local stack"
    )
    patience_s: PositiveFloat = Field(300, description="how long a cluster that does not answer is asked again")


LaunchConfig = Annotated[KubeRayLaunch | AwsLaunch | RayLaunch, Field(discriminator="kind")]
