"""A picture of a seed, number, class and setting is one, whoever asks for it: judged is what is served."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file

from ddpm.conditioning import Conditioning
from ddpm.ema import EMA
from ddpm.generate import Sampling, generate, to_uint8
from ddpm.inference import Noise, draw, draw_table
from ddpm.model import load_model
from ddpm.quality import FeatureMoments
from pipelines.config import compose
from pipelines.evaluation.actors import Drawer
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.evaluators.classifier import Classifier
from pipelines.evaluation.evaluators.contrastive import Contrastive
from pipelines.evaluation.images import unpack_samples
from pipelines.evaluation.samples import SamplePlan
from pipelines.inference.pictures import picture
from pipelines.inference.request import SampleRequest
from pipelines.registry.probe import draw_probe
from pipelines.search.judge import RungJudge, TrialSubject
from pipelines.served_model import DiffusionModel
from pipelines.serving.bodies import decode_png
from pipelines.serving.http import make_app
from pipelines.serving.metrics import Metrics
from pipelines.serving.served import load
from pipelines.storage import Storage
from tests.pipelines.evaluation.in_process import Keeping
from tests.pipelines.serving.alone import Alone, Page
from tests.pipelines.test_earlier_release import EARLIER

COUNT, SEED = 6, 11
SETTINGS = [
    Sampling.of(steps=4, scale=2.0),
    Sampling.of(kind="ancestral", steps=5),
    Sampling.of(kind="dpm_solver", steps=4, interval=(0.2, 0.8), scale=1.5),
]


def judged(model, settings, tmp_path):
    """By evaluations and the gate; (pictures, their labels)."""
    evaluator = SimpleNamespace(digest="e" * 32, encoder=Classifier(1, 8, 10).eval())
    plan = SamplePlan("digest", settings, COUNT, (SEED,), (5,) * 10, COUNT, f"file://{tmp_path}")
    (unit,) = plan.units()
    Drawer(model, None, evaluator, Storage()).draw(unit, plan, {})
    images, finite = unpack_samples(Storage().read(f"{plan.folder}/{unit.path(unit.shard)}"), 1)
    assert finite.all()
    return images, torch.from_numpy(unit.labels)


def of_a_trial(model, settings, labels):
    """By a study of guidance."""
    judge = Keeping(Classifier(1, 8, 10).eval())
    evaluator = Evaluator(judge, "classifier", "d", "here", "none", labels=True, accuracy=None)
    TrialSubject(model, evaluator, None, Conditioning(label=labels)).draw(settings, torch.arange(COUNT), seed=SEED)
    return judge.pixels


def of_a_training_trial(model, settings, labels, tmp_path):
    """By the judge of a study of trainings, from the averaged weights of a training."""
    keeping = Keeping(Contrastive(1, 8).eval())
    reference = FeatureMoments.of(torch.randn(200, keeping.width))
    cond, uri = Conditioning(label=labels), f"file://{tmp_path}/scores"
    held_out = torch.zeros(0, 1, 8, 8), None
    judge = RungJudge((1,), COUNT, cond, keeping, reference, held_out, SEED, Storage(), uri)
    state = SimpleNamespace(network=model.network, ema=EMA(model.network, 100.0), images_seen=1, gathered=None)
    judge(state, replace(model.spec, sampling=settings), torch.device("cpu"))
    return keeping.pixels


@pytest.fixture(scope="module")
def server():
    """The model behind HTTP and behind the page, in this process; each belongs to an event loop of its own."""
    drawing = ThreadPoolExecutor(1, "draw", torch.set_num_threads, (1,))
    with drawing:
        served, shown = (load(str(EARLIER / "version" / "model"), compose([]), drawing) for _ in range(2))
        app = make_app(Alone(served), served.limits, None, Metrics(dict))
        with TestClient(app) as client, closing(Page(shown)) as page:
            yield SimpleNamespace(client=client, page=page)


def decoded(pictures):
    return np.stack([decode_png(text) for text in pictures])


def by_the_page(page, labels, asked):
    """By the form of samples, in the words of its options."""
    options = {"kind": "sampler", "scale": "guidance"}
    written = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in asked.items()}
    form = {options.get(name, name): str(value) if name == "eta" else value for name, value in written.items()}
    shown, _ = page.send("sample", {"labels": labels, "seed": SEED, **form})
    return decoded(re.findall(r"data:image/png;base64,([^\"]+)", shown))


@pytest.mark.parametrize("settings", SETTINGS, ids=["ddim", "ancestral", "dpm_solver"])
def test_who_judges_shows_and_serves_a_model_draws_the_same_to_the_bit(settings, server, tmp_path):
    torch.set_num_threads(1)
    model = load_model(EARLIER / "version" / "model")
    expected, labels = judged(model, settings, tmp_path)
    assert expected.std() > 30
    assert len({image.tobytes() for image in expected}) == COUNT

    cond = Conditioning(label=labels)
    asked_here = draw(model, Noise.numbered(SEED, COUNT), cond, sampling=settings).images
    preview = generate(  # as a training does, which has no `Model`
        model.denoiser, model.schedule, settings, cond=cond, shape=model.spec.shape, seed=SEED, count=COUNT
    )
    names, asked = [model.spec.classes[label] for label in labels], changed(settings)
    request = SampleRequest.of(labels=names, seed=SEED, sampling=asked)
    table, params = {"label": names}, {"seed": SEED, **asked}
    pyfunc = DiffusionModel()
    pyfunc.load_context(SimpleNamespace(artifacts={"model": str(EARLIER / "version" / "model")}))
    body = {"labels": names, "seed": SEED, "sampling": asked}
    rows = {"dataframe_split": {"columns": ["label"], "data": [[name] for name in names]}, "params": params}
    found = {
        "study": of_a_trial(model, settings, labels),
        "study of trainings": of_a_training_trial(model, settings, labels, tmp_path),
        "library": to_uint8(asked_here).numpy(),
        "preview": to_uint8(preview).numpy(),
        "command": picture(request, model).pixels,
        "server": decoded(server.client.post("/v1/images", json=body).json()["images"]),
        "server, by MLflow's protocol": np.uint8(server.client.post("/invocations", json=rows).json()["predictions"]),
        "page": by_the_page(server.page, names, asked),
        "registered model": pyfunc.predict(None, pandas.DataFrame(table), params),
        "table": draw_table(model, table, params).numpy(),
    }
    for who, pictures in found.items():
        np.testing.assert_array_equal(pictures, expected, err_msg=who)


@pytest.mark.parametrize("settings", SETTINGS, ids=["ddim", "ancestral", "dpm_solver"])
def test_a_version_is_verified_by_the_pictures_that_it_serves(settings, tmp_path):
    torch.set_num_threads(1)
    model = load_model(EARLIER / "version" / "model")
    model = replace(model, spec=replace(model.spec, sampling=settings))
    made = draw_probe(model, tmp_path)
    verified = load_file(tmp_path / "probe.safetensors")
    served = draw(model, Noise.numbered(made["seed"], made["count"]), Conditioning(label=verified["labels"])).images
    assert torch.equal(verified["images"], to_uint8(served))


def changed(settings):
    """The fields of settings by which a request to a registered model asks for them."""
    plain = settings.to_json()
    return {name: plain[name] for name in ("kind", "steps", "scale", "interval", "eta") if name in plain}
