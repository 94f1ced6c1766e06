"""One loaded model: requests that are drawn in one batch get what each would get alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm.model import load_model, save_model
from pipelines.checkpoints import ModelError
from pipelines.config import compose
from pipelines.inference.pictures import picture
from pipelines.inference.request import SampleRequest
from pipelines.serving.bodies import read_answer
from pipelines.serving.limits import RefusedRequest
from pipelines.serving.served import Served, load
from tests.pipelines.drawing import WORDS, encode, model_folder
from tests.pipelines.serving.bad_requests import table

WAIT = ["serving.batch_wait_ms=1000"]


@pytest.fixture
def drawing():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def near(one, other):
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_texts_of_different_lengths_are_drawn_together(tmp_path, drawing):
    served = load(str(model_folder(tmp_path, classes=(), text_dim=WORDS)), compose(WAIT), drawing)
    served = replace(served, encode=encode)
    asked = [
        {"prompts": ["a red heart", "one"], "seed": 1},
        {"prompts": ["x"], "seeds": [2, 3]},
        {"prompts": ["one more long text of many words"], "seed": 4},
    ]
    avoiding = [{**fields, "negative_prompt": text} for fields, text in zip(asked, ("blue", "a b c", "d"), strict=True)]

    async def scenario():
        return await asyncio.gather(*(served.ask(fields) for fields in [*asked, *avoiding]))

    answers = asyncio.run(scenario())
    assert [answer["batch"]["pictures"] for answer in answers] == [5] * 6
    for fields, answer in zip([*asked, *avoiding], answers, strict=True):
        wanted = picture(SampleRequest.of(**fields), served.model, encode=encode)
        assert near(read_answer(answer)[0].pixels, wanted.pixels)
        assert [row["prompt"] for row in answer["rows"]] == [row.prompt for row in wanted.rows]


def test_tables_and_images_are_drawn_together(tmp_path, drawing):
    served = load(str(model_folder(tmp_path, classes=("a", "b"))), compose(WAIT), drawing)

    async def scenario(served: Served):
        with ThreadPoolExecutor(2) as callers:
            rows = table(["label", "seed"], [["a", 5], ["b", 6]])
            asked = served.ask({"labels": ["b"], "seeds": [6]}), served.invoke(rows, "application/json", callers)
            return await asyncio.gather(*asked)

    answer, ((text, status, _), count, batches) = asyncio.run(scenario(served))
    assert (status, count) == (200, 2), text
    assert answer["batch"]["pictures"] == batches[0]["pictures"] == 3
    assert sorted([answer["batch"]["first"], batches[0]["first"]]) == [False, True]
    assert str(read_answer(answer)[0].pixels[0].tolist()) in text


def test_a_model_that_draws_no_numbers_is_not_served(tmp_path, drawing):
    model = load_model(model_folder(tmp_path))
    weights = {name: torch.full_like(tensor, 3e38) for name, tensor in model.network.state_dict().items()}
    save_model(tmp_path, model.spec, weights)
    with pytest.raises(ModelError, match="draws something that is not a number: it is not served"):
        load(str(tmp_path), compose([]), drawing)


def test_a_request_names_no_network_but_those_of_the_model(tmp_path, drawing):
    weak = model_folder(tmp_path / "weak", seed=1)
    model = load_model(model_folder(tmp_path / "model"))
    own = model.spec.sampling.with_fields(guidance="auto", weak=str(weak), scale=2.0)
    save_model(tmp_path / "model", replace(model.spec, sampling=own), model.network.state_dict())
    served = load(str(tmp_path / "model"), compose([]), drawing)

    async def ask(**sampling):
        return await served.ask({"labels": [0], "sampling": sampling})

    answer = asyncio.run(ask(weak=str(weak)))
    assert answer["request"]["sampling"]["weak"] == str(weak)
    for sampling in ({"weak": str(tmp_path / "model")}, {"guidance": "classifier", "classifier": str(weak)}):
        with pytest.raises(RefusedRequest, match="a server draws with the networks of its model only"):
            asyncio.run(ask(**sampling))


def test_nobody_waits_for_the_compiling_of_a_request(tmp_path, drawing):
    served = load(str(model_folder(tmp_path)), compose([]), drawing)
    with pytest.raises(RefusedRequest, match="compile: others would wait for it"):
        asyncio.run(served.ask({"labels": [0], "sampling": {"compile": True}}))


@pytest.mark.slow
def test_a_model_that_is_registered_compiled_is_compiled_before_it_is_served(tmp_path, drawing):
    model = load_model(model_folder(tmp_path))
    save_model(
        tmp_path,
        replace(model.spec, sampling=model.spec.sampling.with_fields(compile=True)),
        model.network.state_dict(),
    )
    served = load(str(tmp_path), compose([]), drawing)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    sizes = (1, 2, 5, 8)

    async def ask_for_each():
        return [await served.ask({"labels": [0] * count}) for count in sizes]

    for count, answer in zip(sizes, asyncio.run(ask_for_each()), strict=True):
        wanted = picture(SampleRequest.of(labels=[0] * count, sampling={"compile": False}), served.model)
        assert near(read_answer(answer)[0].pixels, wanted.pixels)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0
