"""Webhooks of the model registry: MLflow tells an address of ours whenever an alias was set or taken away."""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass
from email.message import Message
from typing import TYPE_CHECKING

from pipelines.tracking.client import ask, pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.webhook import WebhookEventStr

EVENTS: list[WebhookEventStr] = ["model_version_alias.created", "model_version_alias.deleted"]
"""An alias was set, on whatever version; it was taken away."""


@dataclass(frozen=True)
class Webhook:
    """A webhook of an MLflow server.

    Attributes:
        number: MLflow's ID of it.
        url: the address that is told.
    """

    number: str
    url: str


def webhooks(uri: str, name: str) -> list[Webhook]:
    """Return the webhooks of a name; several may have the same."""
    found = ask(uri, lambda mlflow: list(pages(lambda token: mlflow.list_webhooks(100, token))), patience_s=0)
    return [Webhook(str(hook.webhook_id), str(hook.url)) for hook in found if hook.name == name]


def add_webhook(uri: str, name: str, url: str, secret: str) -> Webhook:
    """Have an address told of every change of an alias, and check that the server reaches it.

    Args:
        secret: with which the server signs what it tells; see `is_signed`. A server keeps it encrypted; unless its
            MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY is set, the key is another one after a restart, and then it can read
            none of its webhooks any more: this is only for servers that have it.

    Raises:
        TrackingError: the server has no webhooks, or allows none to such an address.
        UnreachableError: it cannot reach the address; nothing was added then.
    """
    from mlflow.exceptions import MlflowException

    def add(mlflow: MlflowClient) -> Webhook:
        made = mlflow.create_webhook(name, url, EVENTS, secret=secret)
        told = mlflow.test_webhook(made.webhook_id)
        if not told.success:
            mlflow.delete_webhook(made.webhook_id)
            raise MlflowException(f"it does not reach {url}: {told.error_message or told.response_status}")
        return Webhook(str(made.webhook_id), url)

    return ask(uri, add, patience_s=0)


def delete_webhook(uri: str, webhook: Webhook) -> None:
    """Remove a webhook; one that is not there is no error."""
    from mlflow.exceptions import MlflowException

    def delete(mlflow: MlflowClient) -> None:
        try:
            mlflow.delete_webhook(webhook.number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    ask(uri, delete, patience_s=0)


def is_signed(headers: Message, body: bytes, secret: str) -> bool:
    """Return whether a request of a webhook was signed with its secret, as Standard Webhooks have it.

    Args:
        headers: of the request.
    """
    from mlflow.webhooks.constants import (
        WEBHOOK_DELIVERY_ID_HEADER,
        WEBHOOK_SIGNATURE_HEADER,
        WEBHOOK_SIGNATURE_VERSION,
        WEBHOOK_TIMESTAMP_HEADER,
    )

    names = (WEBHOOK_DELIVERY_ID_HEADER, WEBHOOK_TIMESTAMP_HEADER)
    signed = b".".join([*(headers.get(name, "").encode() for name in names), body])
    digest = base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    given = headers.get(WEBHOOK_SIGNATURE_HEADER, "")
    return hmac.compare_digest(f"{WEBHOOK_SIGNATURE_VERSION},{digest}".encode(), given.encode())
