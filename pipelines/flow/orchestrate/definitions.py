"""The Dagster definitions: an asset for the result of each stage, their job, sensor, schedule and the gate's check.

`dagster definitions validate -m pipelines.flow.orchestrate.definitions` loads it. No annotations are postponed here:
Dagster reads those of the functions that it decorates.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from pipelines.flow.orchestrate.child import CHECK
from pipelines.flow.orchestrate.settings import OrchestrateSettings
from pipelines.flow.stage import GATE, GRAPH, INGEST, TRAIN, StageSpec
from pipelines.presentation.errors import PipelineError

JOB = "flow"
CHILD = (sys.executable, "-m", "pipelines.flow.orchestrate.child")
"""Starts the process of a stage."""
STOP_S = 120.0
"""How long a cancelled run waits until a training has stored its checkpoint."""
POOLS = {INGEST: "ingest", TRAIN: "training"}
"""Stage -> its concurrency pool, by which the instance bounds how many runs that include it, of jobs, single assets or
backfills, there are at a time; see `pipelines.stack`."""


def asset_of(
    spec: StageSpec, partitions: dg.StaticPartitionsDefinition, settings: OrchestrateSettings
) -> dg.AssetsDefinition:
    """Return the asset of the result of a stage, which is made by the stage's own process.

    Args:
        partitions: one for each experiment.
    """
    checks = [dg.AssetCheckSpec(CHECK, asset=spec.gives, description="What the gate decided, with its table")]

    @dg.asset(
        name=spec.gives,
        deps=list(spec.needs),
        partitions_def=partitions,
        group_name="ddpm",
        description=f"{spec.title}. Made by the stage `{spec.name}`, and skipped where it is there.",
        check_specs=checks if spec is GATE else None,
        pool=POOLS.get(spec),
    )
    def materialise(context: dg.AssetExecutionContext, pipes: dg.PipesSubprocessClient) -> Iterator[Any]:
        overrides = settings.partitions[context.partition_key]
        launch = [word for setting in settings.launch for word in ("--launch", setting)]
        command = [*CHILD, "--stage", spec.name, *launch, *overrides]
        try:
            done = pipes.run(context=context, command=command)
        except dg.DagsterError as error:  # the process has ended without a word
            raise failure(context, settings, str(error), retry=True) from error
        yield from done.get_results(implicit_materializations=False)
        for message in done.get_custom_messages():
            raise failure(context, settings, message["failed"], retry=message["retry"])

    return materialise


def failure(context: dg.AssetExecutionContext, settings: OrchestrateSettings, text: str, *, retry: bool) -> Exception:
    """Return what an asset raises whose stage has failed.

    Dagster's own retry policy would start a cancelled run again, and would not try again after a process that has ended
    without a word.

    Args:
        text: why.
        retry: whether another try may help.
    """
    tried = context.op_execution_context.retry_number
    if not retry or tried >= settings.retries:
        return dg.Failure(text, allow_retries=False)
    context.log.warning(text)
    return dg.RetryRequested(settings.retries, settings.retry_delay_s * 2**tried)


def sensor_of(job: Any, settings: OrchestrateSettings) -> dg.SensorDefinition:
    """Return the sensor that requests a run for data that no run has seen, once for each state of them."""

    @dg.sensor(
        name="new_data",
        job=job,
        minimum_interval_seconds=settings.look_every_s,
        description="Requests a run of an experiment for data that no run of it has seen, by their digests.",
    )
    def new_data(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        requested = json.loads(context.cursor or "{}")
        requests, lines = [], []
        for partition, overrides in settings.partitions.items():
            try:
                found = _look(overrides)
            except PipelineError as error:
                lines.append(f"{partition}: {error}")
                continue
            lines.append(f"{partition}: {found.reason}")
            if found.new and requested.get(partition) != found.digest:
                requested[partition] = found.digest
                tags = {"ddpm/data": found.digest[:12]}
                requests.append(dg.RunRequest(f"{partition}-{found.digest}", partition_key=partition, tags=tags))
        cursor = json.dumps(requested, sort_keys=True)
        if not requests:
            return dg.SensorResult(skip_reason="; ".join(lines), cursor=cursor)
        return dg.SensorResult(run_requests=requests, cursor=cursor)

    return new_data


def _look(overrides: Sequence[str]) -> Any:
    """Look at the data of an experiment; see `facts.data_change`."""
    from pipelines.config import compose
    from pipelines.stack.connect import find_running

    config = find_running(compose(overrides), os.environ, ["s3"])

    from pipelines.flow.orchestrate.facts import data_change

    return data_change(config)


def schedule_of(job: Any, settings: OrchestrateSettings) -> dg.ScheduleDefinition:
    """Return the schedule that goes through every experiment; it is stopped until somebody starts it."""

    @dg.schedule(
        name="retrain",
        job=job,
        cron_schedule=settings.cron,
        execution_timezone=settings.timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Goes through the stages of every experiment; what is there is skipped.",
    )
    def retrain(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest]:
        at = context.scheduled_execution_time.strftime("%Y-%m-%dT%H:%M")
        return [dg.RunRequest(f"{partition}-{at}", partition_key=partition) for partition in settings.partitions]

    return retrain


def make_definitions(settings: OrchestrateSettings) -> dg.Definitions:
    """Return the definitions for the experiments of the settings."""
    partitions = dg.StaticPartitionsDefinition(list(settings.partitions))
    assets = [asset_of(spec, partitions, settings) for spec in GRAPH]
    # The stages of a run are processes of their own, one after the other: no further process per stage is needed.
    job = dg.define_asset_job(JOB, selection=assets, executor_def=dg.in_process_executor)
    return dg.Definitions(
        assets=assets,
        jobs=[job],
        sensors=[sensor_of(job, settings)],
        schedules=[schedule_of(job, settings)],
        resources={"pipes": dg.PipesSubprocessClient(termination_timeout_seconds=STOP_S)},
        executor=dg.in_process_executor,
    )


defs = make_definitions(OrchestrateSettings.of())
