import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ddpm.ema import EMA
from ddpm.generate import Sampling, generate
from ddpm.model import ModelSpec
from ddpm.models.unet import UNet
from ddpm.prediction import NetworkDenoiser
from ddpm.quality import FeatureMoments, frechet_distance
from ddpm.schedule import make_schedule
from pipelines.evaluation.evaluators.contrastive import Contrastive
from pipelines.evaluation.images import to_levels
from pipelines.search.judge import RungJudge
from pipelines.storage import Storage
from tests.pipelines.captioned import WIDTH
from tests.pipelines.checkpoints.tiny import SMALL
from tests.pipelines.evaluation.test_prompts import some_captions


def test_a_trial_of_data_without_labels_is_judged_by_its_samples_and_the_bound(tmp_path):
    torch.manual_seed(0)
    network, encoder = UNet(replace(SMALL, num_classes=0)).eval(), Contrastive(1, 8).eval()
    schedule = {"kind": "cosine", "num_steps": 20}
    spec = ModelSpec(replace(SMALL, num_classes=0), schedule, "v", 8, (), sampling=Sampling.of(steps=2))
    real = to_levels(torch.rand(24, 1, 8, 8) * 2 - 1).float() / 127.5 - 1
    reference = FeatureMoments.of(encoder(to_levels(real)).features)
    uri = f"file://{tmp_path}/scores"
    judge = RungJudge((100,), 16, None, encoder, reference, (real[:4], None), 3, Storage(), uri)
    assert judge.due(0, 128)
    assert not judge.due(128, 256)
    state = SimpleNamespace(network=network, ema=EMA(network, 100.0), images_seen=128, gathered=None)
    judge(state, spec, torch.device("cpu"))
    found = json.loads((tmp_path / "scores" / "000000000128.json").read_text())
    with torch.no_grad():
        images = generate(
            NetworkDenoiser(network.eval(), make_schedule(**schedule), "v"),
            make_schedule(**schedule),
            spec.sampling,
            cond=None,
            shape=spec.shape,
            seed=3,
            count=16,
            batch_size=64,
        )
    wanted = frechet_distance(reference, FeatureMoments.of(encoder(to_levels(images)).features))
    assert found["frechet_distance"] == pytest.approx(wanted, rel=1e-4)
    assert (found["samples"], found["images_seen"]) == (16, 128)
    assert found["bits_per_dim"] > 0


@pytest.mark.parametrize("text_dim, classes", [(WIDTH, 10), (WIDTH, 0), (0, 10), (0, 0)])
def test_a_trial_is_asked_for_captions_and_classes_as_far_as_its_network_takes_them(tmp_path, text_dim, classes):
    config = replace(SMALL, num_classes=classes, text_dim=text_dim)
    network, encoder = UNet(config), Contrastive(1, 8).eval()
    labels = tuple("0123456789")[:classes]
    spec = ModelSpec(config, {"kind": "cosine", "num_steps": 20}, "v", 8, labels, Sampling.of(steps=2, scale=1.0))
    real = to_levels(torch.rand(24, 1, 8, 8) * 2 - 1).float() / 127.5 - 1
    reference = FeatureMoments.of(encoder(to_levels(real)).features)
    drawn = some_captions(["a red circle", "a green square", "blue"], labels=[3, 1, 2]).condition(
        torch.arange(3), labels=True
    )
    held = some_captions(["", "a circle"], labels=[5, 6]).condition(torch.arange(2), labels=True)
    seen = []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    uri = f"file://{tmp_path}/scores"
    judge = RungJudge((100,), 16, drawn, encoder, reference, (real[:2], held), 3, Storage(), uri)
    state = SimpleNamespace(network=network, ema=EMA(network, 100.0), images_seen=128, gathered=None)
    judge(state, spec, torch.device("cpu"))
    for asked, wanted in ((seen[0], drawn[torch.arange(16) % 3]), (seen[-1], held)):
        for name, there in (("pooled", text_dim), ("text", text_dim), ("label", classes)):
            value = None if asked is None else getattr(asked, name)
            assert torch.equal(value, getattr(wanted, name)) if there else value is None
