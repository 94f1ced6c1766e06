"""The same numbers on a GPU as on the CPU: integers bit for bit, everything else up to float rounding."""

import io
from dataclasses import replace

import pytest
import torch

from ddpm.bound import variational_bound
from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate
from ddpm.guidance import ClassifierGuided, Guides
from ddpm.inference import Editing, FromNoise, Inpainting, Inverting, Noise, draw
from ddpm.masks import random_mask
from ddpm.model import Model, ModelSpec
from ddpm.models.classifier import NoisyClassifier
from ddpm.models.unet import UNet, UNetConfig
from ddpm.muon import Muon
from ddpm.noise import Purpose, integers, normal, words
from ddpm.objectives import Objective
from ddpm.prediction import NetworkDenoiser
from ddpm.quality import measured_diversity
from ddpm.samplers.repaint import RePaint
from ddpm.schedule import make_schedule
from ddpm.timesteps import LogNormalTimesteps, LowDiscrepancyTimesteps, StratifiedTimesteps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCHEDULE = make_schedule("cosine")
CONFIG = UNetConfig(
    in_channels=3,
    out_channels=6,
    channels=(32, 64),
    layers_per_block=1,
    attention=(False, True),
    head_dim=32,
    num_classes=4,
    text_dim=8,
    context_channels=3,
)
N = torch.arange(8)


@pytest.fixture(autouse=True)
def _full_precision():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def network():
    torch.manual_seed(0)
    return UNet(CONFIG).eval()


def condition():
    return Conditioning(
        label=N % 4,
        text=normal(1, N, Purpose.CAPTION, (5, 8)),
        pooled=normal(2, N, Purpose.CAPTION, (8,)),
        mask=random_mask(0, N, (16, 16)),
        context=normal(3, N, Purpose.CAPTION, (3, 16, 16)),
        drop=N % 3 == 0,
    )


def test_random_integers_masks_and_timesteps_are_the_same_bits():
    far = N + (1 << 40)
    for ordinals in (N, far):
        on_gpu = ordinals.cuda()
        assert torch.equal(words(7, on_gpu, Purpose.NOISE, 9).cpu(), words(7, ordinals, Purpose.NOISE, 9))
        assert torch.equal(
            integers(7, on_gpu, Purpose.TIMESTEP, 1000).cpu(), integers(7, ordinals, Purpose.TIMESTEP, 1000)
        )
        assert torch.equal(random_mask(7, on_gpu, (16, 16)).cpu(), random_mask(7, ordinals, (16, 16)))
        for timesteps in (StratifiedTimesteps(), LowDiscrepancyTimesteps(), LogNormalTimesteps()):
            sampler = timesteps.make(SCHEDULE, 5, 7)
            assert torch.equal(sampler.sample(on_gpu)[0].cpu(), sampler.sample(ordinals)[0])
    torch.testing.assert_close(
        normal(7, N.cuda(), Purpose.NOISE, (3, 16)).cpu(), normal(7, N, Purpose.NOISE, (3, 16)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_losses_and_gradients_agree(channels_last):
    x_0, eps, t = normal(4, N, Purpose.CAPTION, (3, 16, 16)), normal(5, N, Purpose.NOISE, (3, 16, 16)), N * 120 + 1
    results = []
    for device in ("cpu", "cuda"):
        unet = network().to(device)
        if channels_last and device == "cuda":
            unet = unet.to(memory_format=torch.channels_last)
        loss = Objective(loss="hybrid").losses(
            unet, SCHEDULE, x_0.to(device), t.to(device), eps.to(device), condition().to(device)
        )
        loss.mean().backward()
        results.append(
            (loss.detach().cpu(), {k: p.grad.cpu() for k, p in unet.named_parameters() if p.grad is not None})
        )
    (cpu, cpu_gradients), (gpu, gpu_gradients) = results
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4)
    for name, gradient in cpu_gradients.items():
        torch.testing.assert_close(gpu_gradients[name], gradient, rtol=5e-3, atol=5e-4, msg=name)


@pytest.mark.parametrize("kind", ["ddim", "ancestral", "dpm_solver", "heun", "predictor_corrector"])
def test_samples_agree(kind):
    settings = Sampling.of(kind=kind, steps=8, scale=2.0, rescale=0.3)
    drawn = [
        generate(
            NetworkDenoiser(network().to(device), SCHEDULE),
            SCHEDULE,
            settings,
            cond=condition().to(device),
            shape=(3, 16, 16),
            seed=0,
            image_ids=N.to(device),
        ).cpu()
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=5e-3)


def test_a_state_of_muon_read_on_the_cpu_continues_with_the_same_updates():
    def steps(optimizer, parameters, first):
        for step in range(first, first + 3):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.1 + step)
            optimizer.step()

    once = [torch.nn.Parameter(torch.ones(3, 4).cuda()), torch.nn.Parameter(torch.ones(5).cuda())]
    optimizer = Muon(once[:1], once[1:], lr=0.1)
    steps(optimizer, once, 0)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in once]
    resumed = Muon(again[:1], again[1:], lr=0.1)
    resumed.load_state_dict(torch.load(stored, map_location="cpu"))
    steps(optimizer, once, 3)
    steps(resumed, again, 3)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_a_model_on_a_gpu_takes_labels_and_counts_from_the_cpu():
    spec = ModelSpec(CONFIG, {"kind": "cosine", "num_steps": 1000}, "eps", 16, tuple("abcd"), Sampling.of(steps=3))
    drawn = [Model(spec, network().to(device)).generate(N % 4) for device in ("cpu", "cuda")]
    assert drawn[1].is_cuda
    torch.testing.assert_close(drawn[1].cpu(), drawn[0], rtol=0, atol=5e-3)
    assert Model(spec, network().cuda()).generate(None, count=2).is_cuda


