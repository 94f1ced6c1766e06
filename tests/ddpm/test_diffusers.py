"""Against the real diffusers: what ours writes it reads, what it writes ours reads, with the same numbers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm.conditioning import Conditioning
from ddpm.diffusers import export_diffusers, import_diffusers
from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec, load_model, save_model
from ddpm.models.unet import UNet, UNetConfig
from ddpm.samplers import DDIM, last
from ddpm.schedule import make_schedule

diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")

SMALL = UNetConfig(
    in_channels=2,
    out_channels=2,
    channels=(16, 32),
    layers_per_block=1,
    attention=(False, True),
    head_dim=16,
    norm_groups=8,
)
COSINE = {"kind": "cosine", "num_steps": 100}
ZERO_SNR = {"kind": "linear", "num_steps": 100, "zero_terminal_snr": True}
UNCLIPPED, CLIPPED = Sampling.of(clip=None), Sampling.of(clip=0.8)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make(config=SMALL, schedule=COSINE, prediction="eps", sampling=UNCLIPPED, seed=0):
    torch.manual_seed(seed)
    network = UNet(config).eval().requires_grad_(False)
    # A trained network's output is small where x_t is nearly noise; a random one's errors would be blown up there.
    network.conv_out.weight.mul_(0.3)
    classes = tuple("abcdefgh"[: config.num_classes])
    spec = ModelSpec(config, schedule, prediction, 8, classes, sampling, {"run": "test"})
    return Model(spec, network)


def theirs(folder):
    """Their two parts, as they are used with class labels."""
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    return unet, diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")


@torch.no_grad()
def their_ddim(unet, scheduler, x_T, labels=None, steps=5):
    scheduler.set_timesteps(steps)
    x_t = x_T
    for t in scheduler.timesteps:
        output = unet(x_t, t, labels).sample
        x_t = scheduler.step(output, t, x_t, use_clipped_model_output=True).prev_sample
    return x_t


def our_ddim(model, x_T, cond=None, steps=5):
    denoiser = model.spec.sampling.wrap(model.denoiser, model.schedule)
    return last(DDIM(steps=steps)(denoiser, model.schedule, x_T, cond))


def assert_same_numbers(model, unet, scheduler):
    """Same outputs, same table, same images from the same noise."""
    classes = model.spec.network.num_classes
    x, t = torch.randn(classes + 1, *model.spec.shape), torch.tensor(37)
    labels = torch.arange(classes + 1) if classes else None
    cond = Conditioning(label=labels.clamp(max=classes - 1), drop=labels == classes) if classes else None
    with torch.no_grad():
        expected = unet(x, t, labels).sample
    torch.testing.assert_close(model.network(x, t.expand(len(x)), cond), expected, rtol=1e-4, atol=1e-4)
    table = model.schedule.alphas_cumprod[1:]
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=1e-4, atol=1e-7)
    images = their_ddim(unet, scheduler, x, labels)
    torch.testing.assert_close(our_ddim(model, x, cond), images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", [UNCLIPPED, CLIPPED, Sampling.of(threshold=0.9)])
@pytest.mark.parametrize(
    "prediction, schedule",
    [
        ("eps", {"kind": "linear", "num_steps": 1000}),
        ("eps", COSINE),
        ("v", COSINE),
        ("x0", {"kind": "sigmoid", "num_steps": 100}),
        ("v", ZERO_SNR),
        ("x0", ZERO_SNR),
    ],
)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_diffusers_gets_our_numbers_from_what_ours_writes(tmp_path, num_classes, prediction, schedule, sampling):
    model = make(replace(SMALL, num_classes=num_classes), schedule, prediction, sampling)
    export_diffusers(model, tmp_path)
    assert_same_numbers(model, *theirs(tmp_path))


def test_zero_terminal_snr_is_exactly_zero_on_the_other_side(tmp_path):
    export_diffusers(make(schedule=ZERO_SNR, prediction="v"), tmp_path)
    _, scheduler = theirs(tmp_path)
    assert scheduler.betas[-1] == 1
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.config.rescale_betas_zero_snr


def test_the_whole_pipeline_draws_our_images(tmp_path):
    model = make(replace(SMALL, in_channels=3, out_channels=3), sampling=Sampling.of(clip=1.0))
    export_diffusers(model, tmp_path / "model")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=20,
        use_clipped_model_output=True,
        output_type="pt",
    ).images
    x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = our_ddim(model, x_T, steps=20)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, rtol=1e-4, atol=1e-4)


def test_images_that_are_not_square_go_over_and_come_back(tmp_path):
    model = make(replace(SMALL, in_channels=3, out_channels=3), sampling=Sampling.of(clip=1.0))
    model = replace(model, spec=replace(model.spec, image_size=(8, 16)))
    export_diffusers(model, tmp_path)
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    assert pipeline(generator=generator, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 16)
    assert import_diffusers(tmp_path).spec == model.spec
    (tmp_path / "model.json").unlink()
    assert import_diffusers(tmp_path).spec.shape == (3, 8, 16)


@pytest.mark.parametrize("shift", [{}, {"shift": 3.0}, {"shift": 1.5, "log_snr_shift": -1.0}])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_model_of_flow_matching_draws_the_same_with_their_scheduler(tmp_path, num_classes, shift):
    model = make(replace(SMALL, num_classes=num_classes), {"kind": "flow", **shift}, "flow")
    export_diffusers(model, tmp_path)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    labels = torch.arange(3) if num_classes else None
    z = x_T = torch.randn(3, *model.spec.shape)
    scheduler.set_timesteps(sigmas=[1 - i / 5 for i in range(5)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t, labels).sample, t, z).prev_sample
    cond = None if labels is None else Conditioning(label=labels)
    with torch.no_grad():
        torch.testing.assert_close(our_ddim(model, x_T, cond), z, rtol=1e-4, atol=1e-4)

    (tmp_path / "model.json").unlink()
    again = import_diffusers(tmp_path, last_row="null" if num_classes else None)
    assert again.spec.prediction == "flow"
    torch.testing.assert_close(again.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    same_weights(again, model)


def test_their_whole_pipeline_of_flow_matching_runs(tmp_path):
    export_diffusers(make(replace(SMALL, in_channels=3, out_channels=3), {"kind": "flow"}, "flow"), tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    images = pipeline(batch_size=2, num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    "schedule", [{"kind": "cosine"}, {"kind": "flow", "num_steps": 100}], ids=["schedule", "steps"]
)
def test_flow_matching_that_their_scheduler_lacks_is_not_written(tmp_path, schedule):
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has the schedule 'flow' of 1000 steps"):
        export_diffusers(make(schedule=schedule, prediction="flow"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_flow_matching_scheduler_with_other_levels_is_refused(tmp_path):
    export_diffusers(make(schedule={"kind": "flow"}, prediction="flow"), tmp_path)
    (tmp_path / "model.json").unlink()
    edit(tmp_path / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting = true cannot be expressed, allowed: false"):
        import_diffusers(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, num_classes=3),
        UNetConfig(
            in_channels=1,
            out_channels=1,
            channels=(16, 16, 32),
            layers_per_block=2,
            attention=(True, False, False),
            head_dim=8,
            norm_groups=4,
            scale_shift=True,
            dropout=0.1,
            num_classes=1,
        ),
    ],
)
def test_our_own_round_trip_is_exact(tmp_path, config):
    sampling = Sampling.of(scale=2.5, interval=(0.1, 0.9), rescale=0.3, kind="heun", steps=7, threshold=0.99)
    model = make(config, {"kind": "sigmoid", "num_steps": 60, "tau": 0.9}, "v", sampling)
    export_diffusers(model, tmp_path / "a")
    found = import_diffusers(tmp_path / "a")
    assert found.spec == model.spec
    assert same_weights(found, model)
    assert not found.network.training
    save_model(tmp_path / "ours", found.spec, found.network.state_dict())
    assert load_model(tmp_path / "ours").spec == model.spec
    # Saved again by diffusers in the same place, it is still ours.
    diffusers.DDIMPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "a")
    found = import_diffusers(tmp_path / "a")
    assert found.spec == model.spec
    assert same_weights(found, model)


def test_weights_in_several_files_go_over_and_come_back(tmp_path):
    model = make()
    export_diffusers(model, tmp_path / "a", largest=20_000)
    assert (tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert_same_numbers(model, *theirs(tmp_path / "a"))
    diffusers.UNet2DModel.from_pretrained(tmp_path / "a" / "unet").save_pretrained(
        tmp_path / "a" / "unet", max_shard_size="30KB"
    )
    assert same_weights(import_diffusers(tmp_path / "a"), model)


def same_weights(one, other):
    a, b = one.network.state_dict(), other.network.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_ours_exports_can_be_imported_without_model_json(tmp_path):
    model = make(replace(SMALL, num_classes=3), ZERO_SNR, "v", Sampling.of(clip=0.7, threshold=0.95))
    export_diffusers(model, tmp_path)
    (tmp_path / "model.json").unlink()
    found = import_diffusers(tmp_path, last_row="null", classes="abc")
    assert found.spec.network == model.spec.network
    assert found.spec.sampling == Sampling.of(clip=0.7, threshold=0.95)
    assert (found.spec.prediction, found.spec.image_size, found.spec.classes) == ("v", 8, ("a", "b", "c"))
    assert same_weights(found, model)
    torch.testing.assert_close(found.schedule.alphas_cumprod, model.schedule.alphas_cumprod, rtol=1e-12, atol=0)


def foreign(folder, scheduler=None, **changes):
    """A folder that diffusers wrote."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": 8,
            **changes,
        }
    ).eval()
    scheduler = scheduler or diffusers.DDIMScheduler(num_train_timesteps=100, timestep_spacing="trailing")
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.3)
    pipeline = diffusers.DDIMPipeline if isinstance(scheduler, diffusers.DDIMScheduler) else diffusers.DDPMPipeline
    saved = pipeline(unet=unet, scheduler=scheduler)
    saved.save_pretrained(folder)
    # Without the private fields: they would put back the defaults.
    fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return unet, diffusers.DDIMScheduler.from_config(
        {**fields, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    )


BETAS = make_schedule("sigmoid", num_steps=100).betas.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": False},
        {"clip_sample_range": 0.6, "beta_end": 0.05},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample": False},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        {"trained_betas": BETAS, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "clip_sample": False},
        {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True, "prediction_type": "sample"},
        {"thresholding": True},
        {"thresholding": True, "sample_max_value": 1e6, "prediction_type": "v_prediction"},
    ],
)
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_ours_gets_diffusers_numbers_from_what_it_writes(tmp_path, kind, options):
    unet, scheduler = foreign(tmp_path, getattr(diffusers, kind)(num_train_timesteps=100, **options))
    model = import_diffusers(tmp_path)
    assert_same_numbers(model, unet, scheduler)
    assert model.spec.sampling.to_json()["kind"] == {"DDIMScheduler": "ddim", "DDPMScheduler": "ancestral"}[kind]
    assert ModelSpec.from_json(model.spec.to_json()) == model.spec
    assert model.generate(None, count=2, sampling=model.spec.sampling.with_fields(steps=2)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "attention_head_dim": None,
            "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        },
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
        {"norm_eps": 0.1},
        {"downsample_padding": 0},
        {"resnet_time_scale_shift": "scale_shift"},
        {"attn_norm_num_groups": 8, "sample_size": (8, 8)},
        {
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
            "layers_per_block": 2,
        },
    ],
)
def test_networks_of_other_shapes_come_over(tmp_path, changes):
    unet, scheduler = foreign(tmp_path, **changes)
    assert_same_numbers(import_diffusers(tmp_path), unet, scheduler)


