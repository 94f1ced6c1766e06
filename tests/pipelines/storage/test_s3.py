"""What S3, the network and what lies between them do, and which of it is worth another try."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest
import urllib3
from botocore.exceptions import ClientError
from tenacity import wait_fixed

from pipelines.config import compose
from pipelines.storage import NotFoundError, Storage, StorageError, TransientStorageError
from pipelines.storage.rate import Throttling
from pipelines.storage.s3 import S3Client
from pipelines.storage.s3_errors import ExpiredCredentialsError, sort_error
from tests.http_server import Answer, Request, serving

DATA = bytes(range(256)) * 512
URI = "s3://bucket/shards/train-000403.tar"


@pytest.fixture(autouse=True)
def _impatient(no_pauses_of_boto, monkeypatch, tmp_path):
    monkeypatch.setattr("pipelines.storage.s3.MAX_ATTEMPTS", 1)
    monkeypatch.setattr("pipelines.storage.s3.TIMEOUT_S", 0.2)
    monkeypatch.setattr("pipelines.storage.retry.BACKOFF", wait_fixed(0.02))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


def storage_at(url: str, folder, *, keys: str = "a", token: str = "", region: str | None = None) -> Storage:
    write_keys(folder, keys, token)
    return Storage(url, str(folder / "keys"), region)


def write_keys(folder, keys: str, token: str = "") -> None:
    session = f"aws_session_token={token}\n" if token else ""
    (folder / "new").write_text(f"[default]\naws_access_key_id={keys}\naws_secret_access_key=b\n{session}")
    (folder / "new").replace(folder / "keys")


def error_answer(code: str, status: int) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>so it is</Message></Error>".encode()
    return Answer(status, body, {"Content-Type": "application/xml", "Date": formatdate(usegmt=True)})


class Store:
    """One object; the first `broken` answers to a GET break off in the middle of the body."""

    def __init__(self, broken: int, stalls: bool) -> None:
        self.broken, self.stalls, self.lock = broken, stalls, threading.Lock()

    def __call__(self, request: Request) -> Answer:
        if request.method == "HEAD":
            return Answer(200, DATA, {"ETag": '"x"'})
        span = request.headers.get("Range")
        start, _, stop = (span or "bytes=0-").removeprefix("bytes=").partition("-")
        part = DATA[int(start) : int(stop) + 1 if stop else None]
        with self.lock:
            self.broken -= 1
            breaks = self.broken >= 0
        about = {"ETag": '"x"', "Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(DATA)}"}
        return Answer(206 if span else 200, part, about, len(part) // 2 if breaks else None, self.stalls)


@pytest.mark.parametrize("stalls", [True, False], ids=["stalls", "breaks"])
@pytest.mark.parametrize("broken", [1, 6])  # the transfer manager gives up after five
def test_a_body_that_breaks_off_is_asked_for_again(tmp_path, monkeypatch, stalls, broken):
    monkeypatch.setattr("pipelines.storage.s3.TIMEOUT_S", 0.05)  # an answer that is late is asked for again, too
    with serving(Store(broken, stalls)) as server:
        storage = storage_at(server.url, tmp_path)
        assert storage.read(URI) == DATA
    with serving(Store(broken, stalls)) as server:
        got = bytearray()
        storage_at(server.url, tmp_path).fetch(URI, 0, len(DATA), got.extend)
        assert got == DATA
    with serving(Store(broken, stalls)) as server:
        storage_at(server.url, tmp_path).download(URI, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == DATA


def test_a_stream_that_breaks_off_says_so_in_time(tmp_path):
    with serving(Store(1, stalls=True)) as server:
        began = time.monotonic()
        with pytest.raises(TransientStorageError, match=r"000403\.tar: .*(Read timed out|timeout)"):
            list(storage_at(server.url, tmp_path).stream(URI, 0, len(DATA)))
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "error",
    [
        urllib3.exceptions.SSLError("bad record mac"),
        urllib3.exceptions.ProtocolError("broken"),
        urllib3.exceptions.ReadTimeoutError(None, "/", "timed out"),
        ssl.SSLError(1, "decryption failed or bad record mac"),
        socket.gaierror(-3, "Temporary failure in name resolution"),
        TimeoutError("timed out"),
        ConnectionResetError(104, "Connection reset by peer"),
        OSError(113, "No route to host"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_socket_raises_while_a_body_is_read_is_worth_another_try(tmp_path, error):
    with (
        pytest.raises(TransientStorageError, match="000403"),
        S3Client(storage_at("http://h", tmp_path)).calls(URI, "read"),
    ):
        raise error


def test_a_key_that_holds_an_error_code_is_not_taken_for_one(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    for uri in (URI, "s3://bucket/AccessDenied/NoSuchBucket"):
        with serving(lambda request: error_answer("SlowDown", 503)) as server:
            storage = storage_at(server.url, tmp_path)
            with pytest.raises(TransientStorageError, match="SlowDown"):
                storage.upload(tmp_path / "file", uri, patience_s=0)
            with pytest.raises(TransientStorageError):
                storage.download(uri, tmp_path / "copy", patience_s=0)
    with serving(lambda request: error_answer("AccessDenied", 403)) as server:
        with pytest.raises(StorageError, match="grant read, write and list") as refused:
            storage_at(server.url, tmp_path).upload(tmp_path / "file", "s3://bucket/key")
        assert not isinstance(refused.value, TransientStorageError)


@pytest.mark.parametrize(
    ("code", "status", "again"),
    [
        ("SlowDown", 503, True),
        ("SlowDown", 429, True),
        ("TooManyRequests", 429, True),
        ("RequestTimeout", 400, True),
        ("RequestTimeTooSkewed", 403, True),
        ("InternalError", 500, True),
        ("ServiceUnavailable", 503, True),
        ("BadGateway", 502, True),
        ("OperationAborted", 409, True),
        ("BadDigest", 400, True),
        ("NoSuchUpload", 404, True),
        ("ExpiredToken", 400, True),
        ("ExpiredTokenException", 400, True),
        ("TokenRefreshRequired", 400, True),
        ("InvalidToken", 400, True),
        ("NotImplemented", 501, False),
        ("EntityTooLarge", 400, False),
        ("NoSuchBucket", 404, False),
        ("AccessDenied", 403, False),
        ("InvalidAccessKeyId", 403, False),
        ("SignatureDoesNotMatch", 403, False),
        ("AuthorizationHeaderMalformed", 400, False),
    ],
)
def test_answers_are_sorted_by_their_code_and_status(tmp_path, code, status, again):
    with serving(lambda request: error_answer(code, status)) as server:
        storage = storage_at(server.url, tmp_path)
        calls = [lambda: storage.read(URI, patience_s=0), lambda: storage.write(URI, b"x", patience_s=0)]
        for call in calls:
            with pytest.raises(StorageError, match="000403") as raised:
                call()
            assert isinstance(raised.value, TransientStorageError) is again
            assert not isinstance(raised.value, NotFoundError)


@pytest.mark.parametrize("status", [200, 403, 502, 504])
def test_a_page_of_something_in_front_of_the_store_is_sorted_by_its_status(tmp_path, status):
    page = Answer(status, b"<html><body>Bad gateway</body>", {"Content-Type": "text/html"})
    with serving(lambda request: page) as server:
        with pytest.raises(StorageError) as raised:
            storage_at(server.url, tmp_path).list("s3://bucket/folder", patience_s=0)
        assert isinstance(raised.value, TransientStorageError) is (status != 403)


def listed_page(*keys: str, following: str | None = None) -> Answer:
    """A page of a listing, and the token of the next one."""
    stamped = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;e&quot;</ETag><Size>3</Size>"
    objects = "".join(f"<Contents><Key>folder/{key}</Key>{stamped}</Contents>" for key in keys)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{following}</NextContinuationToken>"
    body = f"<ListBucketResult>{more if following else '<IsTruncated>false</IsTruncated>'}{objects}</ListBucketResult>"
    return Answer(200, body.encode(), {"Content-Type": "application/xml"})


def test_a_folder_is_listed_page_by_page_and_after_an_outage_only_the_page_that_is_missing_is_asked_for(tmp_path):
    answers = [listed_page("a", "b", following="second"), Answer(503), Answer(503), Answer(503), listed_page("c")]
    asked = []

    def answer(request):
        asked.append("continuation-token=second" in request.path)
        return answers[min(len(asked), len(answers)) - 1]

    with serving(answer) as server:
        found = storage_at(server.url, tmp_path).scan("s3://bucket/folder", patience_s=20)
        assert next(found).uri == "s3://bucket/folder/a"
        assert asked == [False]
        assert [entry.uri for entry in found] == ["s3://bucket/folder/b", "s3://bucket/folder/c"]
    assert asked == [False] + [True] * (len(asked) - 1)


def test_a_wrong_clock_is_named_with_the_fix(tmp_path):
    an_hour_ago = formatdate(time.time() - 3600, usegmt=True)
    answer = {  # to a HEAD request, which has no body
        "Error": {"Code": "403", "Message": "Forbidden"},
        "ResponseMetadata": {"HTTPStatusCode": 403, "HTTPHeaders": {"date": an_hour_ago}},
    }
    found = sort_error(URI, ClientError(answer, "HeadObject"))
    assert isinstance(found, TransientStorageError)
    assert "60 minutes ahead" in str(found)
    skewed = serving(lambda request: error_answer("RequestTimeTooSkewed", 403))
    with skewed as server, pytest.raises(TransientStorageError, match=r"clock of this machine is wrong, .*timedatectl"):
        storage_at(server.url, tmp_path).read(URI, patience_s=0)


class Guard:
    """A store that takes one access key at a time, and answers every other with an error."""

    def __init__(self, accepts: str, code: str, status: int) -> None:
        self.accepts, self.code, self.status = accepts, code, status
        self.when_refused: Callable[[], object] = lambda: None

    def __call__(self, request: Request) -> Answer:
        if f"Credential={self.accepts}/" in request.headers.get("Authorization", ""):
            return Answer(200, DATA, {"ETag": '"x"'})
        self.when_refused()
        if request.method == "HEAD":
            return Answer(self.status)
        return error_answer(self.code, self.status)


@pytest.mark.parametrize("code", ["ExpiredToken", "TokenRefreshRequired", "InvalidToken"])
def test_expired_credentials_are_read_again(tmp_path, code):
    guard = Guard("old", code, 400)
    with serving(guard) as server:
        storage = storage_at(server.url, tmp_path, keys="old", token="t")
        assert storage.read(URI) == DATA
        guard.accepts = "new"
        guard.when_refused = lambda: write_keys(tmp_path, "new", "t")  # the mounted file is rotated while it waits
        assert storage.read(URI) == DATA
        guard.accepts, guard.when_refused = "newest", lambda: None
        write_keys(tmp_path, "newest", "t")
        assert storage.exists(URI)  # HEAD: the answer has no body that names the code
        guard.accepts = "none"
        with pytest.raises(ExpiredCredentialsError):
            storage.read(URI, patience_s=0)


REFUSED = pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])


@REFUSED
def test_what_was_never_allowed_is_final_but_for_one_look_into_a_file_that_has_changed(tmp_path, code):
    guard = Guard("other", code, 403)
    with serving(guard) as server:
        storage = storage_at(server.url, tmp_path, keys="wrong")
        with pytest.raises(StorageError) as refused:
            storage.read(URI)
        assert not isinstance(refused.value, TransientStorageError)
        assert len(server.requests) == 1
        write_keys(tmp_path, "wrong, too")
        with pytest.raises(StorageError) as refused:
            storage.read(URI)
        assert not isinstance(refused.value, TransientStorageError)
        assert len(server.requests) == 3  # once with what it had, once with what it read
        write_keys(tmp_path, "other")
        assert storage.read(URI) == DATA


@REFUSED
def test_what_was_allowed_before_is_tried_again_until_it_is_again(tmp_path, code):
    guard, refusals = Guard("old", code, 403), []

    def rotate_later():
        refusals.append(1)
        if len(refusals) == 4:
            write_keys(tmp_path, "new")  # the mounted file follows the server after a while

    with serving(guard) as server:
        storage = storage_at(server.url, tmp_path, keys="old")
        assert storage.read(URI) == DATA
        guard.accepts, guard.when_refused = "new", rotate_later
        assert storage.read(URI) == DATA
        assert len(refusals) == 4
        guard.accepts = "none"
        with pytest.raises(TransientStorageError, match="this process could read there before"):
            storage.read(URI, patience_s=0)


def test_leave_to_read_is_no_leave_to_write(tmp_path):
    def read_only(request: Request) -> Answer:
        return error_answer("AccessDenied", 403) if request.method == "PUT" else Answer(200, DATA, {"ETag": '"x"'})

    with serving(read_only) as server:
        storage = storage_at(server.url, tmp_path)
        assert storage.read(URI) == DATA
        with pytest.raises(StorageError, match="the credentials may not do this") as refused:
            storage.write(URI, b"x")
        assert not isinstance(refused.value, TransientStorageError)


def test_threads_share_a_client_and_make_one_new_one_when_it_expires(tmp_path, monkeypatch):
    made = []
    make = S3Client._make

    def counted(self):
        made.append(1)
        return make(self)

    monkeypatch.setattr(S3Client, "_make", counted)
    guard = Guard("old", "ExpiredToken", 400)
    with serving(guard) as server:
        storage = storage_at(server.url, tmp_path, keys="old", token="t")
        assert storage.read(URI) == DATA
        guard.accepts = "new"
        write_keys(tmp_path, "new", "t")
        got: list[bytes] = []
        threads = [threading.Thread(target=lambda: got.append(storage.read(URI))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [DATA] * 8
        assert len(made) == 2


def test_a_mistake_in_the_settings_is_final(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="Invalid bucket name") as wrong:
        storage_at("http://127.0.0.1:9", tmp_path).read("s3://no bucket/x")
    assert not isinstance(wrong.value, TransientStorageError)
    with pytest.raises(StorageError, match="write http://HOST:PORT"):
        Storage("here:9").read(URI)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no complete AWS credentials"):
        Storage("http://127.0.0.1:9").read(URI)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="nobody"):
        Storage("http://127.0.0.1:10").read(URI)


def region_of(storage: Storage) -> str:
    with S3Client(storage).calls(URI, "read") as client:
        return str(client.meta.region_name)


def test_the_region_follows_the_rules_of_aws(tmp_path, monkeypatch):
    assert region_of(storage_at("http://127.0.0.1:9", tmp_path)) == "us-east-1"
    assert region_of(Storage(None, str(tmp_path / "keys"))) == "us-east-1"  # AWS itself, which redirects
    (tmp_path / "config").write_text("[default]\nregion=eu-west-3\n[profile work]\nregion=ap-south-1\n")
    (tmp_path / "keys").write_text(
        "[default]\naws_access_key_id=a\naws_secret_access_key=b\n[work]\naws_access_key_id=a\naws_secret_access_key=b\n"
    )
    assert region_of(Storage("http://127.0.0.1:9", str(tmp_path / "keys"))) == "eu-west-3"
    assert region_of(Storage(None, str(tmp_path / "keys"))) == "eu-west-3"
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert region_of(Storage(None, str(tmp_path / "keys"))) == "ap-south-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert region_of(Storage(None, str(tmp_path / "keys"))) == "us-west-2"
    monkeypatch.setenv("AWS_REGION", "us-west-1")
    assert Storage.of(compose()).region == "us-west-1"
    assert region_of(Storage(None, str(tmp_path / "keys"), "eu-north-1")) == "eu-north-1"


def test_a_store_on_this_machine_is_reached_past_the_proxy(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(Store(0, stalls=False)) as server:
        assert storage_at(server.url, tmp_path).read(URI, patience_s=0) == DATA
        named = server.url.replace("127.0.0.1", "localhost")
        assert storage_at(named, tmp_path).read(URI, patience_s=0) == DATA
    with pytest.raises(TransientStorageError, match="proxy"):  # others go through it
        storage_at("http://192.0.2.1", tmp_path).read(URI, patience_s=0)
    assert "NO_PROXY" not in os.environ


WHEN = "<LastModified>2026-01-01T00:00:00Z</LastModified>"


def listing(*keys: str) -> bytes:
    objects = "".join(f"<Contents><Key>{key}</Key><Size>1</Size><ETag>x</ETag>{WHEN}</Contents>" for key in keys)
    return (
        f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>".encode()
    )


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/outside", "a/..", "/"])
def test_a_key_that_leads_out_of_the_folder_is_refused_before_anything_is_downloaded(tmp_path, key):
    (tmp_path / "target").mkdir()

    def answer(request: Request) -> Answer:
        if "list-type=2" in request.path:
            return Answer(200, listing("run/a", f"run/{key}"), {"Content-Type": "application/xml"})
        return Answer(200, b"x", {"ETag": '"x"'})

    with serving(answer) as server:
        storage = storage_at(server.url, tmp_path)
        with pytest.raises(StorageError, match=f"s3://bucket/run/{key}: this key leads out of the folder"):
            storage.download_folder("s3://bucket/run/", tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())
    assert not (tmp_path / "outside").exists()


def test_names_with_dots_and_placeholders_of_folders_are_no_reason_to_refuse(tmp_path):
    def answer(request: Request) -> Answer:
        if "list-type=2" in request.path:
            return Answer(200, listing("run/", "run/..a", "run/b../c", "run/d/"), {"Content-Type": "application/xml"})
        return Answer(200, b"x", {"ETag": '"x"'})

    with serving(answer) as server:
        storage_at(server.url, tmp_path).download_folder("s3://bucket/run", tmp_path / "target")
    found = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*") if path.is_file()}
    assert found == {"..a", "b../c"}


@pytest.mark.parametrize(("code", "status"), [("SlowDown", 503), ("TooManyRequests", 429), ("ServiceUnavailable", 503)])
def test_answers_that_it_is_too_much_limit_the_reads_of_this_process(tmp_path, monkeypatch, code, status):
    """Those that boto3 repeats by itself, too; and reads only: a checkpoint does not wait for data."""
    monkeypatch.setattr("pipelines.storage.s3.MAX_ATTEMPTS", 3)
    left = [2]

    def answer(request: Request) -> Answer:
        if request.method == "GET" and left[0]:
            left[0] -= 1
            return error_answer(code, status)
        return Answer(200, DATA if request.method == "GET" else b"", {"ETag": '"x"'})

    with serving(answer) as server:
        storage = storage_at(server.url, tmp_path)
        for _ in range(20):
            storage.write(URI, b"1")
        assert storage.throttling() == Throttling()
        assert storage.read(URI) == DATA
        done = storage.throttling()
        assert (done.requests, done.slow_downs) == (3, 2)
        assert done.limit is not None
        began = time.monotonic()
        storage.write(URI, b"1")
        assert time.monotonic() - began < 1 / done.limit


@pytest.mark.parametrize(("code", "status"), [("InternalError", 500), ("RequestTimeout", 400)])
def test_other_errors_do_not_limit_the_reads(tmp_path, code, status):
    answers = iter([error_answer(code, status), Answer(200, DATA, {"ETag": '"x"'})])
    with serving(lambda request: next(answers)) as server:
        storage = storage_at(server.url, tmp_path)
        assert storage.read(URI) == DATA
        assert storage.throttling().limit is None


@pytest.mark.parametrize(
    ("body", "status", "kept"),
    [
        ("<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>", 200, True),
        ("<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>", 200, True),
        ("<VersioningConfiguration/>", 200, False),
        ("<Error><Code>AccessDenied</Code><Message>no</Message></Error>", 403, None),
        ("<Error><Code>NotImplemented</Code><Message>no</Message></Error>", 501, None),
    ],
)
def test_a_bucket_is_asked_whether_it_keeps_what_is_overwritten(tmp_path, body, status, kept):
    with serving(lambda request: Answer(status, f"<?xml version='1.0'?>{body}".encode())) as server:
        assert storage_at(server.url, tmp_path).keeps_versions(URI) is kept
    assert Storage().keeps_versions(f"file://{tmp_path}") is False
