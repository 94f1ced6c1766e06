"""`ddpm search guidance`, `training`, `steps` and `status`: hyperparameter studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.common import MODEL, SERVICES, Json, Overrides, answer_json, compose, connect, finite, terminal
from pipelines.environment.lineage import code_lineage

if TYPE_CHECKING:
    from pipelines.search.studies import Search

app = typer.Typer(no_args_is_help=True, help="Search hyperparameters with Ray Tune and Optuna.")
Study = Annotated[str | None, typer.Option(help="Name of the study; default: from the space and the run")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the study with this name")]
After = Annotated[list[str] | None, typer.Option(help="Try the best trials of this earlier study first; repeatable")]


@app.command()
def guidance(
    model: Annotated[str, typer.Option(help=MODEL)],
    space: Annotated[str, typer.Option(help="A study of conf/search/, or a YAML file")] = "guidance",
    study: Study = None,
    resume: Resume = False,
    after: After = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Search guidance and sampler settings of a model. Example: ddpm search guidance --model models:/digits@champion"""
    from pipelines.checkpoints.lookup import check_form
    from pipelines.search.study_config import compose_study, study_name

    check_form(model)
    chosen, config, of_run = compose_study(space, "guidance", overrides or [])
    name = study_name(study or f"guidance-{config.name}")
    config = connect(config, SERVICES)

    from pipelines.checkpoints import lookup
    from pipelines.search.guidance_search import GuidanceSearch

    config = lookup.judged_as_before(config, of_run, model)
    _run(GuidanceSearch(config, name, chosen, terminal.stage, model, of_run), resume, after, as_json)


@app.command()
def training(
    space: Annotated[str, typer.Option(help="A study of conf/search/, or a YAML file")] = "schedule",
    study: Study = None,
    resume: Resume = False,
    after: After = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Search training settings. Example: ddpm search training +experiment=digits images=25600 search.trials=16"""
    from pipelines.search.study_config import compose_study, study_name

    chosen, config, _ = compose_study(space, "training", overrides or [])
    name = study_name(study or f"{Path(space).stem}-{config.name}")
    config = connect(config, SERVICES)

    from pipelines.search.training_search import TrainingSearch

    _run(TrainingSearch(config, name, chosen, terminal.stage, code_lineage()), resume, after, as_json)


@app.command()
def steps(
    model: Annotated[str, typer.Option(help=MODEL)],
    evaluations: Annotated[
        int, typer.Option(min=1, help="Steps per image, each with one network evaluation, guided or not")
    ],
    sampler: Annotated[str | None, typer.Option(help="ddim, dpm_solver or unipc; default: the model's own")] = None,
    scale: Annotated[
        float | None,
        typer.Option("--guidance", min=0, callback=finite, help="Guidance scale; default: the model's own"),
    ] = None,
    trajectories: Annotated[int, typer.Option(min=2, help="Number of trajectories on the fine grid")] = 256,
    grid: Annotated[int, typer.Option(min=2, help="Levels of the fine grid")] = 60,
    learn: Annotated[
        int, typer.Option(min=0, help="Updates for learning levels and weights; 0: only choose levels")
    ] = 200,
    study: Study = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Learn the few steps of a solver. Example: ddpm search steps --model models:/digits@champion --evaluations 6"""
    if evaluations > grid:
        raise typer.BadParameter(f"--evaluations {evaluations} needs a finer grid than {grid} levels: raise --grid")
    from pipelines.checkpoints.lookup import check_form
    from pipelines.search.study_config import study_name

    check_form(model)
    config = compose(overrides)
    name = study_name(study or f"steps-{config.name}")
    config = connect(config, ["s3", "mlflow"])

    from ddpm.step_learning import StepLearning
    from ddpm.step_search import StepSearch
    from pipelines.search.steps import StepsAsked, search_steps

    given = {"kind": sampler, "steps": evaluations, "scale": scale}
    changes = {name: value for name, value in given.items() if value is not None}
    learning = StepLearning(updates=learn) if learn else None
    asked = StepsAsked(trajectories, StepSearch(grid=grid), learning)
    found = search_steps(config, model, name, changes, asked, terminal.stage)
    answer_json(as_json, found)


@app.command()
def status(
    study: Annotated[str, typer.Argument(help="Name of the study")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show the trials of a study, running or ended. Example: ddpm search status guidance-digits"""
    from pipelines.search.study_config import study_name

    study_name(study)
    config = connect(compose(overrides), ["s3"])

    from pipelines.search import table
    from pipelines.search.study import StudyStore, count_states

    store = StudyStore.of(config, study)
    described, records = store.study(), store.records()
    terminal.console.print(table.table(described, records))
    terminal.stage("study", f"{len(records)} of {described.trials} trials have started")
    answer_json(as_json, {"study": study, "trials": count_states(records)})


def _run(search: Search, resume: bool, after: list[str] | None, as_json: bool) -> None:
    from pipelines.search import table

    with table.shown(terminal.console, terminal.stage) as on_change:
        best, answer = search.run(resume=resume, after=after or [], on_change=on_change)
    if best is not None:
        terminal.stage("best", table.line(best))
    terminal.stage("page", answer["page"])
    terminal.stage("mlflow", answer["url"])
    answer_json(as_json, answer)
