"""The fields of the page's forms: one for each option of a request, with what the model has by itself."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ddpm.generate import Sampling
from ddpm.samplers import SAMPLERS
from ddpm.samplers.repaint import RePaint
from pipelines.inference.request import InpaintRequest, Option, Request, options
from pipelines.serving.forms import ELSEWHERE, OWN, write_form
from pipelines.serving.limits import Limits


class Form:
    """The fields of a form: one for each option of a request that the page does not show otherwise.

    Args:
        kind: of the request.
        told: what the server tells of the model that is asked, as in `GET /v1/models`.
        limits: of a request.
        first: options that come before those of every form.
        many: whether several labels and several pictures of each can be asked for.

    Attributes:
        components: the fields.
    """

    def __init__(
        self,
        kind: type[Request],
        told: Mapping[str, Any],
        limits: Limits,
        first: Sequence[str] = (),
        many: bool = False,
    ) -> None:
        self._kind, self._told, self._limits, self._many = kind, told, limits, many
        there = {option.name: option for option in options(kind) if option.name not in ELSEWHERE}
        sampling = Sampling.from_json(told["sampling"])
        self._most_steps = min(told["num_steps"], limits.max_steps)
        steps = RePaint().steps if kind is InpaintRequest and not told["inpainting"] else sampling.sampler.steps
        self._own = {name: option.default for name, option in there.items()} | {
            "sampler": OWN,
            "steps": min(steps, told["num_steps"]),
            "guidance": sampling.guidance.scale,
        }
        self._fields: dict[str, gr.components.Component] = {}

        def show(*names: str) -> None:
            self._fields |= {name: self._component(there.pop(name)) for name in names}

        show(*first)
        with gr.Row():
            show("labels", "prompts", "negative_prompt")
        with gr.Row():
            with gr.Column(min_width=220):
                show("seed")
                again = gr.Button("Another seed", size="sm")
            show("count")
        with gr.Accordion("Sampler, steps and guidance", open=False):
            show("sampler", "steps", "guidance")
        with gr.Accordion("More", open=False):
            show(*there)
        again.click(lambda: random.randrange(1 << 31), None, self._fields["seed"], api_visibility="private")

    @property
    def components(self) -> list[gr.components.Component]:
        """The fields, in order."""
        return list(self._fields.values())

    def body(self, values: Sequence[Any], **more: Any) -> dict[str, Any]:
        """Return the body of a request from the values of the fields, and from others.

        Raises:
            RequestError: a value cannot be read.
        """
        return write_form(self._kind, self._told["id"], dict(zip(self._fields, values, strict=True)), self._own, **more)

    def _component(self, option: Option) -> gr.components.Component:
        told, own, classes = self._told, self._own[option.name], list(self._told["classes"])
        label = option.name.replace("_", " ").capitalize()
        match option.name:
            case "labels":
                value, most = (classes[:10], None) if self._many else (classes[:1], 1)
                shown = bool(classes)
                return gr.Dropdown(classes, value=value, multiselect=True, max_choices=most, label=label, visible=shown)
            case "source_labels":
                shown = bool(classes)
                return gr.Dropdown(classes, value=[], multiselect=True, label=label, info=option.meaning, visible=shown)
            case "prompts" | "negative_prompt":
                return gr.Textbox(label=label, visible=told["text"], max_length=1000)
            case "sampler":
                return gr.Dropdown(
                    [OWN, *SAMPLERS], value=OWN, label=label, info=f"its own is {told['sampling']['kind']}"
                )
            case "steps":
                return gr.Slider(1, self._most_steps, value=min(own, self._most_steps), step=1, label=label)
            case "guidance":
                return gr.Slider(0, 10, value=own, step=0.1, label="Guidance scale", info="1 is without guidance")
            case "seed":
                return gr.Number(own, label=label, precision=0, minimum=option.low)
            case "count":
                most = min(self._limits.max_pictures, 16)
                return gr.Slider(1, most, value=own, step=1, label="Pictures of each", visible=self._many)
        if option.type is bool:
            return gr.Checkbox(own, label=label, info=option.meaning)
        if option.type is float and option.low is not None and option.high is not None:
            return gr.Slider(option.low, option.high, value=own, step=0.05, label=label, info=option.meaning)
        return gr.Textbox("" if own is None else str(own), label=label, info=option.meaning)
