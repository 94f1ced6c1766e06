"""Settings that only a launch on a cluster needs: container images, names of cluster objects, machines.

`ddpm launch --target KIND` chooses `conf/launch/KIND.yaml`. A run does not see these settings: they are not part of the
command that runs on the cluster, of a run's identity, or of its stored configuration.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipelines.config.choices import ConfigSection

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
"""Name of a Kubernetes object."""
SPOT_LABEL = r"^[A-Za-z0-9./_-]+:[A-Za-z0-9._-]+$"


class Launch(ConfigSection):
    """Settings for clusters of every kind."""

    stop_wait_s: PositiveInt = Field(120, description="seconds that a stopped command may take to write its checkpoint")


class KubeRayLaunch(Launch):
    """A KubeRay RayJob: a Ray cluster for this command, deleted after the command ends."""

    kind: Literal["kuberay"] = Field("kuberay", description="kind of cluster on which the command runs")
    image: str = Field(description="container image of the workers, with CUDA if they have GPUs")
    head_image: str | None = Field(
        None,
        description="container image of head and submitter (no CUDA needed), with the same Python and Ray; null: image",
    )
    image_pull_secret: Name | None = Field(None, description="Secret with the credentials of a private registry")
    namespace: Name = Field("default", description="Kubernetes namespace, in which the Secrets are")
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
        description="Secret whose key `signing.pem` is the private key that signs versions; null: a key that the head "
        "makes, and that is deleted with the head",
    )
    token: bool = Field(True, description="require a token for access to the Ray cluster; KubeRay makes one")
    token_secret: Name | None = Field(
        None, description="Secret whose key `auth_token` is that token; null: a token that KubeRay makes per cluster"
    )
    queue: Name | None = Field(None, description="Kueue LocalQueue; null: the job starts at once")
    workers_per_node: PositiveInt = Field(1, description="workers of cluster.num_workers in each pod")
    memory_gib: PositiveFloat = Field(24, description="memory of a worker, in GiB")
    shm_gib: PositiveFloat = Field(8, description="largest size of /dev/shm, in GiB, as part of memory_gib")
    disk_gib: PositiveFloat = Field(
        10, description="disk of a worker pod for logs and temporary files, in GiB, beside the cache of shards"
    )
    head_cpus: PositiveFloat = Field(2, description="CPUs of the head, which does not train")
    head_memory_gib: PositiveFloat = Field(8, description="memory of the head, in GiB")
    gpu_product: str | None = Field(None, description="label nvidia.com/gpu.product of the nodes; null: any GPU")
    zone: str | None = Field(None, description="zone of all workers: traffic between zones is slow and billed")
    spot: Annotated[str, Field(pattern=SPOT_LABEL)] | None = Field(
        None,
        description="label KEY:VALUE of spot nodes, also tolerated as a taint: karpenter.sh/capacity-type:spot, "
        "eks.amazonaws.com/capacityType:SPOT, cloud.google.com/gke-spot:true; null: no spot nodes",
    )
    on_demand: NonNegativeInt = Field(
        0, description="with spot: number of workers on on-demand nodes, where the head runs too"
    )
    spot_notice_s: NonNegativeInt = Field(
        25, description="seconds that a pod may still run after its spot node was reclaimed: clouds give 30 to 120 s"
    )
    cache_class: Name | None = Field(
        None, description="storage class of each worker pod's volume for shards; null: the disk of its node"
    )
    backoff_limit: NonNegativeInt = Field(
        0, description="number of times that KubeRay starts a new cluster after the command failed, for any reason"
    )
    submitter_backoff_limit: NonNegativeInt = Field(
        4,
        description="restarts of the pod that submits the command and shows its output; the command keeps running",
    )
    deadline_s: PositiveInt | None = Field(
        None, description="seconds after which the job is terminated; null: no limit"
    )
    ttl_s: NonNegativeInt = Field(600, description="seconds that the cluster is kept after the command, for inspection")

    @model_validator(mode="after")
    def _consistent(self) -> KubeRayLaunch:
        if self.shm_gib >= self.memory_gib:
            raise ValueError(
                f"shm_gib = {self.shm_gib:g} must be below memory_gib = {self.memory_gib:g}, which includes it"
            )
        if self.on_demand and not self.spot:
            raise ValueError(
                f"on_demand = {self.on_demand} has no effect without spot: all workers are on on-demand nodes"
            )
        if self.token_secret and not self.token:
            raise ValueError("token_secret has no effect with token = False: leave one of them out")
        return self


class AwsLaunch(Launch):
    """An EC2 cluster started by `ray up`: an on-demand head and spot workers, with IAM policies and bucket rules."""

    kind: Literal["aws"] = Field("aws", description="kind of cluster on which the command runs")
    image: str = Field(description="container image of the workers, with CUDA if they have GPUs")
    head_image: str | None = Field(
        None, description="container image of the head (no CUDA needed), with the same Python and Ray; null: image"
    )
    account: Annotated[str, Field(pattern=r"^[0-9]{12}$")] | None = Field(
        None, description="AWS account number in the policies; null: *"
    )
    region: str = Field("us-east-1", description="AWS region")
    zone: str = Field("us-east-1a", description="zone of all nodes: traffic between zones is slow and billed")
    instance_type: str = Field("g5.2xlarge", description="instance type of the workers")
    head_instance_type: str = Field("m6i.xlarge", description="instance type of the head, which does not train")
    workers_per_node: PositiveInt = Field(1, description="workers of cluster.num_workers on each instance")
    spot: bool = Field(True, description="run the workers on spot instances; the head is always on demand")
    head_profile: str = Field("ddpm-head", description="instance profile with iam-head.json")
    worker_profile: str = Field("ddpm-worker", description="instance profile with iam-worker.json")
    ami: str = Field(
        "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id",
        description="machine image with Docker and an NVIDIA driver; default: AWS's newest; ami-… pins one",
    )
    disk_gib: PositiveInt = Field(100, description="disk of a node in GiB, in addition to the shard cache")
    idle_min: NonNegativeFloat = Field(
        10, description="minutes after which an idle node above the minimum is terminated"
    )


class RayLaunch(Launch):
    """A job on an existing Ray cluster, submitted through Ray's Jobs API."""

    kind: Literal["ray"] = Field("ray", description="kind of cluster on which the command runs")
    command: str | None = Field(
        None, description="command of this program on the cluster; null: ddpm, or this installation on the local stack"
    )
    patience_s: PositiveFloat = Field(
        300, description="seconds for which a cluster that does not answer is tried again"
    )


LaunchConfig = Annotated[KubeRayLaunch | AwsLaunch | RayLaunch, Field(discriminator="kind")]
