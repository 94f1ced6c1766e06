import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from ddpm.generate import Sampling
from pipelines.config import (
    ConfigError,
    changed_sampling,
    compose,
    conf_dir,
    flatten,
    from_dict,
    groups,
    network_config,
    noise_schedule,
    read_config,
    sampling,
    sampling_overrides,
)
from tests.docs.modules import load

NEEDED = load("experiments").NEEDED


@pytest.mark.parametrize("name", groups()["experiment"])
def test_every_shipped_experiment_is_complete(name):
    config = compose([f"+experiment={name}", *NEEDED.get(name, [])])
    assert network_config(config).in_channels == config.data.channels
    assert noise_schedule(config).num_steps == config.schedule.num_steps


@pytest.mark.parametrize(
    "setting, message",
    [
        ("registry.alias=prod.eu", r"registry\.alias"),
        ("registry.alias=latest", "MLflow keeps latest, v1, v2 and so on for versions: choose another alias"),
        ("registry.alias=V12", "choose another alias"),
        ("registry.alias=candidate", "candidate and previous move without the gate: choose another alias"),
        ("registry.model=team/digits", r"registry\.model"),
        ("registry.model='a:b'", r"registry\.model"),
    ],
)
def test_names_that_mlflow_would_refuse_are_refused_before_anything_starts(setting, message):
    with pytest.raises(ConfigError, match=message):
        compose(["+experiment=digits", setting])
    assert compose(["+experiment=digits", "registry.alias=vip-1", "registry.model='my pets'"]).registry.alias == "vip-1"


@pytest.mark.parametrize("host", ["::1", "::", "[::1]"])
def test_an_ipv6_address_is_refused_before_a_server_starts(host):
    with pytest.raises(ConfigError, match=r"serving\.host"):
        compose([f"serving.host='{host}'"])
    assert compose(["serving.host=0.0.0.0"]).serving.host == "0.0.0.0"


def test_v_is_predicted_unless_the_papers_setting_is_named():
    assert compose([]).objective.prediction == compose(["+experiment=captions32", "name=x"]).objective.prediction == "v"
    assert compose(["objective=ddpm"]).objective.prediction == "eps"
    for weighted in ("p2", "min_snr"):
        assert compose([f"objective={weighted}"]).objective.prediction == "v"


