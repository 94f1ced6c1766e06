import pytest
from typer.testing import CliRunner

from pipelines.cli import main, search
from pipelines.cli.app import app

VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]
VERBS += [f"search {command.callback.__name__}" for command in search.app.registered_commands]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb):
    done = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert done.exit_code == 0
    assert f"Example: ddpm {verb}" in " ".join(done.output.split())


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["train", "modle.width=3"], 2, "Did you mean 'model'?"),
        (["train", "optim.lr=fast"], 2, "optim.lr"),
        (["sample"], 2, "Missing argument"),
        (["trian"], 2, "No such command"),
        (["plan"], 2, "name a folder of images, such as `ddpm plan photos budget=30m`"),
        (["plan", "photos", "budget=soon"], 2, "budget = soon: write a time such as budget=90s"),
        (["plan", "photos", "--save", "no/such/plan.yaml"], 2, "--save no/such/plan.yaml: there is no folder no/such"),
        (["plan", "photos", "--save", "."], 2, "--save . is a folder: give a file name, such as plan.yaml"),
        (["plan", "photos", "storage=file", "storage.root=file:///x"], 2, "photos is not a folder"),
        (["flow", "budget=10m"], 2, "budget=10m is for a SOURCE"),
        (["flow", "photos", "pictures"], 2, "photos and pictures: give only one"),
        (["flow", "photos", "+experiment=digits", "budget=10m"], 2, "an experiment has its own length"),
        (["flow", "photos", "--config", "x.yaml"], 2, "omit SOURCE and budget"),
        (["flow", "--from", "learn"], 2, "no such stage. Allowed: ingest, train, evaluator, evaluate, register, gate"),
        (["flow", "--from", "gate", "--until", "train"], 2, "train comes before gate"),
        (["flow", "--out", "x", "--until", "train"], 2, "--out draws from the registered model"),
        (["flow", "--dry-run"], 1, "S3 and MLflow of the local stack are not running"),
        (["report"], 2, "Missing argument"),
        (["report", "first"], 1, "S3 and MLflow of the local stack are not running"),
        (["report", "first", "--out", "."], 2, "--out . is a folder: give a file name, such as report.html"),
        (["report", "first", "--out", "no/such.html"], 2, "--out no/such.html: there is no folder no"),
        (["promote", "models:/m/1", "--alias", "prod.eu"], 2, "registry.alias"),
        (["import", __file__, "--to", "x"], 1, "Not a directory: "),
        (["check"], 2, "Missing argument"),
        (["check", "data/birds"], 2, "data/birds is not an address: write s3://BUCKET/PATH or file:///PATH"),
        (["check", "file:///nowhere", "--threads", "0"], 2, "--threads"),
        (["check", "file:///nowhere"], 1, "dataset.json is missing"),
        (["index", "birds"], 2, "birds is not an address"),
        (["index", "file:///nowhere", "--split", "=x"], 2, "'=x' is not a split: write NAME=PATTERN"),
        (["index", "file:///nowhere"], 1, "no *.tar at file:///nowhere"),
        (["search", "training", "--study", "a/b"], 2, "no study can be called 'a/b': use letters, digits"),
        (["search", "guidance", "--model", "/m", "--study", "-x"], 2, "no study can be called '-x': use letters"),
        (["search", "steps", "--model", "/m", "--evaluations", "2", "--study", "a b"], 2, "no study can be called"),
        (["search", "status", "a/b", "storage=file", "storage.root=file:///x"], 2, "no study can be called 'a/b'"),
        (["launch"], 2, "name a verb, such as `ddpm launch --target ray train"),
        (["launch", "--target", "slurm", "train"], 2, "'slurm' is not one of 'kuberay', 'aws', 'ray'"),
        (["launch", "--target", "kuberay", "up"], 2, "'up' cannot be launched on a cluster. Allowed: ingest, index"),
        (["launch", "--target", "kuberay", "train"], 2, "launch.image has no value: set it with launch.image=VALUE"),
        (["launch", "--target", "kuberay", "train", "launch.image=x"], 2, "storage=local is the S3 of this machine's"),
        (["launch", "--target", "aws", "--status", "x"], 2, "use the dashboard of a cluster on EC2: `ray dashboard"),
        (["launch", "train", "data.uri=sftp://u:p@h/d"], 2, "data.uri = sftp://***@h/d has a password in it"),
        (["launch", "train"], 1, "Ray of the local stack is not running, and no other is named"),
        (["sample", "/nowhere", "--out", "x", "storage=file", "storage.root=file:///x"], 1, "names no model"),
    ],
)
def test_exit_codes_tell_bad_usage_from_failure(arguments, code, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ddpm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (code, "")
    assert message in " ".join(captured.err.split())
