"""The names of everything that is stored: below `storage.root`, a dataset, a run, a study and an MLflow run.

Stored data is found again by these names, so none of them changes. No other module spells one out.
"""

from __future__ import annotations

from pipelines.storage.store import join

# Folders below `storage.root`.
DATASETS, RUNS, STUDIES, EVALUATIONS = "datasets", "runs", "studies", "evaluations"
REGISTRY, PLANS = "registry", "plans"
FORGOTTEN = "forgotten"
"""Folder of the requests to forget pictures: below a dataset, which images; below the root, which trainings."""
FOLDERS = (DATASETS, RUNS, STUDIES, EVALUATIONS, REGISTRY, PLANS, FORGOTTEN)
"""Everything that is written below `storage.root`, apart from probes."""
PROBE_PREFIX = ".ddpm-"
"""Start of the names of probes: objects that are written and deleted at once to see whether that is allowed."""
MLFLOW = "mlflow"
"""Artifacts of the local MLflow server, beside these folders in the bucket of the local stack."""

# Below the address of a dataset.
DATASET, QUARANTINE, INGEST_REPORT = "dataset.json", "quarantine.json", "ingest-report.json"
PRINTS = "prints"
"""Folder of what identifies the images of each shard, by which a picture is found."""
QUARANTINES = "quarantines"
"""Folder of every quarantine that the dataset has had, each named after its digest: the order of a training that began
under an earlier one can be computed as long as it is there."""
CONTENTS = "contents"
"""Folder of the counts of what the shards hold, one for each tar."""
ERASURES = "erasures"
"""Folder of the records of erased samples, each named after the digest that the dataset had before."""
SHARD_SUFFIX, INDEX_SUFFIX = ".tar", ".index.json"
INGEST_PROGRESS = "ingest-progress"
"""Folder of the records of an ingest, from which it continues: of its shards, its sources and their fingerprints."""
INGEST_SOURCES, FINGERPRINTS = f"{INGEST_PROGRESS}/sources", f"{INGEST_PROGRESS}/fingerprints"
"""Folders of the parts of the manifest, and of the fingerprints of its images."""
INDEX_PROGRESS, CHECK_PROGRESS = "index-progress", "check-progress"
"""Folders of the records from which an index and a check continue, one for each tar; deleted when they have ended."""
INGEST_KEY = "ingest-key"
"""Digest of everything that an ingest of `ddpm flow` was made from."""
EVALUATORS, FEATURES = "evaluator", "features"
BESIDE_DATA = (EVALUATORS, FEATURES)
"""Folder of evaluations below a dataset, wherever the dataset is."""
EVALUATOR, EARLIER_EVALUATOR_WEIGHTS = "evaluator.json", "evaluator.safetensors"
REAL, REAL_MOMENTS, REAL_HELD_OUT = "real.json", "moments.safetensors", "held-out.safetensors"
"""Files of a folder of features of the real images."""

# Below the folder of a run.
RUN, DRIVER, CHECKPOINT_LIST = "run.json", "driver", "checkpoints.json"
CHECKPOINT_PREFIX = "checkpoint_"
"""Start of the names of checkpoint folders."""
PUBLISHED, RUNG_SCORES, LOGS, METRICS = "published", "scores", "logs", "metrics"
GOODPUT, EARLIER_GOODPUT = "goodput", "goodput.json"
UNSENT = "unsent.zip"
"""Metrics that MLflow did not take before the run ended; the next start of the run sends them."""

# Below a checkpoint or another model folder; `ddpm.model` writes the first two.
MODEL, WEIGHTS = "model.json", "model.safetensors"
TRAINING_STATE, TRAINING_TENSORS, POWER_EMA = "state.json", "training.safetensors", "power_ema.safetensors"
PARTS_INDEX = "parts.json"
"""Which rows of which tensor are where in the parts of a sharded checkpoint."""
EVIDENCE, PROBE = "evidence.json", "probe.safetensors"

