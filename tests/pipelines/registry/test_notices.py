import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest
from mlflow.webhooks import delivery

from pipelines import tracking
from pipelines.loopback import bypass_proxies
from pipelines.registry import notices as module
from pipelines.registry.notices import Notices, listens
from pipelines.tracking import TrackingError, Webhook


@dataclass
class Server:
    """MLflow's webhooks."""

    there: list[Webhook] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    refuses: bool = False
    numbers: Iterator[int] = field(default_factory=count)

    def webhooks(self, uri, name):
        return list(self.there)

    def add(self, uri, name, url, secret):
        if self.refuses:
            raise TrackingError("Invalid webhook URL scheme")
        self.there.append(Webhook(str(next(self.numbers)), url))
        self.secrets[url] = secret
        return self.there[-1]

    def delete(self, uri, webhook):
        self.there.remove(webhook)

    def tell(self, url, secret=None, body=None):
        """Post a notice as MLflow signs it; return the status of the answer."""
        text = json.dumps({"entity": "model_version_alias", "action": "created"})
        secret = self.secrets[url] if secret is None else secret
        headers = {
            "X-MLflow-Delivery-Id": "id",
            "X-MLflow-Timestamp": "1790000000",
            "X-MLflow-Signature": delivery._generate_hmac_signature(secret, "id", "1790000000", text),
        }
        request = urllib.request.Request(url, (text if body is None else body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture
def server(monkeypatch):
    bypass_proxies("http://127.0.0.1")
    serve = module.ThreadingHTTPServer.serve_forever
    monkeypatch.setattr(module.ThreadingHTTPServer, "serve_forever", lambda self: serve(self, 0.01))  # ends at once
    made = Server()
    monkeypatch.setattr(tracking, "webhooks", made.webhooks)
    monkeypatch.setattr(tracking, "add_webhook", made.add)
    monkeypatch.setattr(tracking, "delete_webhook", made.delete)
    return made


def test_a_notice_of_mlflow_ends_the_waiting_and_one_of_anybody_else_does_not(server):
    with Notices("", print) as notices:
        notices.come()
        assert server.tell(notices.url, secret="guessed") == 404
        assert server.tell(notices.url, body="{}") == 404
        assert server.tell(notices.url.rsplit("/", 1)[0] + "/", secret=server.secrets[notices.url]) == 404
        assert not notices.wait(0.01)
        assert server.tell(notices.url) == 204
        assert notices.wait(5)
        assert not notices.wait(0.01)


def test_the_webhook_goes_with_its_guard_and_those_of_killed_guards_go_before(server):
    killed = Notices("", print)
    killed._server.server_close()
    with Notices("", print) as other:
        other.come()
        server.there += [Webhook("killed", killed.url), Webhook("foreign", "http://10.0.0.1/x")]
        with Notices("", print) as notices:
            notices.come()
            assert {hook.url for hook in server.there} == {other.url, notices.url, "http://10.0.0.1/x"}
        assert {hook.url for hook in server.there} == {other.url, "http://10.0.0.1/x"}


def test_a_guard_listens_at_its_own_address_only(server):
    with Notices("", print) as notices:
        assert listens(notices.url)
        assert not listens(notices.url + "x")
    assert not listens(notices.url)


def test_notices_come_from_the_second_look_on_and_again_after_the_webhook_was_lost(server, monkeypatch):
    monkeypatch.setattr(module, "CHECK_S", 0.0)
    with Notices("", print) as notices:
        assert not notices.come()  # what changed before it was registered was not told
        assert notices.come()
        server.there.clear()
        assert not notices.come()
        assert notices.come()
        assert len(server.there) == 1


def test_a_server_without_webhooks_is_said_once_and_asked_now_and_then(server, monkeypatch):
    said: list[str] = []
    server.refuses = True
    with Notices("", said.append) as notices:
        assert not notices.come()
        server.refuses = False
        assert not notices.come()  # it is not asked again at once
        assert server.there == []
        notices._check_at = 0.0
        notices.come()
        assert len(server.there) == 1
    (line,) = said
    assert "Invalid webhook URL scheme" in line