def test_the_experiment_of_cifar10_is_that_of_the_paper():
    config = compose(["+experiment=cifar10"])
    assert (config.objective.prediction, config.objective.loss, config.objective.weight) == ("eps", "simple", "uniform")
    schedule = config.schedule
    assert (schedule.kind, schedule.num_steps, schedule.beta_start, schedule.beta_end) == ("linear", 1000, 1e-4, 0.02)
    assert (config.batch_size, config.images // config.batch_size, config.optim.lr) == (128, 800_000, 2e-4)
    assert (config.data.flip, config.data.image_size, config.model.class_conditional) == (True, 32, False)
    assert 0.5 ** (config.batch_size / config.optim.ema_half_life) == pytest.approx(0.9999, abs=1e-8)
    assert (config.sampler.kind, config.sampler.steps, config.guidance.scale) == ("ancestral", 1000, 1)
    with torch.device("meta"):
        network = network_config(config).build()
    assert sum(p.numel() for p in network.parameters()) == 35_746_307  # 35.7 M in the paper's appendix B
    model = config.model  # of which the paper's code says what the paper leaves open
    assert (model.channels, model.layers_per_block, model.dropout) == ((128, 256, 256, 256), 2, 0.1)
    assert [32 >> level for level, attends in enumerate(model.attention) if attends] == [16]
    assert (model.head_dim, model.norm_eps, model.downsample_padding) == (None, 1e-6, 0)
    assert (model.flip_sin_to_cos, model.freq_shift, model.scale_shift) == (False, 1, False)
    optim = config.optim
    assert (optim.kind, optim.betas, optim.weight_decay, optim.decay) == ("adamw", (0.9, 0.999), 0, "constant")
    assert (optim.warmup_images // config.batch_size, optim.grad_clip) == (5_000, 1)
    assert config.sampler.variance == "large"


def test_a_weight_may_begin_at_a_sample_that_is_written_in_powers_of_ten():
    config = compose([_sources("weight:{0:1,1e6:2,3000000:3}")])
    (_, source) = config.data.sources
    assert source.weights == {0: 1.0, 10**6: 2.0, 3 * 10**6: 3.0}
    assert from_dict(json.loads(config.model_dump_json())) == config  # whose keys are texts
    assert compose([_sources("weight:3")]).data.sources[1].weights == {0: 3.0}


@pytest.mark.parametrize("group, choice", [(g, c) for g, cs in groups().items() if g != "experiment" for c in cs])
def test_every_shipped_choice_composes(group, choice):
    needed = {"folder": ["data.num_classes=3", "model=unet_small"], "s3": ["storage.root=s3://b"]}
    needed |= {"mixture": [*needed["folder"], "data.sources=[{name:a,uri:s3://b/a}]"]}
    needed |= {"file": ["storage.root=file:///tmp/b"], "unet_cifar10": ["data.image_size=32"]}
    needed |= {key: ["data.image_size=32"] for key in ("unet_cifar10_edm", "jit_base", "jit_large", "jit_huge")}
    needed |= {"kuberay": ["launch.image=x"], "aws": ["launch.image=x"]}
    needed |= {"consistency": ["init_from=runs:/abc"]} if group == "objective" else {}
    needed |= {"unet_small": ["data.image_size=32"], "hybrid": ["model.learned_variance=true"]}
    compose([f"{group}={choice}", *needed.get(choice, [])])


def _sources(field="weight:1", name="b"):
    """An override with two sources, of which the second has this name and field."""
    return f"data.sources=[{{name:a,uri:s3://b/a}},{{name:{name},uri:s3://b/b,{field}}}]"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["modle.width=3"], r"no 'modle' at the top\. .*Did you mean 'model'\?"),
        (["optim.learning_rate=1"], r"no 'learning_rate' in optim\. Allowed: betas, decay"),
        (
            ["schedule=cosin"],
            r"no 'cosin' in schedule\. Allowed: cosine, edm, flow, linear, sigmoid\. Did you mean 'cosine'\?",
        ),
        (["sampler.kind=hoin"], r"sampler\.kind: there is no 'hoin'\. Allowed: ddim, .*Did you mean 'heun'\?"),
        (["+experiment=digit"], r"Did you mean 'digits'\?"),
        (["schedule=linear", "schedule.s=0.1"], r"schedule\.s: no such field here\. Allowed: beta_end"),
        (["schedule.kind=quadratic"], r"schedule\.kind: there is no .*Allowed: linear, cosine, sigmoid"),
        (["optim.lr=-1"], r"optim\.lr: .*greater than 0, got -1"),
        (
            ["objective.prediction=noise"],
            r"objective\.prediction: .*'eps', 'x0', 'v', 'x0_skip' or 'flow', got 'noise'",
        ),
        ([_sources("weight:0")], r"data\.sources\.1\.weight: weights are numbers above 0; leave .*, got 0"),
        ([_sources("weight:-2")], r"data\.sources\.1\.weight: weights are numbers above 0; leave .*, got -2"),
        ([_sources("weight:nan")], r"data\.sources\.1\.weight: weights are numbers above 0; leave .*, got nan"),
        ([_sources("weight:inf")], r"data\.sources\.1\.weight: weights are numbers above 0; leave .*, got inf"),
        ([_sources("weight:much")], r"data\.sources\.1\.weight: a weight is a number, or .*, got 'much'"),
        ([_sources("weight:{0:1,9:0}")], r"data\.sources\.1\.weight: weights are numbers above 0"),
        ([_sources("weight:{0:1,1.5:2}")], r"data\.sources\.1\.weight: a weight is a number, or {N: WEIGHT, \.\.\.}"),
        ([_sources("weight:{9:1}")], r"data\.sources\.1\.weight: weights by stretch need one from sample 0 on"),
        ([_sources("share:1")], r"data\.sources\.1\.share: no such field here\. Allowed: name, uri, weight"),
        ([_sources(name="a")], r"data\.sources: sources 0 and 1, .* are both named 'a': give each a name of its own"),
        ([_sources(name="'a/b'")], r"data\.sources\.1\.name: String should match pattern .*, got 'a/b'"),
        (["data.sources=[{name:a}]"], r"data\.sources\.0\.uri has no value: give it one"),
        (["batch_size=many"], r"batch_size: .*integer.*got 'many'"),
        (["data.lanes=3"], r"data\.lanes = 3 must divide batch_size = 128"),
        (["cluster.num_workers=200"], r"num_workers = 200 exceeds batch_size = 128"),
        (["objective=ddpm", "schedule.zero_terminal_snr=true"], r"use objective\.prediction=v"),
        (["objective=ddpm", "schedule=flow"], r"eps cannot be used with schedule\.kind = flow: .*v or flow"),
        (["sampler.steps=2000"], r"sampler\.steps = 2000 exceeds schedule\.num_steps = 1000"),
        (["objective=hybrid"], r"use hybrid with model\.learned_variance=true"),
        (["model.learned_variance=true"], r"hybrid trains a learned variance, simple trains none"),
        (["objective.weight=snr"], r"objective\.weight: .*'uniform', 'min_snr', 'p2', 'edm' or 'flow', got 'snr'"),
        (["sampler.threshold=0"], r"sampler\.threshold: .*greater than 0"),
        (["data.image_size=9"], r"data\.image_size = 9 must be a multiple of 2"),
        (["model.channels=[30,60]"], r"model: channels\[0\] = 30 is not divisible by norm_groups = 32"),
        (
            ["schedule=linear", "schedule.num_steps=15", "sampler.steps=5"],
            r"schedule: linear betas reach .* num_steps >= 21",
        ),
        (["guidance.interval=[0.9,0.1]"], r"low <= high"),
        (["storage=s3"], r"storage\.root has no value: set it with storage\.root=VALUE"),
        (["storage=file", "storage.root=/tmp"], r"root must be s3://BUCKET\[/PREFIX\] or file:///PATH"),
        (["name=a/b"], r"name: .*pattern.*got 'a/b'"),
        (["+experiment=folder32"], r"data\.num_classes has no value"),
        (["a b"], r"cannot read the overrides"),
        (["optim.power_ema=[0.1,0.1]"], r"power_ema must name widths in \(0, 0\.2886\], each once"),
        (["optim.power_ema=[0.5]"], r"power_ema must name widths"),
        (["data.num_classes=0"], r"set model\.class_conditional=false"),
        (["task=classifier", "data.num_classes=0", "model.class_conditional=false"], r"use data with labels"),
        (["task=classifier", "model.inpainting=true"], r"task = classifier does not use model\.inpainting"),
        (["task=classifier", "model=dit_digits"], r"task = classifier is built on the UNet: use model\.kind=unet"),
        (["model=dit_digits", "data.image_size=9"], r"must be a multiple of 2: model\.patch_size is 2; use smaller"),
        (["model=dit_digits", "model.heads=5"], r"model: .*width = 128 is not divisible by heads = 5"),
        (["model=dit_digits", "model.channels=[32]"], r"model\.channels: no such field here\. Allowed: .*patch_size"),
        (["objective=consistency"], r"tunes a trained model, and none is named: set init_from=MODEL"),
        (
            ["objective=consistency", "init_from=/m", "objective.weight=p2"],
            r"weight = p2 has no effect .*leave it at unif",
        ),
        (
            ["objective=consistency", "init_from=/m", "objective.timesteps=stratified"],
            r"timesteps = stratified has no effect",
        ),
        (["objective=consistency", "init_from=/m", "objective.prediction=x0"], r"set objective\.prediction=x0_skip"),
        (
            ["objective=consistency", "init_from=/m", "objective.prediction=eps"],
            r"20,291 at T, .*prediction=v, or one of",
        ),
        (
            [
                "objective=consistency",
                "init_from=/m",
                "model.class_conditional=false",
                "objective.consistency_guidance=2",
            ],
            r"guides by class or text, and the model has neither: set it to 1 or null",
        ),
        (["objective=consistency", "init_from=/m", "model.learned_variance=true"], r"simple trains none"),
        (["objective.loss=vlb", "objective.timesteps=log_normal"], r"loss = vlb has to be a mean over all of them"),
        (["objective=consistency", "init_from=/m", "objective.learned_weight=true"], r"weights a squared error"),
        (["objective.loss=vlb", "objective.noise_candidates=2"], r"a bound for noise that is independent of it"),
        (["objective.noise_candidates=0"], r"noise_candidates: .*greater than 0"),
        (
            ["task=classifier", "objective.noise_candidates=2"],
            r"task = classifier does not use objective\.noise_cand",
        ),
        (["optim.lr_scaling=[cube,128]"], r"optim\.lr_scaling.*'sqrt' or 'linear'"),
        (["task=classifier", "init_from=/m"], r"task = classifier does not use init_from"),
        (["cluster.max_preemption_failures=-2"], "cluster.max_preemption_failures: .*greater than or equal to -1"),
        (["cluster.preemption_grace_s=-1"], "cluster.preemption_grace_s: .*greater than or equal to 0"),
        (["task=classifier", "evaluation.every=640"], r"task = classifier draws none"),
        (["checkpoint.keep_best=2"], r"keep_best selects by scores, .* set evaluation\.every"),
        (
            ["checkpoint.keep_best=2", "evaluation.every=640", "optim.power_ema=[0.1]"],
            r"would delete the snapshots that optim\.power_ema",
        ),
        (["cluster.step_timeout_s=-1"], "cluster.step_timeout_s: .*greater than or equal to 0"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_is_allowed(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


HEUN = Sampling.of(kind="heun", steps=7, scale=1.6, interval=(0.0, 0.5))


@pytest.mark.parametrize(
    "settings",
    [HEUN, Sampling.of(kind="ddim", steps=5, eta=0.5, clip=None), Sampling.of(kind="dpm_solver", threshold=0.9)],
)
def test_sampling_overrides_give_the_settings_back(settings):
    assert sampling(compose(["+experiment=digits", *sampling_overrides(settings)])) == settings


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        ([], HEUN),
        (["+experiment=digits", "evaluation.n=8"], HEUN),
        (["sampler.steps=9", "guidance.scale=2"], HEUN.with_fields(steps=9, scale=2.0)),
        (["guidance=none"], Sampling.of(kind="heun", steps=7, scale=1.0)),
        (
            ["sampler=dpm_solver", "sampler.steps=4"],
            Sampling.of(kind="dpm_solver", steps=4, scale=1.6, interval=(0, 0.5)),
        ),
        (["sampler.kind=dpm_solver"], Sampling.of(kind="dpm_solver", scale=1.6, interval=(0, 0.5))),
    ],
)
def test_overrides_change_a_models_own_sampling_settings_and_leave_the_others(overrides, wanted):
    assert changed_sampling(HEUN, overrides) == wanted


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["+experiment=digits", "images=5"],
        ["optim.lr=1e-3", "+experiment=digits", "sampler=heun", "sampler.steps=7", "optim.lr=2e-3"],
        ["data.source='a b,c=d'", "name=x", "cluster.num_workers=[1,2]"],
        ["guidance=none", "tracking.sinks=[mlflow,jsonl]", "++optim.grad_clip=null", "name='run-${seed}'"],
    ],
)
def test_compositions_equal_those_of_hydra_itself(overrides):
    lines = [
        f"++{line}" if line.split("=")[0] not in (*groups(), "+experiment") and line[0] != "+" else line
        for line in overrides
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        expected = OmegaConf.to_container(hydra_compose("config", lines), resolve=True)
    assert compose(overrides) == from_dict(expected)


def test_fields_that_the_yaml_leaves_at_their_default_can_be_set_all_the_same():
    config = compose(["cluster.max_failures=7", "data.cache_gib=1.5"])
    assert (config.cluster.max_failures, config.data.cache_gib) == (7, 1.5)


def test_a_configuration_is_frozen_and_comes_back_from_plain_values():
    config = compose(["+experiment=digits"])
    assert from_dict(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "override, same",
    [
        ("optim.lr=0.5", False),
        ("seed=1", False),
        ("schedule.s=0.1", False),
        ("images=5", False),  # digits' learning rate decays over the run
        ("data.lanes=8", False),
        ("init_from=/model", False),
        ("task=classifier", False),
        ("objective.timesteps=importance", False),
        ("cluster.parallel=fsdp", True),
        ("optim.max_skipped=1", True),
        ("cluster.num_workers=1", True),
        ("cluster.step_timeout_s=60", True),
        ("cluster.max_preemption_failures=3", True),
        ("training_s=60", True),  # what it decides depends on the machine, and is in the checkpoint
        ("guidance.scale=7", True),
        ("sampler.steps=7", True),
        ("data.cache_gib=1", True),
        ("tracking.experiment=x", True),
    ],
)
def test_the_identity_covers_what_decides_the_trace_and_nothing_else(override, same):
    one, other = compose(["+experiment=digits"]), compose(["+experiment=digits", override])
    assert (one.identity() == other.identity()) is same


def test_the_length_of_a_run_is_part_of_its_identity_only_where_the_rate_decays():
    constant = ["+experiment=digits", "optim.decay=constant"]
    assert compose([*constant, "images=5"]).identity() == compose(constant).identity()


def test_the_stages_of_consistency_tuning_are_parts_of_the_run_and_so_of_its_identity():
    tuning = ["+experiment=digits_consistency", "init_from=/m"]
    identity = compose(tuning).identity()
    assert identity["images"] == compose(tuning).images
    assert identity["objective.consistency_q"] == 4
    assert compose([*tuning, "images=5"]).identity() != identity
    assert not any("consistency" in name for name in compose(["+experiment=digits"]).identity())


def test_settings_of_a_later_kind_are_part_of_the_identity_of_its_runs_and_of_no_others():
    kinds = compose(["objective.timesteps=log_normal", "objective.weight=edm"]).identity()
    assert (kinds["objective.log_normal_p_mean"], kinds["objective.edm_sigma_data"]) == (-1.2, 0.5)
    others = compose(["objective.learned_weight=true", "optim.kind=muon"]).identity()
    assert (others["objective.learned_weight_lr"], others["optim.muon_momentum"]) == (0.01, 0.95)
    schedule = compose(["schedule=edm"]).identity()  # a schedule and a weight may have one name
    assert "schedule.rho" in schedule
    assert not any(name.startswith(("objective.log_normal", "objective.edm", "optim.muon")) for name in schedule)


def test_flatten_joins_paths():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


@pytest.mark.integration
def test_a_built_wheel_carries_the_configuration(tmp_path):
    root = Path(__file__).parents[3]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(root)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shipped = {p.relative_to(conf_dir()) for p in conf_dir().rglob("*.yaml")}
    assert (tmp_path / "site/pipelines/config/starter/project/Makefile").is_file()
    assert {
        p.relative_to(tmp_path / "site/pipelines/conf") for p in tmp_path.rglob("pipelines/conf/**/*.yaml")
    } == shipped
    script = "import pipelines.config as c; print(c.__file__, c.compose(['+experiment=digits']).name)"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "site/pipelines/config/__init__.py"), "digits"]


