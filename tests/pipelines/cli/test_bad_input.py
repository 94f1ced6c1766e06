"""Commands that cannot be done say so in a line and with status 2, before any service is asked or anything written."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pipelines.cli import main

DIGITS = ["+experiment=digits"]
GIVEN = ["models:/m/1", "PICTURE", "--out", "x"]
LARGE = "99999999999999999999"
BAD: dict[str, tuple[list[str], str]] = {
    "a folder that is a file": (["sample", "runs:/ab", "--out", "FILE"], "a file has this name"),
    "a folder below a file": (["sample", "runs:/ab", "--out", "FILE/below"], "a file has this name"),
    "a folder that cannot be made": (
        ["sample", "runs:/ab", "--out", "/proc/no/folder"],
        "cannot be created or written",
    ),
    "an export to a file": (["export", "runs:/ab", "--to", "FILE"], "a file has this name"),
    "an import to a file": (["import", "nowhere", "--to", "FILE"], "a file has this name"),
    "likelihoods to a file": (["likelihood", "runs:/ab", "nowhere", "--out", "FILE"], "a file has this name"),
    "a flow to a file": (["flow", *DIGITS, "--out", "FILE"], "a file has this name"),
    "a run of no id": (["sample", "runs:/XYZ", "--out", "x"], "write runs:/ID, runs:/ID/IMAGES or runs:/ID/best"),
    "a run at no number": (["sample", "runs:/ab/many", "--out", "x"], "write runs:/ID"),
    "a run with an odd width": (["sample", "runs:/ab/sigma_rel=2", "--out", "x"], "write runs:/ID"),
    "runs with one slash": (["evaluate", "runs:ab"], "write runs:/ID"),
    "a version of no number": (
        ["sample", "models:/m", "--out", "x"],
        "write models:/NAME@alias or models:/NAME/VERSION",
    ),
    "a version too large": (["sample", f"models:/m/{LARGE}", "--out", "x"], "a number of up to ten digits"),
    "an evaluation of a version too large": (["evaluate", f"models:/m/{LARGE}"], "a number of up to ten digits"),
    "two aliases": (["register", "models:/m@a@b"], "write models:/NAME@alias"),
    "a verified version of no number": (["verify", "models:/m/x"], "write models:/NAME@alias"),
    "a promoted version of no number": (["promote", "models:/m", "--alias", "champion"], "write models:/NAME@alias"),
    "a version of a name with a quote": (["sample", "models:/m'x/1", "--out", "x"], "no / : @ ' or"),
    "a verified name with a backslash": (["verify", "models:/m\\@a"], "no / : @ ' or"),
    "a promoted name with a quote": (["promote", "models:/m'/1", "--alias", "a"], "no / : @ ' or"),
    "a name with a quote to roll back": (["promote", "models:/m'", "--alias", "a", "--rollback"], "no / : @ ' or"),
    "a registered name with a quote": (["register", "runs:/ab", "--name", "m'x"], "no / : @ ' or"),
    "a configured name with a quote": (["train", *DIGITS, 'registry.model="m\'x"'], "registry.model: the name of a"),
    "a name with a line break": (["flow", *DIGITS, "registry.model='a\nb'"], "registry.model: the name of a model"),
    "a report of a version of no number": (["report", "models:/m"], "write models:/NAME@alias"),
    "a report of a run with a quote": (["report", "a'b"], "a'b names no run: write its name"),
    "a report of a path": (["report", "../x"], "../x names no run: write its name"),
    "a study of a run of no id": (["search", "guidance", "--model", "runs:/"], "write runs:/ID"),
    "a study that is a path": (["search", "status", "../x"], "no study can be called '../x'"),
    "images that are not there": (["ingest", "nowhere", "--to", "s3://b/d"], "nowhere is not a folder; a source is"),
    "images in a text": (["ingest", "FILE", "--to", "s3://b/d"], "FILE is not a folder; a source is"),
    "a zip that is not there": (["ingest", "no.zip", "--to", "s3://b/d"], "no.zip does not exist; a source is"),
    "a table below a file": (["ingest", "FILE/x.csv", "--to", "s3://b/d"], "FILE/x.csv does not exist; a source is"),
    "images on a web site": (["ingest", "https://h/x.zip", "--to", "s3://b/d"], "https://h/x.zip: addresses are s3://"),
    "another source than the one named": (["ingest", "digits", "--to", "s3://b/d", "data.source=no"], "no is not a fo"),
    "a flow of nothing": (["flow", "nowhere"], "nowhere is not a folder; a source is"),
    "a dry run of nothing": (["flow", "nowhere", "--dry-run"], "nowhere is not a folder; a source is"),
    "an experiment on nothing": (["flow", "nowhere", *DIGITS], "nowhere is not a folder; a source is"),
    "a source of nothing": (["flow", *DIGITS, "data.source=nowhere"], "nowhere is not a folder; a source is"),
    "a plan for nothing": (["plan", "nowhere", "budget=1h"], "nowhere is not a folder; a source is"),
    "a dataset at no address": (["train", *DIGITS, "data.uri=notanaddress"], "data.uri = notanaddress: addresses are"),
    "a flow to no address": (["flow", *DIGITS, "data.uri=notanaddress"], "data.uri = notanaddress: addresses are"),
    "a root at no address": (["train", *DIGITS, "storage.root=ddpm"], "storage: root must be s3://BUCKET"),
    "a bucket of no name": (["train", *DIGITS, "data.uri=s3://"], "data.uri = s3://: addresses are s3://BUCKET/KEY"),
    "a half that is none": (["inpaint", *GIVEN, "--mask", "half:sideways"], "is one of left, right, top, bottom"),
    "a half of nothing": (["inpaint", *GIVEN, "--mask", "half:"], "is one of left, right, top, bottom"),
    "a box of two numbers": (["inpaint", *GIVEN, "--mask", "box:1,2"], "write box:X,Y,WIDTH,HEIGHT, four whole"),
    "a box of words": (["inpaint", *GIVEN, "--mask", "box:a,b,c,d"], "write box:X,Y,WIDTH,HEIGHT, four whole"),
    "a box of nothing": (["inpaint", *GIVEN, "--mask", "box:"], "write box:X,Y,WIDTH,HEIGHT, four whole numbers"),
    "a box without an area": (["inpaint", *GIVEN, "--mask", "box:0,0,0,4"], "a box begins at 0,0 or later and has"),
    "a box before the first pixel": (["inpaint", *GIVEN, "--mask", "box:-1,0,4,4"], "a box begins at 0,0 or later"),
    "an image that is not there": (
        ["edit", "models:/m/1", "no.png", "--out", "x"],
        "the image no.png cannot be read: No such file or directory",
    ),
    "an image that is a folder": (["edit", "models:/m/1", ".", "--out", "x"], "the image . cannot be read: Is a dir"),
    "an image that is a text": (["edit", "models:/m/1", "FILE", "--out", "x"], "the image FILE is not an image of a"),
    "an image that is a text, for a server": (
        ["edit", "m", "FILE", "--out", "x", "--url", "http://127.0.0.1:9"],
        "the image FILE is not an image of a known kind",
    ),
    "a mask that is a text": (
        ["inpaint", *GIVEN, "--mask", "FILE"],
        "the mask FILE is not an image of a known kind (PNG, JPEG, WEBP, BMP, TIFF, GIF, AVIF, HEIF), or its beginning "
        "is damaged; give a picture, box:X,Y,WIDTH,HEIGHT or half:SIDE",
    ),
    "a mask that is not there": (["inpaint", *GIVEN, "--mask", "no.png"], "the mask no.png cannot be read: No such"),
    "a field that is none": (["train", *DIGITS, "optimm.lr=1"], "optimm.lr=1: there is no 'optimm' at the top"),
    "a field within a field": (
        ["train", *DIGITS, "batch_size.x=1"],
        "batch_size is a field and has no fields of its own",
    ),
    "a field without a name": (["train", *DIGITS, "=3"], "=3: there is no '' at the top"),
    "a bracket that stays open": (["train", *DIGITS, "optim.betas=[0.9"], "cannot read the overrides"),
    "a quote that stays open": (["train", *DIGITS, "name='a"], "cannot read the overrides"),
    "thousands of brackets": (["train", *DIGITS, "seed=" + "[" * 2_000 + "]" * 2_000], "too many nested brackets"),
    "a number of thousands of digits": (["train", *DIGITS, "images=" + "9" * 5_000], "a number with too many digits"),
    "more images than are ever seen": (["train", *DIGITS, "images=1" + "0" * 400], "images: Input should be less than"),
    "a name as long as a page": (["train", *DIGITS, "name=" + "a" * 5_000], "name: String should have at most 200"),
    "a word for a number": (["train", *DIGITS, "batch_size=many"], "batch_size: Input should be a valid integer"),
    "half an image": (["train", *DIGITS, "batch_size=1.5"], "batch_size: Input should be a valid integer, got a n"),
    "a list for a number": (["train", *DIGITS, "batch_size=[1]"], "batch_size: Input should be a valid integer, got ["),
    "a mapping for a number": (["train", *DIGITS, "batch_size={a:1}"], "batch_size: Input should be a valid integer"),
    "nothing for a number": (["train", *DIGITS, "batch_size=null"], "batch_size: Input should be a valid integer"),
    "a word for yes or no": (["train", *DIGITS, "data.flip=maybe"], "data.flip: Input should be a valid boolean"),
    "a pair of one": (["train", *DIGITS, "optim.betas=[0.9]"], "optim.betas.1 has no value"),
    "a number for a group": (["train", *DIGITS, "optim=3"], "optim=3: optim is chosen by name. Allowed: adamw"),
    "a list for a group": (["train", *DIGITS, "optim=[1]"], "optim=[1]: optim is chosen by name. Allowed: adamw"),
    "nothing for a group": (["train", *DIGITS, "optim=null"], "optim=null: optim is chosen by name. Allowed: adamw"),
    "an unknown choice of a group": (["train", *DIGITS, "sampler=magic"], "no 'magic' in sampler. Allowed: ancestral"),
    "several values at once": (["train", *DIGITS, "optim.lr=1e-3,1e-4"], "Ambiguous value for argument 'optim.lr"),
    "a sweep": (["train", *DIGITS, "optim.lr=range(1,3)"], "Sweep parameters"),
    "a value of no field": (["train", *DIGITS, "name=${nothing}"], "'nothing' not found"),
    "a value of itself": (["train", *DIGITS, "name=${name}"], "Recursive interpolation detected"),
    "two experiments": (["train", *DIGITS, "+experiment=cifar10"], "Multiple values for experiment"),
    "a configuration that is not there": (["train", "--config", "no.json"], "no.json: no such file"),
    "a configuration that is a folder": (["train", "--config", "."], ".: [Errno 21] Is a directory"),
    "a configuration that is a picture": (["train", "--config", "PICTURE"], "PICTURE: 'utf-8' codec can't decode byte"),
    "a configuration that is a text": (["train", "--config", "FILE"], "name has no value: set it with name=VALUE"),
    "a setting without a name": (["sample", "runs:/ab", "--out", "x", "--set", "=3"], "write FIELD=VALUE such as clip"),
    "a setting without a value": (["sample", "runs:/ab", "--out", "x", "--set", "steps"], "write FIELD=VALUE such as"),
    "a setting of thousands of brackets": (
        ["sample", "runs:/ab", "--out", "x", "--set", "a=" + "[" * 5_000],
        "a: its value cannot be read: maximum recursion depth exceeded",
    ),
    "a setting of thousands of digits": (
        ["sample", "runs:/ab", "--out", "x", "--set", "a=" + "9" * 5_000],
        "a: its value cannot be read: Exceeds the limit",
    ),
    "seeds of thousands of digits": (
        ["sample", "runs:/ab", "--out", "x", "--seeds", "9" * 5_000],
        "seeds: its value cannot be read: Exceeds the limit",
    ),
    "an interval of words": (["sample", "runs:/ab", "--out", "x", "--interval", "a,b"], "interval must be 2 numbers"),
    "prompts that are not there": (
        ["sample", "runs:/ab", "--out", "x", "--prompt-file", "no.txt"],
        "no.txt cannot be read",
    ),
    "prompts that are a picture": (
        ["sample", "runs:/ab", "--out", "x", "--prompt-file", "PICTURE"],
        "PICTURE cannot be read: 'utf-8' codec can't decode byte",
    ),
    "a server without an address": (
        ["sample", "m", "--out", "x", "--url", "nowhere"],
        "nowhere: write the address of a server, http://HOST:PORT",
    ),
    "a server of another kind": (["sample", "m", "--out", "x", "--url", "ftp://h"], "write the address of a server"),
    "a plan for a variable that is not set": (["plan", ""], "the source has no name; a source is `digits`, a folder"),
    "images of a variable that is not set": (["ingest", "", "--to", "s3://b/d"], "the source has no name; a source"),
    "a served version of no number": (["serve", "models:/m"], "write models:/NAME@alias or models:/NAME/VERSION"),
    "a version twice served": (["serve", "models:/m@a@b"], "write models:/NAME@alias or models:/NAME/VERSION"),
    "a port that is none": (["serve", "models:/m/1", "serving.port=99999"], "serving.port: Input should be less than"),
    "a removed run that is a path": (["rm", "../x"], "name: String should match pattern"),
    "a removed run that is any": (["rm", "*"], "name: String should match pattern"),
    "logs of no run": (["logs", ""], "name: String should match pattern"),
    "an alias that MLflow has": (["promote", "models:/m/1", "--alias", "latest"], "MLflow keeps latest, v1, v2"),
    "a project in a file": (["init", "FILE"], "FILE is a file: name a new or an empty folder"),
    "a project below a file": (["init", "FILE/x"], "cannot write a project to FILE/x: Not a directory"),
    "an exported run of no id": (["export", "runs:/", "--to", "x"], "write runs:/ID"),
    "a picture larger than any": (["train", *DIGITS, "data.image_size=1000000"], "data.image_size"),
    "an infinite rate": (["train", *DIGITS, "optim.lr=inf"], "optim.lr"),
    "a rate that is no number": (["train", *DIGITS, "optim.lr=nan"], "optim.lr"),
    "an infinite wait": (["train", *DIGITS, "cluster.step_timeout_s=inf"], "cluster.step_timeout_s"),
    "an infinite momentum": (["train", *DIGITS, "optim.betas=[0.9,inf]"], "optim.betas"),
    "an infinite guidance": (
        ["sample", "runs:/ab", "--out", "x", "--guidance", "inf"],
        "scale must be finite",
    ),
    "a guidance that is no number": (
        ["sample", "runs:/ab", "--out", "x", "--guidance", "nan"],
        "scale must be finite",
    ),
    "an eta that is no number": (["sample", "runs:/ab", "--out", "x", "--eta", "nan"], "eta must be finite, got nan"),
    "a strength that is no number": (
        ["edit", "runs:/ab", "FILE", "--out", "x", "--strength", "nan"],
        "Invalid value for '--strength': Input should",
    ),
    "an infinite margin": (
        ["promote", "models:/m/1", "--alias", "a", "--not-worse-than", "inf"],
        "inf is not a finite",
    ),
    "an infinite age": (["gc", "--older-than", "inf"], "inf is not a finite number"),
    "a look each never": (["guard", "--every", "inf"], "inf is not a finite number"),
    "a seed of twenty digits": (["sample", "runs:/ab", "--out", "x", "--seed", LARGE], "--seed"),
    "seeds of twenty digits": (["sample", "runs:/ab", "--out", "x", "--seeds", f"1,{LARGE}"], "seeds"),
    "a run's seed of twenty digits": (["train", *DIGITS, f"seed={LARGE}"], "seed"),
    "an evaluation's seed": (["train", *DIGITS, f"evaluation.seed={LARGE}"], "evaluation.seed"),
    "more steps than levels": (["search", "steps", "--model", "runs:/ab", "--evaluations", "100000"], "raise --grid"),
    "steps of no model": (["search", "steps", "--model", "runs:/", "--evaluations", "4"], "write runs:/ID"),
    "no class between commas": (["index", "file:///tmp/x", "--split", "train", "--classes", ",,"], "--classes ,,"),
    "a class twice": (["index", "file:///tmp/x", "--split", "train", "--classes", "a,b,a"], "each only once"),
    "a budget of no time": (["plan", "digits", "budget="], "budget= has no value"),
    "a budget of a second": (
        ["plan", "digits", "budget=1s"],
        "budget = 1s leaves no time to train: the other stages take start 28 s, ingest 1 s, evaluator 8 s, scores 18 "
        "s, register 12 s; give budget=2m30s or more",
    ),
    "a flow of a minute": (["flow", "digits", "budget=1m"], "give budget=2m30s or more"),
    "a dry run of a minute": (["flow", "digits", "budget=1m", "--dry-run"], "give budget=2m30s or more"),
    "a budget in other words": (["plan", "digits", "budget=soon"], "write a time such as budget=90s, budget=30m"),
    "a budget below nothing": (["plan", "digits", "budget=-1h"], "write a time such as budget=90s, budget=30m"),
    "a budget of many years": (["plan", "digits", "budget=" + "9" * 5_000 + "d"], "at most 1000d can be planned for"),
    "two budgets": (["plan", "digits", "budget=1h", "budget=2h"], "give only one"),
}


@pytest.mark.parametrize("kind", BAD)
def test_impossible_requests_are_refused_in_a_line_before_a_service_is_contacted(
    kind, monkeypatch, capsys, tmp_path: Path
):
    arguments, message = BAD[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "home"))
    Path("FILE").write_text("a file")
    Image.new("L", (8, 8)).save("PICTURE", "png")
    monkeypatch.setattr("sys.argv", ["ddpm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    flat = " ".join(said.err.replace("│", " ").split())
    assert (stopped.value.code, said.out) == (2, ""), flat
    assert message in flat
    assert "Traceback" not in flat
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "PICTURE"]  # nor a local stack's folder
