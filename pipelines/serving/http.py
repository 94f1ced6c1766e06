"""The HTTP side of a server: who may ask, what is read of a request, and how answers and refusals look."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.inference.request import TASKS, RequestError
from pipelines.serving.bodies import FORMATS, answer_format, one_picture
from pipelines.serving.limits import Limits, RefusedRequest
from pipelines.serving.metrics import CONTENT_TYPE, Metrics
from pipelines.serving.token import is_allowed

logger = logging.getLogger(__name__)
CODES = {
    400: "BAD_REQUEST",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    422: "INVALID_PARAMETER_VALUE",
    429: "REQUEST_LIMIT_EXCEEDED",
    503: "TEMPORARILY_UNAVAILABLE",
}
"""Status -> the word for it in the body, as MLflow has them."""
LONGEST_MESSAGE = 2_000
"""Characters of a message: it may quote what was sent."""


class ModelBackend(Protocol):
    """Who answers."""

    async def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a body of `/v1/images`; a `RequestError` says why there is none."""

    async def invoke(self, body: Mapping[str, Any], content_type: str, model: str | None) -> tuple[str, int, str]:
        """Return (text, status, type) of the answer to `/invocations`, of the default model where none is named."""

    async def models(self) -> list[dict[str, Any]]:
        """Return what is served."""

    async def version(self) -> str:
        """Return the release of MLflow."""

    async def silent(self) -> list[str]:
        """Return the models that do not answer now."""


def make_app(backend: ModelBackend, limits: Limits, token_digest: str | None, metrics: Metrics) -> FastAPI:
    """Return the application.

    Args:
        token_digest: of the token that requests need; None for none.
    """
    bearer = HTTPBearer(auto_error=False, description="The token that `ddpm serve` prints")

    async def allowed(request: Request, _: object = Depends(bearer)) -> None:
        if token_digest is not None and not is_allowed(request.headers.get("authorization"), token_digest):
            raise RefusedRequest(401, "a bearer token is needed: send the header Authorization: Bearer TOKEN")

    app = FastAPI(title="ddpm serve", description="Pictures from diffusion models.", version="1", redoc_url=None)
    app.add_middleware(_Counted, metrics=metrics)
    app.add_exception_handler(RequestError, _refusal)
    app.add_exception_handler(HTTPException, _http_error)
    guarded = [Depends(allowed)]

    @app.post("/v1/images", dependencies=guarded, openapi_extra=_image_request(), response_class=JSONResponse)
    async def images(request: Request) -> Response:
        """Draw pictures: samples, filled masks, or edits of given pictures."""
        body = _parse_json(await _read(request, limits), limits)
        wanted = answer_format(body)
        answer = await backend.ask(body)
        if wanted == "png":
            return Response(one_picture(answer), media_type="image/png", headers=_told(answer))
        return JSONResponse(answer)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        """List the models: classes, size, settings, scores and cards."""
        return {"models": await backend.models()}

    @app.post("/invocations", dependencies=guarded, openapi_extra=_table_request(), response_class=JSONResponse)
    async def invocations(request: Request, model: str | None = None) -> Response:
        """Draw a picture for each row of a table, by MLflow's scoring protocol."""
        body = _parse_json(await _read(request, limits), limits)
        text, status, kind = await backend.invoke(body, request.headers["content-type"], model)
        return Response(text, status_code=status, media_type=kind)

    @app.get("/ping")
    async def ping() -> Response:
        """Say that the server is there."""
        return Response("\n", media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        """Say that every model answers."""
        if silent := await backend.silent():
            raise RefusedRequest(503, f"{', '.join(silent)} does not answer now: ask again later")
        return Response("\n", media_type="application/json")

    @app.get("/version")
    async def version() -> Response:
        """Say which release of MLflow's protocol `/invocations` is of."""
        return Response(await backend.version(), media_type="application/json")

    @app.get("/metrics", dependencies=guarded)
    async def counters() -> Response:
        """Give the counters, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return app


def refusal(status: int, message: str) -> JSONResponse:
    """Return the answer to a request that is refused."""
    shown = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} …"
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "1"}}.get(status)
    content = {"error_code": CODES.get(status, "INTERNAL_ERROR"), "message": shown}
    return JSONResponse(content, status_code=status, headers=headers)


async def _refusal(_: Request, error: Exception) -> Response:
    return refusal(error.status if isinstance(error, RefusedRequest) else 422, str(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return refusal(404, f"there is no {request.url.path}: POST /v1/images or /invocations, GET /v1/models, /docs")
    return refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


async def _read(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        RefusedRequest: it is of another type, too large, or does not arrive in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedRequest(415, f"content-type {kind or 'is missing'}: allowed is application/json")
    too_large = RefusedRequest(413, f"the body is too large: at most {limits.max_body:,} bytes are allowed")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limits.max_body:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.max_body:
                    raise too_large
    except TimeoutError as error:
        raise RefusedRequest(408, f"the body did not arrive within {limits.body_s:g} s, which is allowed") from error
    return bytes(data)


def _parse_json(data: bytes, limits: Limits) -> dict[str, Any]:
    """Return the object of a JSON text.

    Raises:
        RefusedRequest: it is none, or has too many values: all requests wait while one is parsed.
    """
    limits.check_values(data)
    try:
        body = json.loads(data)  # NaN too, which the field that holds it refuses
        # Halves of surrogate pairs, which JSON may hold, are no text that an answer or a tokenizer can write.
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RefusedRequest(400, f"the body is no JSON text: {error}") from error
    if not isinstance(body, dict):
        raise RefusedRequest(
            400, f'the body is a JSON {type(body).__name__}: send an object, such as {{"labels": ["3"]}}'
        )
    return body


def _told(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return headers that say by which model a picture was drawn; headers are ASCII, so that names are as in URLs."""
    return {
        "x-model": quote(str(answer["model"]["uri"] or answer["model"]["reference"]), safe="/:@"),
        "x-digest": answer["model"]["digest"],
    }


class _Counted:
    """Counts requests, and answers what goes wrong inside with a reason but no details."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # the client went away

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("a request failed")
            if status == 499:
                await refusal(500, "the server failed: its log says why")(scope, receive, watched)
        finally:
            route = scope.get("route")
            self.metrics.answered(getattr(route, "path", "other"), status, time.monotonic() - began)


def _image_request() -> dict[str, Any]:
    """Return the schema of a body of `/v1/images`, for the page that shows it."""
    own = {
        "model": {"type": "string", "description": "one of those served; default: the first"},
        "format": {"enum": list(FORMATS), "description": "png: the one picture, or the grid"},
    }
    kinds = []
    for task, kind in TASKS.items():
        schema = kind.model_json_schema()
        for name in ("images", "masks"):
            if name in schema["properties"]:
                schema["properties"][name]["items"] = {"type": "string", "format": "byte"}
        schema["properties"].pop("text_encoder")
        schema["properties"] = {"task": {"const": task}, **own, **schema["properties"]}
        kinds.append(schema)
    example = {"task": "sample", "labels": ["3", "8"], "seeds": [7], "sampling": {"steps": 20}}
    content = {"application/json": {"schema": {"oneOf": kinds}, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def _table_request() -> dict[str, Any]:
    """Return the same of `/invocations`."""
    example = {"dataframe_split": {"columns": ["label"], "data": [["3"], ["8"]]}, "params": {"steps": 20, "seed": 7}}
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {"requestBody": {"required": True, "content": content}}