# Below a sample set in `EVALUATIONS`.
SAMPLES = "record.json"

# Below the folder of a study.
STUDY, TRIALS, CONFIRMATION, STUDY_PAGE = "study.json", "trials", "confirmation.json", "study.html"
BEST, STEPS = "best", "steps.json"

# Folders and files among the artifacts of an MLflow run.
SCORES_RECORDED, BOUND_TERMS, CHECKPOINTS_RECORDED = "evaluation", "bound", "checkpoints"
SIGNATURES, FIGURES = "signatures", "figures"
CONFIG = "config.json"
BEST_SAMPLING, BEST_OVERRIDES = f"{BEST}/sampling.json", f"{BEST}/overrides.txt"


def dataset_folder(root: str, name: str) -> str:
    """Return the address of a dataset that is named after its source."""
    return join(root, DATASETS, name)


def run_folder(root: str, name: str) -> str:
    """Return the address of the folder of a run."""
    return join(root, RUNS, name)


def study_folder(root: str, name: str) -> str:
    """Return the address of the folder of a study."""
    return join(root, STUDIES, name)


def verdict_folder(root: str, model: str, alias: str) -> str:
    """Return the address of the folder of the verdicts about an alias of a registered model."""
    return join(root, REGISTRY, model, alias)


def plan_file(root: str, run: str) -> str:
    """Return the address of the plan of a run."""
    return join(root, PLANS, f"{run}.json")


def index_name(shard: str) -> str:
    """Return the name of the index of a shard, which lies beside it."""
    return shard.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX


def progress_name(shard: str) -> str:
    """Return the name of the record that a shard is finished, below its dataset."""
    return f"{INGEST_PROGRESS}/{record_name(shard)}"


def record_name(shard: str) -> str:
    """Return the name of a record about a shard, below the folder of such records."""
    return f"{shard.removesuffix(SHARD_SUFFIX)}.json"


def quarantine_file(digest: str) -> str:
    """Return the name of the copy of a quarantine that is kept, below its dataset."""
    return f"{QUARANTINES}/{digest}.json"


def forget_file(request: str) -> str:
    """Return the name of the record of a request to forget a picture, below a dataset or the root."""
    return f"{FORGOTTEN}/{request}.json"


def erasure_file(digest: str) -> str:
    """Return the name of the record of samples that were erased from a dataset of this digest, below the dataset."""
    return f"{ERASURES}/{digest}.json"


def trial_file(study: str, trial: str) -> str:
    """Return the address of the record of a trial, below the folder of its study."""
    return join(study, TRIALS, f"{trial}.json")


def parquet_part(number: int) -> str:
    """Return the name of a part of a manifest, or of what was found out about its images."""
    return f"{number:08d}.parquet"


def best_file(study: str, name: str) -> str:
    """Return the address of the best configuration of a study."""
    return join(study, BEST, f"{name}.json")


def probe_folder(root: str, name: str) -> str:
    """Return the address of a folder for probes, which is deleted after them."""
    return join(root, f"{PROBE_PREFIX}{name}")


def numbered(number: int, digits: int = 12) -> str:
    """Return the name of a JSON file that is named after a number, so that names sort as the numbers do."""
    return f"{number:0{digits}d}.json"


def metrics_part(number: int) -> str:
    """Return the name of a part of the metrics of a run, below `METRICS`."""
    return f"{number:06d}.jsonl"


def log_part(epoch: int, rank: int, attempt: str, part: int) -> str:
    """Return the name of a part of the log of a worker, below `LOGS`."""
    return f"{epoch:06d}-rank-{rank}-{attempt}.{part:03d}.log"


def mlflow_artifacts(bucket: str) -> str:
    """Return the address below which the local MLflow server keeps artifacts."""
    return f"s3://{bucket}/{MLFLOW}"


def part_file(rank: int) -> str:
    """Return the name of the part of a sharded checkpoint that a rank writes."""
    return f"part-{rank:05d}.safetensors"
