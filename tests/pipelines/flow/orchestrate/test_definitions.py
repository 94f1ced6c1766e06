"""The assets of the stages: how they hang together, what becomes of what a child says, and when the sensor fires."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

dg = pytest.importorskip("dagster", reason="comes with the extra orchestrate")

from pipelines.checkpoints import (  # noqa: E402
    Listed,
    checkpoint_name,
    enter_checkpoint,
    newest_checkpoint,
    run_folder,
    save_checkpoint,
)
from pipelines.config import compose  # noqa: E402
from pipelines.flow import GRAPH  # noqa: E402
from pipelines.flow.ingest import write_dataset  # noqa: E402
from pipelines.flow.orchestrate.child import CHECK, report  # noqa: E402
from pipelines.flow.orchestrate.definitions import asset_of, make_definitions  # noqa: E402
from pipelines.flow.orchestrate.settings import OrchestrateSettings  # noqa: E402
from pipelines.flow.stage import REGISTER, TRAIN  # noqa: E402
from pipelines.flow.train import for_data  # noqa: E402
from pipelines.presentation.progress import Silent  # noqa: E402
from pipelines.registry import Verdict  # noqa: E402
from pipelines.registry.verdict import VerdictRow  # noqa: E402
from pipelines.shards.quarantine import stream_digest  # noqa: E402
from pipelines.stack.orchestrator import INSTANCE  # noqa: E402
from pipelines.storage import Storage  # noqa: E402
from tests.pipelines.checkpoints.tiny import a_checkpoint  # noqa: E402
from tests.pipelines.shards.ingest.sources import picture, pictures, write_files  # noqa: E402

STORAGE = Storage()


def test_the_definitions_load_and_the_assets_depend_on_each_other_as_the_stages_do():
    defs = make_definitions(OrchestrateSettings())
    dg.Definitions.validate_loadable(defs)
    graph = defs.resolve_asset_graph()
    for spec in GRAPH:
        node = graph.get(dg.AssetKey(spec.gives))
        assert {key.to_user_string() for key in node.parent_keys} == set(spec.needs)
        assert set(node.partitions_def.get_partition_keys()) == set(OrchestrateSettings().partitions)
    assert [key.name for key in graph.asset_check_keys] == [CHECK]


def test_one_run_at_a_time_trains_or_writes_a_dataset_whatever_it_was_started_as(tmp_path):
    graph = make_definitions(OrchestrateSettings()).resolve_asset_graph()
    pools = {spec.name: graph.get(dg.AssetKey(spec.gives)).pools for spec in GRAPH}
    assert {name: found for name, found in pools.items() if found} == {"ingest": {"ingest"}, "train": {"training"}}
    (tmp_path / "dagster.yaml").write_text(INSTANCE.partition("run_launcher:")[0])
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        limits = instance.get_concurrency_config().pool_config
    assert (limits.default_pool_limit, limits.pool_granularity.value) == (1, "run")


def test_sensor_and_schedule_are_stopped_until_somebody_starts_them():
    defs = make_definitions(OrchestrateSettings(cron="30 4 * * *", timezone="Europe/Berlin", look_every_s=7))
    schedule = defs.resolve_schedule_def("retrain")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 4 * * *", "Europe/Berlin")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    sensor = defs.resolve_sensor_def("new_data")
    assert (sensor.minimum_interval_seconds, sensor.default_status) == (7, dg.DefaultSensorStatus.STOPPED)


def test_the_schedule_asks_for_every_experiment_once_at_a_time():
    defs = make_definitions(OrchestrateSettings())
    at = datetime(2026, 1, 5, 3, 0, tzinfo=UTC)
    context = dg.build_schedule_context(scheduled_execution_time=at, repository_def=defs.get_repository_def())
    requests = defs.resolve_schedule_def("retrain").evaluate_tick(context).run_requests
    assert [request.partition_key for request in requests] == list(OrchestrateSettings().partitions)
    assert len({request.run_key for request in requests}) == len(requests)


# --- what a child says ---


class Child(dg.PipesSubprocessClient):  # type: ignore[name-defined]
    """Runs nothing, and gives what a child would have said."""

    def __init__(self, results, messages):
        super().__init__()
        self.results, self.messages, self.commands = results, messages, []

    def run(self, *, command, **options):
        self.commands.append(command)
        return SimpleNamespace(
            get_results=lambda *, implicit_materializations: self.results,
            get_custom_messages=lambda: self.messages,
        )


SETTINGS = OrchestrateSettings(partitions={"tiny": ("+experiment=digits", "images=1280")}, retries=0)


def materialised(spec, child, settings=SETTINGS):
    asset = asset_of(spec, dg.StaticPartitionsDefinition(list(settings.partitions)), settings)
    return dg.materialize([asset], partition_key="tiny", resources={"pipes": child}, raise_on_error=False)


def test_each_asset_starts_its_stage_with_the_overrides_of_its_partition():
    for spec in GRAPH:
        checks = [dg.AssetCheckResult(passed=True, check_name=CHECK)] if spec.gives == "champion" else []
        child = Child([dg.MaterializeResult(metadata={"skipped": True}), *checks], [])
        assert materialised(spec, child).success
        (command,) = child.commands
        assert command == [
            *(sys.executable, "-m", "pipelines.flow.orchestrate.child", "--stage", spec.name),
            *("+experiment=digits", "images=1280"),
        ]


def test_stages_are_launched_on_a_cluster_where_the_settings_say_so():
    child = Child([dg.MaterializeResult()], [])
    settings = SETTINGS.model_copy(update={"launch": ("launch.image=i", "launch.s3_secret=s")})
    assert materialised(TRAIN, child, settings).success
    launch = ["--launch", "launch.image=i", "--launch", "launch.s3_secret=s"]
    assert child.commands[0][3:] == ["--stage", "train", *launch, "+experiment=digits", "images=1280"]


def test_a_refusal_of_the_gate_is_a_failed_check_and_fails_the_asset_without_another_try():
    refused = dg.AssetCheckResult(passed=False, check_name=CHECK, metadata={"reason": "worse"})
    child = Child([refused], [{"failed": "the gate has refused: worse", "retry": False}])
    result = materialised(GRAPH[-1], child, SETTINGS.model_copy(update={"retries": 3, "retry_delay_s": 0.0}))
    assert not result.success
    assert len(child.commands) == 1
    (event,) = [e for e in result.all_events if e.event_type_value == "STEP_FAILURE"]
    assert "the gate has refused: worse" in event.event_specific_data.error_display_string
    (check,) = result.get_asset_check_evaluations()
    assert (check.passed, check.check_name) == (False, CHECK)
    assert result.get_asset_materialization_events() == []


@pytest.mark.parametrize("retry, tries", [(True, 3), (False, 1)])
def test_what_may_pass_is_tried_again_and_a_wrong_configuration_is_not(retry, tries):
    child = Child([], [{"failed": "no answer", "retry": retry}])
    settings = SETTINGS.model_copy(update={"retries": 2, "retry_delay_s": 0.0})
    assert not materialised(GRAPH[0], child, settings).success
    assert len(child.commands) == tries


@pytest.mark.parametrize(
    "error, tries", [(dg.DagsterError("code -9"), 3), (dg.DagsterExecutionInterruptedError("cancelled"), 1)]
)
def test_a_process_that_was_killed_is_started_again_and_one_that_was_cancelled_is_not(error, tries):
    class Ended(Child):
        def run(self, *, command, **options):
            super().run(command=command)
            raise error

    child = Ended([], [])
    settings = SETTINGS.model_copy(update={"retries": 2, "retry_delay_s": 0.0})
    assert not materialised(TRAIN, child, settings).success
    assert len(child.commands) == tries


class Told:
    """A context of dagster-pipes that remembers what it was told."""

    def __init__(self):
        self.materialisations, self.checks, self.messages = [], [], []

    def report_asset_materialization(self, **said):
        self.materialisations.append(said)

    def report_asset_check(self, name, **said):
        self.checks.append((name, said))

    def report_custom_message(self, message):
        self.messages.append(message)


@pytest.mark.parametrize("passed", [True, False])
def test_the_verdict_of_the_gate_is_a_check_with_its_table_and_a_refusal_is_no_materialisation(passed):
    from pipelines.flow import Results
    from pipelines.flow.walk import FlowResult
    from pipelines.tracking import ModelVersion

    row = VerdictRow("better than models:/m/1", "z = 3 | 2", "z >= 1.96", passed)
    verdict = Verdict(passed, "why", "m", "champion", "2", n=500 * passed, attempt=1 * passed, rows=(row,))
    version = ModelVersion("m", "2", "r", {"served_digest": "s"}, ())
    result = FlowResult(Results(version=version, champion=verdict), {}, ("gate",), {"gate": {"served": "s"}})
    told = Told()
    config = compose(["+experiment=digits", "tracking.uri=http://mlflow"])
    report("gate", result, config, told)
    ((name, check),) = told.checks
    assert (name, check["passed"], check["severity"]) == (CHECK, passed, "ERROR")
    mark = "ok" if passed else "NO"
    assert f"| {mark} | better than models:/m/1 | z = 3 \\| 2 | z >= 1.96 |" in check["metadata"]["table"]["raw_value"]
    assert {"n", "attempt"} & check["metadata"].keys() == ({"n", "attempt"} if passed else set())  # none compared
    assert len(told.materialisations) == (1 if passed else 0)
    assert told.messages == ([] if passed else [{"failed": "the gate has refused: why", "retry": False}])
    if passed:
        (said,) = told.materialisations
        assert said["data_version"] == "s"
        assert said["metadata"]["skipped"] is False
        assert said["metadata"]["mlflow"]["raw_value"].startswith("http://mlflow/#/models/m/versions/2")


# --- the sensor ---


@pytest.fixture
def experiment(tmp_path):
    """The overrides of an experiment on a folder of pictures, with all services in folders."""
    write_files(tmp_path / "photos", pictures())
    folder = ["data=folder", "model=unet_small", "data.num_classes=3", "data.image_size=8", "name=pets", "storage=file"]
    places = [
        f"data.source={tmp_path}/photos",
        f"data.uri=file://{tmp_path}/ds",
        f"storage.root=file://{tmp_path}/root",
    ]
    return (*folder, *places)


class Sensor:
    """The sensor of one experiment, which remembers what Dagster would."""

    def __init__(self, overrides):
        settings = OrchestrateSettings(partitions={"pets": overrides})
        self.defs = make_definitions(settings)
        self.cursor: str | None = None

    def requests(self) -> list:
        context = dg.build_sensor_context(definitions=self.defs, cursor=self.cursor)
        found = self.defs.resolve_sensor_def("new_data").evaluate_tick(context)
        self.cursor, self.said = found.cursor, found.skip_message
        return list(found.run_requests)


def trained(config, images=10):
    """Store a checkpoint of the run that is of the data that are there now."""
    from pipelines.shards.index import read_dataset

    config = for_data(config)
    dataset = read_dataset(config.data.uri, STORAGE)
    checkpoint = a_checkpoint(images)
    lineage = {**checkpoint.spec.lineage, "stream_digest": stream_digest(dataset, None)}
    name = checkpoint_name(images, 1)
    path = Path(run_folder(config).removeprefix("file://")) / name
    path.mkdir(parents=True)
    save_checkpoint(path, replace(checkpoint, spec=replace(checkpoint.spec, lineage=lineage)))
    enter_checkpoint(STORAGE, run_folder(config), Listed(1, images, name), 5)
    assert newest_checkpoint(config) is not None


def test_the_sensor_fires_once_for_new_data_and_never_for_old(experiment, tmp_path):
    sensor, config = Sensor(experiment), compose(experiment)
    (request,) = sensor.requests()
    assert (request.partition_key, len(request.run_key)) == ("pets", len("pets-") + 64)
    assert sensor.requests() == []  # asked for already
    write_dataset(config, Silent())
    assert sensor.requests() == []  # the run has begun: the same data as shards
    trained(config)
    assert sensor.requests() == []
    sensor.cursor = None  # Dagster has forgotten everything
    assert sensor.requests() == []
    assert "run 'pets' is of the data of digest" in sensor.said

    write_files(tmp_path / "photos", {"cat/new.png": picture(9)})
    (second,) = sensor.requests()
    assert second.run_key != request.run_key
    assert sensor.requests() == []
    write_dataset(config, Silent())
    trained(config)
    sensor.cursor = None
    assert sensor.requests() == []
    assert "run 'pets-" in sensor.said


def test_what_cannot_be_looked_at_is_said_and_does_not_hold_up_the_others(experiment, tmp_path):
    settings = OrchestrateSettings(
        partitions={"gone": (*experiment, f"data.source={tmp_path}/gone"), "pets": experiment}
    )
    defs = make_definitions(settings)
    sensor = defs.resolve_sensor_def("new_data")
    found = sensor.evaluate_tick(dg.build_sensor_context(definitions=defs))
    assert [request.partition_key for request in found.run_requests] == ["pets"]
    nothing = sensor.evaluate_tick(dg.build_sensor_context(definitions=defs, cursor=found.cursor))
    assert "gone: " in nothing.skip_message
    assert list(json.loads(nothing.cursor)) == ["pets"]


# --- a real child ---


@pytest.mark.slow
def test_a_child_makes_a_dataset_tells_dagster_of_it_and_skips_it_the_second_time(experiment, monkeypatch):
    nobody = ("tracking.uri=http://127.0.0.1:9", "cluster.address=127.0.0.1:9", "storage.local_stack=true")
    settings = OrchestrateSettings(partitions={"tiny": (*experiment, *nobody)}, retries=0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[4]))
    metadata = []
    for _ in range(2):
        result = materialised(GRAPH[0], dg.PipesSubprocessClient(), settings)
        assert result.success
        (event,) = result.get_asset_materialization_events()
        metadata.append(event.materialization.metadata)
        version = event.materialization.tags["dagster/data_version"]
    assert [found["skipped"].value for found in metadata] == [False, True]
    assert metadata[0]["digest"].value == metadata[1]["digest"].value == version
    assert "holds this input already" in metadata[1]["why"].value
    missing = materialised(REGISTER, dg.PipesSubprocessClient(), settings)
    (event,) = [e for e in missing.all_events if e.event_type_value == "STEP_FAILURE"]
    assert "the result of train, which comes before, is not there" in event.event_specific_data.error_display_string