def test_whole_numbers_may_be_spelt_as_fractions(written):
    spec = import_diffusers(written).spec
    edit(written / "unet/config.json", downsample_padding=1.0, freq_shift=0.0, mid_block_scale_factor=1.0)
    assert import_diffusers(written).spec.to_json() == spec.to_json()


def test_the_last_class_row_is_what_the_caller_says(tmp_path):
    unet, scheduler = foreign(tmp_path, num_class_embeds=4)
    model = import_diffusers(tmp_path, last_row="null")
    assert model.spec.classes == ("0", "1", "2")
    assert_same_numbers(model, unet, scheduler)

    model = import_diffusers(tmp_path, last_row="class", classes=["a", "b", "c", "d"])
    assert model.spec.classes == ("a", "b", "c", "d")
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 30), torch.arange(4)
    with torch.no_grad():
        expected = unet(x, t, labels).sample
        unet.class_embedding.weight.zero_()
        without = unet(x, t, labels).sample
    torch.testing.assert_close(model.network(x, t, Conditioning(label=labels)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.network(x, t, None), without, rtol=1e-4, atol=1e-4)


def test_the_defaults_of_ddpm_schedulers_come_over(tmp_path):
    foreign(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=100, variance_type="fixed_large", clip_sample=False))
    settings = import_diffusers(tmp_path).spec.sampling
    assert settings == Sampling.of(kind="ancestral", steps=100, variance="large", clip=None)


