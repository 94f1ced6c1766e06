"""The process of one stage: `python -m pipelines.flow.orchestrate.child --stage train +experiment=digits …`.

Dagster starts it and gets its result through dagster-pipes; started by hand it does the same without a report. An
expected error is reported as a message with exit status 0, because of a failed process Dagster reads only the status.
If a Dagster run is cancelled, its child stops as after Ctrl-C; a training writes a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dagster_pipes import DagsterPipesWarning, PipesContext, PipesEnvVarParamsLoader, open_dagster_pipes

from pipelines.environment.credentials import redact
from pipelines.environment.lineage import code_lineage
from pipelines.flow.stage import GATE, GRAPH, INGEST, Site, select
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Progress, Report, Silent, TimeBreakdown, TrainingStatus

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.flow.walk import FlowResult

CHECK = "gate"
"""Name of the asset check with the gate's decision."""
SERVICES = ("s3", "mlflow", "ray")
SAID_EVERY_S = 30.0
"""Seconds between progress lines."""


class PipesDisplay(Silent):
    """A `Display` whose lines are in the log of the Dagster run, and on stderr."""

    def __init__(self, context: PipesContext) -> None:
        self.context = context

    def stage(self, name: str, text: str) -> None:
        """Log one line of a stage."""
        line = redact(f"{name}: {text}")
        print(line, file=sys.stderr, flush=True)
        self.context.log.info(line)

    def counter(self, description: str, unit: str) -> Progress:
        """Return a callback that logs progress now and then."""
        said = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said > SAID_EVERY_S:
                said = time.monotonic()
                self.stage(description, f"{done:,} of {total:,} {unit}")

        return update

    def training(self, images: int, resumes_at: int) -> Report:
        """Return a callback that logs the progress of a training now and then."""
        said = time.monotonic()

        def update(status: TrainingStatus) -> None:
            nonlocal said
            if time.monotonic() - said > SAID_EVERY_S:
                said = time.monotonic()
                loss = "" if status.loss is None else f", loss {status.loss:.4g}"
                self.stage("train", f"{status.images_seen:,} of {status.length or images:,} images{loss}")

        return update

    def breakdown(self, breakdown: TimeBreakdown) -> None:
        """Log where the time of a stage went."""
        for line in (breakdown.title, *breakdown.lines):
            self.stage(breakdown.name, line)


def run_stage(
    stage: str, overrides: Sequence[str], display: PipesDisplay, launch: Sequence[str] = ()
) -> tuple[FlowResult, Config]:
    """Run one stage unless its result exists; the results of earlier stages must exist.

    Args:
        stage: its name.
        overrides: of the configuration, as on the command line.
        launch: overrides of the launch of a RayJob for the stage; none to run it here.

    Returns:
        The result, and the configuration with every address filled in.

    Raises:
        PipelineError: a required result is missing, or the stage fails.
    """
    select(GRAPH, stage, stage)  # before anything starts
    from pipelines.config import compose
    from pipelines.stack.connect import connect

    services = SERVICES[:2] if launch else SERVICES
    config = connect(compose(overrides), os.environ, services, notice=display.stage)  # before ray is imported

    from pipelines.flow.graph import stages
    from pipelines.flow.train import for_data
    from pipelines.flow.walk import walk
    from pipelines.storage import Storage

    if stage != INGEST.name:
        config = for_data(config)
    site = Site(Storage.of(config), code_lineage(), display)
    if launch:
        from pipelines.flow.orchestrate.on_kubernetes import walk_on_kubernetes

        return walk_on_kubernetes(stages(config), site, stage, overrides, launch), config
    return walk(stages(config), site, stage, stage), config


def report(stage: str, result: FlowResult, config: Config, context: PipesContext) -> None:
    """Report the result of a stage to Dagster: a materialisation, or only a message if the gate refuses the version."""
    from pipelines.flow.orchestrate.facts import facts, gate_table, plain_json, text_table

    (spec,) = [spec for spec in GRAPH if spec.name == stage]
    metadata, digest = facts(spec.gives, result.results, config.tracking.server)
    why = result.skipped.get(stage)
    metadata |= {"skipped": why is not None, "inputs": plain_json(result.inputs[stage])}
    metadata["why"] = "its result was not there" if why is None else f"skipped: {why}"
    verdict = result.results.champion
    if spec is GATE and verdict is not None:
        table = text_table(gate_table(verdict))
        compared = {"n": verdict.n, "attempt": verdict.attempt} if verdict.n else {}  # Dagster plots every number
        about = {"reason": verdict.reason, "table": table, **compared}
        context.report_asset_check(CHECK, passed=verdict.passed, severity="ERROR", metadata=about)
        if not verdict.passed:
            context.report_custom_message({"failed": f"the gate has {verdict}", "retry": False})
            return
    context.report_asset_materialization(metadata=metadata, data_version=digest or None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage that the arguments name, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.flow.orchestrate.child", description=__doc__)
    parser.add_argument("--stage", required=True, choices=[spec.name for spec in GRAPH])
    parser.add_argument(
        "--launch", action="append", default=[], help="launch.FIELD=VALUE of a RayJob in which it runs; once for each"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as +experiment=digits")
    given = parser.parse_args(arguments)
    orchestrated = PipesEnvVarParamsLoader().is_dagster_pipes_process()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DagsterPipesWarning)  # that nobody listens, where it was started by hand
        with open_dagster_pipes() as context:
            try:
                result, config = run_stage(given.stage, given.overrides, PipesDisplay(context), given.launch)
                report(given.stage, result, config, context)
                verdict = result.results.champion
                code = 1 if verdict is not None and not verdict.passed else 0
            except PipelineError as error:
                text, code = redact(str(error)), error.exit_code
                print(text, file=sys.stderr, flush=True)
                context.report_custom_message({"failed": text, "retry": code != 2})
    return 0 if orchestrated else code


if __name__ == "__main__":
    sys.exit(main())
