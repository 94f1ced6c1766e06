"""Every name of stored data is spelled out in one module, and none of them has ever changed."""

import ast
from collections.abc import Iterator
from pathlib import Path

from pipelines.storage import layout

PACKAGE = Path(layout.__file__).parents[1]
EXEMPT = {
    "storage/layout.py",
    "registry/redraw.py",  # is run by its path, and imports nothing of this package
    "tracking/links.py",  # has the routes of MLflow's own pages
}
OTHERS_TOO = {layout.SHARD_SUFFIX, layout.CONFIG}
"""Names that other formats have too: archives of sources, and models of the Hugging Face Hub."""
FOLDERS = {
    *layout.FOLDERS,
    *layout.BESIDE_DATA,
    *(layout.PUBLISHED, layout.RUNG_SCORES, layout.LOGS, layout.METRICS, layout.GOODPUT, layout.TRIALS, layout.BEST),
    *(layout.SCORES_RECORDED, layout.BOUND_TERMS, layout.CHECKPOINTS_RECORDED, layout.SIGNATURES, layout.FIGURES),
}
STARTS = tuple(
    f"{name}/{{}}"
    for name in (*FOLDERS - {layout.RUNG_SCORES}, layout.MLFLOW)  # `scores/NAME` is also a metadata key of Dagster
)
FILES = {
    value
    for name, value in vars(layout).items()
    if name.isupper() and isinstance(value, str) and ("." in value or "-" in value) and value not in OTHERS_TOO
}


def spelled_out(source: str) -> Iterator[str]:
    """Yield what a module spells out of the layout, with its line.

    That is a name of a file anywhere but in prose, a piece of an address given to `join`, a constant with the name of
    a folder, and text with such a name between or before slashes.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "join":
            for part in (part for argument in node.args for part in ast.walk(argument)):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield f"{part.lineno}: join(…, {part.value!r})"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.removeprefix("/") in FILES:
            yield f"{node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value in FOLDERS:
            yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.JoinedStr):
            shown = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)  # type: ignore[misc]
            if any(f"{{}}/{name}" in shown for name in FOLDERS - {*layout.BESIDE_DATA}) or shown.startswith(STARTS):
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_no_other_module_spells_out_the_name_of_a_stored_folder_or_file() -> None:
    """Including those that are written only once: what reads them later must find the same name."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in EXEMPT
        for line in spelled_out(path.read_text())
    ]
    assert found == []


def test_the_scan_finds_names_in_calls_constants_and_text() -> None:
    """And not those of an ordinary word."""
    assert list(spelled_out('join(root, "runs", name)')) == ["1: join(…, 'runs')"]
    assert list(spelled_out('join(uri, f"{name}.bin")')) == ["1: join(…, '.bin')"]
    assert list(spelled_out('storage.write(uri + "/dataset.json", text)')) == ["1: '/dataset.json'"]
    assert list(spelled_out('FOLDER = "studies"')) == ["1: FOLDER = 'studies'"]
    assert list(spelled_out('where = f"{root}/datasets/{name}"')) == ["1: f'{root}/datasets/{name}'"]
    assert list(spelled_out('say("runs", f"{count} runs")')) == []


def test_addresses_are_those_of_every_release() -> None:
    """What an earlier release has stored is found at the same place."""
    root = "s3://bucket/team/"
    assert layout.dataset_folder(root, "digits-8px") == "s3://bucket/team/datasets/digits-8px"
    assert layout.run_folder(root, "digits") == "s3://bucket/team/runs/digits"
    assert layout.study_folder(root, "guidance") == "s3://bucket/team/studies/guidance"
    assert layout.verdict_folder(root, "digits", "champion") == "s3://bucket/team/registry/digits/champion"
    assert layout.plan_file(root, "digits") == "s3://bucket/team/plans/digits.json"
    assert layout.index_name("train/000001.tar") == "train/000001.index.json"
    assert layout.progress_name("train/000001.tar") == "ingest-progress/train/000001.json"
    assert layout.numbered(1280) == "000000001280.json"
    assert layout.part_file(3) == "part-00003.safetensors"
    assert layout.mlflow_artifacts("ddpm") == "s3://ddpm/mlflow"
    assert {
        *(".ddpm-", "dataset.json", "quarantine.json", "ingest-report.json", ".index.json", "ingest-progress"),
        *("ingest-key", "evaluator.json", "evaluator.safetensors", "real.json", "moments.safetensors"),
        *("held-out.safetensors", "run.json", "checkpoints.json", "goodput.json", "unsent.zip", "model.json"),
        *("model.safetensors", "state.json", "training.safetensors", "power_ema.safetensors", "evidence.json"),
        *("probe.safetensors", "record.json", "study.json", "confirmation.json", "study.html", "steps.json"),
        *("best/sampling.json", "best/overrides.txt", "parts.json"),
        *("ingest-progress/sources", "ingest-progress/fingerprints", "index-progress", "check-progress"),
    } == FILES
    assert {
        *(
            "datasets",
            "runs",
            "studies",
            "evaluations",
            "registry",
            "plans",
            "forgotten",
            "evaluator",
            "features",
            "published",
        ),
        *("scores", "logs", "metrics", "goodput", "trials", "best", "evaluation", "bound", "checkpoints"),
        *("signatures", "figures"),
    } == FOLDERS
    assert (layout.DRIVER, layout.CHECKPOINT_PREFIX) == ("driver", "checkpoint_")