OF_GOOGLE = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": [32, 64, 64, 64],  # 4 times as many
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBAHQ = {
    "sample_size": 64,  # 256
    "block_out_channels": [32, 32, 64, 64, 128, 128],  # 4 times as many
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
SCHEDULER_OF_GOOGLE = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}


@pytest.mark.parametrize("levels, variance", [(CIFAR10, "large"), (CELEBAHQ, "small")])
def test_the_models_of_ho_et_al_come_over_and_go_back(tmp_path, levels, variance):
    """google/ddpm-cifar10-32 and ddpm-celebahq-256, made smaller, with random weights in half precision.

    As the first models on the hub they have no folder per part, and attention's parameters by their old names.
    """
    fields = {**OF_GOOGLE, **levels}
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel.from_config(fields).half().float().eval().requires_grad_(False)
    unet.conv_out.weight.mul_(0.25)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, w in unet.state_dict().items():
        for new, former in old.items():
            name = name.replace(new, former)
        weights[name] = w.half()
    assert "mid_block.attentions.0.query.weight" in weights
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(weights, hub / "diffusion_pytorch_model.safetensors")
    (hub / "config.json").write_text(json.dumps(fields))
    scheduler = {**SCHEDULER_OF_GOOGLE, "variance_type": f"fixed_{variance}"}
    (hub / "scheduler_config.json").write_text(json.dumps(scheduler))
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (hub / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **parts}))

    model = import_diffusers(hub)
    assert model.network.conv_in.weight.dtype == torch.float32
    assert model.spec.sampling == Sampling.of(kind="ancestral", steps=1000, variance=variance, clip=1.0)
    assert_same_numbers(model, unet, diffusers.DDIMScheduler.from_config(scheduler, timestep_spacing="trailing"))

    export_diffusers(model, tmp_path / "back")
    assert_same_numbers(model, *theirs(tmp_path / "back"))
    back = json.loads((tmp_path / "back/unet/config.json").read_text())
    assert {**back, "_diffusers_version": "0.0.4"}.items() >= fields.items()
    (tmp_path / "back/model.json").unlink()
    assert import_diffusers(tmp_path / "back").spec.network == model.spec.network


