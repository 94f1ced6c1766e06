"""Asking a server for pictures: `ddpm sample --url`.

A picture is a function of its request, so that a request whose answer was lost is asked again: the connection broke,
the process that answers died, or too many requests waited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests
from tenacity import RetryCallState as Attempt
from tenacity import Retrying, retry_if_exception_type, stop_after_delay

from pipelines.environment.loopback import bypass_proxies
from pipelines.inference.files import PictureSource
from pipelines.inference.pictures import Pictures
from pipelines.inference.request import Request, RequestError
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import no_notice
from pipelines.serving.bodies import known_names, read_answer, write_body

PATIENCE_S = 60.0
"""How long a request is asked again."""
ANSWER_S = 600.0
"""How long an answer is waited for."""
LATER = {429, 500, 502, 503, 504}
"""Statuses after which asking again may help."""


class ServerError(PipelineError):
    """The server cannot be reached, or cannot answer now."""


class _Later(Exception):  # noqa: N818 - no error yet
    """A request that is to be asked again, after some seconds where the server says so."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s


@dataclass(frozen=True)
class Client:
    """A client of one server.

    Attributes:
        url: of the server.
        token: that it asks for; None for none.
        patience_s: how long a request is asked again where its answer is lost.
        notice: called with a line of text before a request is asked again for the first time.
    """

    url: str
    token: str | None = None
    patience_s: float = PATIENCE_S
    notice: Callable[[str], object] = field(default=no_notice, compare=False)

    def draw(self, request: Request, *, model: str | None = None) -> tuple[Pictures, PictureSource]:
        """Return the pictures of a request, and who drew them.

        Args:
            model: by the name or reference under which it is served; None for the server's default.

        Raises:
            RequestError: the model cannot do what is asked; the message says what it can.
            ServerError: the server does not answer.
        """
        body = write_body(request)
        return read_answer(self.ask(body if model is None else {**body, "model": model}))

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a JSON body; see `pipelines.serving.bodies`.

        Raises:
            RequestError: the request is refused.
            ServerError: the server does not answer.
        """
        return self._patiently("POST", "/v1/images", body)

    def classes(self, model: str) -> tuple[str, ...]:
        """Return the names of the classes of a model.

        Args:
            model: by the name or reference under which it is served.

        Raises:
            RequestError: there is no such model.
            ServerError: the server does not answer.
        """
        served = {told["id"]: told for told in self._patiently("GET", "/v1/models")["models"]}
        found = known_names(list(served)).get(model)
        if found is None:
            raise RequestError(f"{self.url}: there is no model {model!r}; served are: {', '.join(served)}")
        return tuple(served[found]["classes"])

    def _patiently(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return an answer, asked for again where it is lost."""
        bypass_proxies(self.url)
        patient = Retrying(
            retry=retry_if_exception_type(_Later),
            stop=stop_after_delay(self.patience_s),
            wait=_wait,
            before_sleep=self._again,
            reraise=True,
        )
        try:
            return patient(self._once, method, path, body)
        except _Later as later:
            raise ServerError(f"{self.url} does not answer: {later}") from later

    def _again(self, attempt: Attempt) -> None:
        """Say why a request is asked again, once."""
        if attempt.attempt_number == 1 and attempt.outcome is not None:
            why = attempt.outcome.exception()
            self.notice(f"{self.url} does not answer ({why}): it is asked again for {self.patience_s:.0f} s")

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        address = f"{self.url.rstrip('/')}{path}"
        try:
            answer = requests.request(method, address, json=body, headers=headers, timeout=(10, ANSWER_S))
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _Later(str(error)) from error
        except requests.RequestException as error:
            raise ServerError(f"{self.url}: {error}") from error
        try:
            found = answer.json()
            message = found.get("message", "")
        except (ValueError, AttributeError):
            found, message = None, answer.text[:500]
        if answer.status_code in LATER:
            after = answer.headers.get("retry-after", "")
            raise _Later(f"{answer.status_code} {message}", float(after) if after.isdecimal() else None)
        if answer.status_code == 401:
            raise RequestError(f"{self.url}: {message}; give --token, or set DDPM_SERVE_TOKEN")
        if not answer.ok:
            raise RequestError(f"{self.url}: {message or answer.status_code}")
        if not isinstance(found, dict):
            raise RequestError(f"{self.url} answers something else than JSON: is it a server of `ddpm serve`?")
        return found


def _wait(attempt: Attempt) -> float:
    """Return the seconds before another try: as the server says, else longer each time."""
    error = attempt.outcome.exception() if attempt.outcome else None
    after = error.after_s if isinstance(error, _Later) else None
    return after if after is not None else min(0.2 * 2 ** (attempt.attempt_number - 1), 5.0)