def test_a_written_configuration_is_read_back_with_overrides_and_without_the_local_stack_of_its_writer(tmp_path):
    config = compose(["+experiment=digits", "optim.lr=0.5"])
    connected = config.model_copy(
        update={
            "storage": config.storage.model_copy(update={"endpoint_url": "http://127.0.0.1:1"}),
            "cluster": config.cluster.model_copy(update={"address": "127.0.0.1:2"}),
            "tracking": config.tracking.model_copy(update={"uri": "http://127.0.0.1:3"}),
        }
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(connected.model_dump(mode="json")))
    assert read_config(path) == config
    assert read_config(path, ["optim.lr=0.25", "images=256"]) == compose(
        ["+experiment=digits", "optim.lr=0.25", "images=256"]
    )
    elsewhere = compose(["+experiment=digits", "storage=s3", "storage.root=s3://b", "tracking.uri=http://mlflow"])
    path.write_text(json.dumps(elsewhere.model_dump(mode="json")))
    assert read_config(path) == elsewhere


def test_the_configuration_of_a_run_of_an_earlier_release_is_read_without_the_setting_that_is_gone(tmp_path):
    config = compose(["+experiment=digits"])
    plain = config.model_dump(mode="json")
    del plain["tracking"]["grid_images"]
    plain["tracking"]["grid_rows"] = 8
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain))
    assert read_config(path) == config
    with pytest.raises(ConfigError, match="grid_rows"):
        compose(["+experiment=digits", "tracking.grid_rows=8"])


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        (None, [], r"config\.json: no such file"),
        ("[1, 2]", [], "a configuration is a mapping"),
        ("{", [], r"config\.json: "),
        ("{}", ["optm.lr=1"], r"optm: no such field here.*Did you mean 'optim'"),
    ],
)
def test_a_configuration_file_that_cannot_be_read_is_named(tmp_path, text, overrides, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path, overrides)


def test_of_two_overrides_of_a_field_the_last_one_counts():
    assert compose(["+experiment=digits", "optim.lr=1e-3", "optim.lr=0.5"]).optim.lr == 0.5


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: a\nname: b\n", "found duplicate key name, line 2"),
        ("[" * 5_000, "maximum recursion depth exceeded"),
        ("a: !!python/object/apply:os.system [x]\n", "could not determine a constructor for the tag"),
        ("[1, 2]", "a configuration is a mapping from names to values; this file holds something else"),
        ("name: 'a\n", "found unexpected end of stream, line 2"),
    ],
)
def test_a_file_that_holds_no_configuration_is_refused_in_a_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_config(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