def test_a_model_json_from_before_these_options_is_read_as_it_was_meant():
    spec = make().spec
    plain = json.loads(spec.to_json())
    for option in ("flip_sin_to_cos", "freq_shift", "norm_eps", "downsample_padding"):
        del plain["network"][option]
    assert ModelSpec.from_json(json.dumps(plain)) == spec


# Refusals.


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "UNet2DConditionModel"}, r'_class_name = "UNet2DConditionModel" .* allowed: "UNet2DModel"'),
        ({"cross_attention_dim": 64}, r"does not have: \['cross_attention_dim'\]"),
        ({"out_channels": 2}, "learned variance"),
        ({"out_channels": 5}, "out_channels = 5 .* allowed: 1"),
        ({"time_embedding_type": "fourier"}, 'time_embedding_type = "fourier" .* allowed: "positional"'),
        ({"time_embedding_dim": 32}, "time_embedding_dim = 32 .* allowed: null, 64"),
        ({"freq_shift": 2}, "freq_shift = 2 .* allowed: 0, 1"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos = 1 .* allowed: true, false"),
        ({"norm_eps": "1e-6"}, 'norm_eps = "1e-6" must be a number'),
        ({"norm_eps": 0}, r"unet/config\.json: norm_eps must be > 0"),
        ({"downsample_padding": 2}, "downsample_padding = 2 .* allowed: 0, 1"),
        ({"downsample_type": "resnet"}, "downsample_type"),
        ({"upsample_type": "resnet"}, "upsample_type"),
        ({"act_fn": "gelu"}, 'act_fn = "gelu"'),
        ({"center_input_sample": True}, "center_input_sample = true"),
        ({"mid_block_type": None}, "mid_block_type = null"),
        ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor"),
        ({"add_attention": False}, "add_attention"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"resnet_time_scale_shift": "ada_group"}, 'allowed: "default", "scale_shift"'),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups = 4 .* allowed: null, 8"),
        ({"down_block_types": ["DownBlock2D", "ResnetDownsampleBlock2D"]}, "down_block_types .*AttnDownBlock2D"),
        (
            {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
            r'up_block_types .* allowed: \["AttnUpBlock2D", "UpBlock2D"\]',
        ),
        ({"attention_head_dim": 5}, "channels.1. = 32 is not divisible by head_dim = 5"),
        ({"norm_num_groups": None}, "norm_num_groups = null must be a whole number"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
        ({"down_block_types": 7}, r"unet/config\.json: 'int' object is not iterable"),
        ({"sample_size": [8, 15]}, "must be multiples of 2"),
        ({"sample_size": 9}, "must be multiples of 2"),
        ({"sample_size": [8, 8, 8]}, "HEIGHTxWIDTH"),
        ({"sample_size": None}, "say image_size"),
        ({"num_class_embeds": 3}, "say last_row='null'"),
        ({"block_out_channels": [16, 64]}, "do not fit"),
    ],
)
def test_networks_that_ours_cannot_express_are_refused(written, changes, message):
    edit(written / "unet/config.json", **changes)
    with pytest.raises(ValueError, match=message):
        import_diffusers(written)


