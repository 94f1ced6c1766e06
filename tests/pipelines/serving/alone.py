"""One model behind HTTP and behind the page, in this process and without Ray."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gradio.components.image_editor import EditorData, ImageEditor
from gradio.data_classes import FileData, ImageData

from pipelines.serving.limits import RefusedRequest
from pipelines.serving.page import build_page
from pipelines.serving.served import Served

OTHERWISE = {"guidance": "Guidance scale", "count": "Pictures of each"}
"""Option -> what the page calls it, where that is not its name."""


class Alone:
    """Answers by one model in this process."""

    def __init__(self, served) -> None:
        self.served, self.callers = served, ThreadPoolExecutor(8)
        self.failing = False

    async def ask(self, body):
        if self.failing:
            raise MemoryError("the secret of the house")
        if body.get("model") is not None:
            raise RefusedRequest(404, f"there is no model {body['model']!r}; served are: one")
        return await self.served.ask(body)

    async def invoke(self, body, content_type, model):
        return (await self.served.invoke(body, content_type, self.callers))[0]

    async def models(self):
        return [self.served.describe()]

    async def version(self):
        return "3"

    async def silent(self):
        return ["one"] if self.failing else []


class Page:
    """The page of a model, whose forms are sent without a browser."""

    def __init__(self, served: Served) -> None:
        told = {**served.describe(), "id": "one", "card": None}
        blocks = build_page([told], self._ask, served.limits)
        self._served, self._loop = served, asyncio.Runner()
        self._handlers: dict[Any, Any] = {handler.api_name: handler for handler in blocks.fns.values()}

    def close(self) -> None:
        """End the event loop that the model belongs to."""
        self._loop.close()

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._served.ask({**body, "model": None})

    def options(self, form: str) -> list[str]:
        """Return the options of a request that a form shows."""
        names = {shown: name for name, shown in OTHERWISE.items()}
        labels = [str(component.label) for component in self._handlers[form].inputs]
        shown = [label for label in labels if label not in ("Picture", "Fill")]
        return [names.get(label, label.lower().replace(" ", "_")) for label in shown]

    def send(self, form: str, given: dict[str, Any]) -> Any:
        """Send a form, and return what is shown.

        Args:
            given: values by the names of options; `images` is the path of a file.

        Raises:
            gradio.exceptions.Error: what is said to whoever sits before the page.
        """
        handler = self._handlers[form]
        left = {OTHERWISE.get(name, name.replace("_", " ").capitalize()): value for name, value in given.items()}
        picture = left.pop("Images", None)
        values = []
        for component in handler.inputs:
            value = left.pop(component.label, component.value)
            if component.label == "Picture" and picture is not None:
                value = component.preprocess(uploaded(component, str(picture)))
            values.append(value)
        assert not left, f"the form {form} has no {', '.join(left)}"
        return self._loop.run(handler.fn(*values))


def uploaded(component: Any, path: str) -> Any:
    """Return a file as a field for pictures gets it from a browser."""
    return EditorData(background=FileData(path=path)) if isinstance(component, ImageEditor) else ImageData(path=path)