def test_the_diversity_of_features_on_a_gpu_is_that_on_the_cpu():
    features = normal(8, N, Purpose.CAPTION, (5,))
    for labels in (None, N % 2):
        here, there = (measured_diversity(f, labels) for f in (features, features.cuda()))
        assert there.value == pytest.approx(here.value)


def test_guidance_by_a_classifier_and_the_bound_agree():
    torch.manual_seed(0)
    classifier = NoisyClassifier(CONFIG, 4).eval()
    x, t = normal(6, N, Purpose.NOISE, (3, 16, 16)), torch.full((8,), 300.0)
    guided, bounds = [], []
    for device in ("cpu", "cuda"):
        model = NetworkDenoiser(network().to(device), SCHEDULE)
        both = ClassifierGuided(2.0).wrap(model, SCHEDULE, Guides(log_prob=classifier.to(device).class_log_prob))
        guided.append(both(x.to(device), t.to(device), Conditioning(label=N.to(device) % 4)).x0.cpu())
        bound = variational_bound(model, SCHEDULE, x.to(device), seed=0, image_ids=N.to(device), steps=10, levels=None)
        bounds.append(bound.total.cpu())
    torch.testing.assert_close(guided[1], guided[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bounds[1], bounds[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("task", [None, "inpaint", "repaint", "edit", "invert"])
def test_every_way_to_draw_agrees(task):
    network_config = replace(CONFIG, out_channels=3)
    spec = ModelSpec(network_config, {"kind": "cosine"}, "v", 16, tuple("abcd"), Sampling.of(steps=8, scale=2.0))
    cond, drawn = replace(condition(), mask=None, context=None, drop=None), []
    images = normal(3, N, Purpose.CAPTION, (3, 16, 16)).clamp(-1, 1)
    tasks = {
        None: FromNoise(),
        "inpaint": Inpainting(images, random_mask(0, N, (16, 16))),
        "repaint": Inpainting(images, random_mask(0, N, (16, 16)), RePaint(steps=8, jump_length=2, resamplings=2)),
        "edit": Editing(images, 0.6),
        "invert": Inverting(images, 0.6, cond),
    }
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = Model(spec, UNet(network_config).eval().requires_grad_(False)).to(device)
        found = draw(model, Noise.between(1, 2, 8), cond, tasks[task], negative=cond[N.flip(0)], batch_size=5)
        assert found.images.device.type == device
        drawn.append(found.images.cpu())
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=5e-3)