def test_all_obstacles_are_named_at_once(written):
    edit(written / "unet/config.json", act_fn="gelu", upsample_type="resnet", center_input_sample=True)
    with pytest.raises(ValueError, match=r"unet/config\.json: center_input_sample") as error:
        import_diffusers(written)
    assert all(name in str(error.value) for name in ("act_fn", "upsample_type"))
    assert "downsample_type" not in str(error.value)


@pytest.fixture
def written(tmp_path):
    foreign(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "PNDMScheduler"}, 'allowed: "DDIMScheduler", "DDPMScheduler"'),
        ({"beta_schedule": "laplace"}, "beta_schedule = 'laplace' .* allowed: linear, scaled_linear"),
        ({"variance_type": "learned_range"}, 'variance_type = "learned_range" .* allowed: "fixed_small"'),
        ({"prediction_type": "flow"}, 'prediction_type = "flow" .* allowed: "epsilon"'),
        ({"predict_epsilon": False}, "predict_epsilon"),
        ({"trained_betas": [0.1, 0.2]}, "2 values, num_train_timesteps is 100"),
        ({"trained_betas": [0.1] * 99 + [1.5]}, r"scheduler_config\.json: betas must be"),
        ({"trained_betas": [0.1] * 99 + ["x"]}, 'trained_betas = "x" must be a number'),
        ({"beta_start": 0.5}, r"scheduler_config\.json: need 0 < beta_start <= beta_end"),
        ({"rescale_betas_zero_snr": True}, "prediction of eps with zero terminal SNR"),
        ({"thresholding": True, "sample_max_value": 3.0}, "sample_max_value = 3.0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0 must be a whole number"),
    ],
)
def test_schedulers_that_ours_cannot_express_are_refused(written, changes, message):
    edit(written / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        import_diffusers(written)


def test_pipelines_of_other_parts_are_refused(written):
    edit(written / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ValueError, match=r"model_index\.json: a pipeline of .*VQModel.* allowed: unet"):
        import_diffusers(written)
    edit(written / "model_index.json", vqvae=[None, None])
    import_diffusers(written)
    edit(written / "model_index.json", unet=[None, None])
    with pytest.raises(ValueError, match="allowed: unet"):
        import_diffusers(written)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": {"text_dim": 4}}, "text_dim = 4: UNet2DModel knows class labels only"),
        ({"config": {"context_channels": 2}}, "context_channels = 2"),
        ({"config": {"out_channels": 4}}, "out_channels = 4: DDIMPipeline knows no learned variance"),
        ({"prediction": "score"}, "prediction = 'score' .* allowed: eps, x0, v"),
        ({"schedule": ZERO_SNR}, "prediction of eps with zero terminal SNR"),
    ],
)
def test_models_that_diffusers_cannot_express_are_not_written(tmp_path, changes, message):
    config = replace(SMALL, **changes.pop("config", {}))
    with pytest.raises(ValueError, match=message):
        export_diffusers(make(config, **changes), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "unet/" + "diffusion_pytorch_model.safetensors",
    ],
)
def test_missing_and_damaged_files_are_named(written, name):
    content = (written / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"[1]"):
        (written / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            import_diffusers(written)
    (written / name).unlink()
    with pytest.raises(ValueError, match=rf"{name.split('/')[-1]} is missing"):
        import_diffusers(written)


def test_pickled_weights_are_not_opened(written):
    weights = written / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin cannot be read: save it again"):
        import_diffusers(written)


def test_weights_of_another_network_are_refused(written):
    weights = load_file(written / "unet/diffusion_pytorch_model.safetensors")
    del weights["conv_in.bias"]
    save_file(weights, written / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)do not fit .*conv_in\.bias"):
        import_diffusers(written)


def test_a_folder_that_was_changed_beside_its_model_json_is_refused(tmp_path):
    model = make()
    export_diffusers(model, tmp_path)
    edit(tmp_path / "scheduler/scheduler_config.json", prediction_type="v_prediction", clip_sample=True)
    with pytest.raises(ValueError, match=r"disagree about \['clip_sample', 'prediction_type'\].* remove model\.json"):
        import_diffusers(tmp_path)
    (tmp_path / "model.json").unlink()
    assert import_diffusers(tmp_path).spec.prediction == "v"
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.json has format version None"):
        import_diffusers(tmp_path)


def test_keywords_that_say_nothing_are_refused(tmp_path):
    foreign(tmp_path / "plain")
    with pytest.raises(ValueError, match="last_row given, but the network has no classes"):
        import_diffusers(tmp_path / "plain", last_row="null")
    with pytest.raises(ValueError, match="image_size given, but sample_size = 8"):
        import_diffusers(tmp_path / "plain", image_size=8)
    export_diffusers(make(), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"last_row, image_size given, but model\.json"):
        import_diffusers(tmp_path / "ours", last_row="null", image_size=8)
    foreign(tmp_path / "classes", num_class_embeds=3, sample_size=None)
    with pytest.raises(ValueError, match="2 names in classes for 3 classes"):
        import_diffusers(tmp_path / "classes", last_row="class", classes=["a", "b"], image_size=8)
    assert import_diffusers(tmp_path / "classes", last_row="null", image_size=16).spec.shape == (1, 16, 16)
    foreign(tmp_path / "one", num_class_embeds=1)
    with pytest.raises(ValueError, match="leaves no class"):
        import_diffusers(tmp_path / "one", last_row="null")
