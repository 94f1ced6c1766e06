"""What the doctor says about storage, of servers with one fault each."""

import os
import time

import pytest

from pipelines.config import compose
from pipelines.doctor.services import http_date, skew_check
from pipelines.doctor.storage import check_storage, race
from pipelines.storage import Storage
from tests.pipelines.doctor import servers

S3 = ["storage=s3", "storage.root=s3://bucket/team"]


@pytest.fixture(autouse=True)
def _keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def statuses(*overrides: str) -> dict[str, str]:
    return {check.name: check.status for check in check_storage(compose(overrides))}


def failure(*overrides: str):
    [found] = [check for check in check_storage(compose(overrides)) if check.status == "failed"]
    return found


def test_a_storage_that_does_everything_is_ok():
    with servers.serving(servers.s3()) as url:
        found = check_storage(compose([*S3, f"storage.endpoint_url={url}"]))
    assert [(check.name, check.status) for check in found] == [("storage", "ok"), ("clock (S3)", "ok")]
    assert found[0].found == "s3://bucket/team: write, read, list, multipart, conditional writes, delete"


@pytest.mark.parametrize("condition", ["If-None-Match", "If-Match"])
def test_a_store_that_ignores_a_condition_is_found_by_a_race(condition):
    with servers.serving(servers.s3(holds=lambda asked: asked != condition)) as url:
        found = failure(*S3, f"storage.endpoint_url={url}")
    assert found.name == "storage conditional writes"
    assert f"4 of 4 writers at a time succeeded under {condition}" in found.found
    assert "SeaweedFS from 4.08 on" in found.fix


def test_a_store_that_does_not_list_is_distinguished_from_one_that_does_not_read():
    with servers.serving(servers.s3(lists=False)) as url:
        found = check_storage(compose([*S3, f"storage.endpoint_url={url}"]))
    assert [check.name for check in found if check.status == "failed"] == ["storage list"]
    assert "write, read, multipart, conditional writes, delete" in found[0].found


@pytest.mark.parametrize(
    ("code", "says", "fix"),
    [
        ("InvalidAccessKeyId", "the access key is unknown", "storage.credentials_file"),
        ("SignatureDoesNotMatch", "the secret key is wrong", "storage.credentials_file"),
        ("AccessDenied", "the credentials may not do this", "storage.credentials_file"),
        ("NoSuchBucket", "the bucket does not exist", "storage.root"),
    ],
)
def test_refusals_of_s3_are_explained_with_the_setting(code, says, fix):
    with servers.serving(servers.s3_error(code)) as url:
        found = failure(*S3, f"storage.endpoint_url={url}")
    assert found.name == "storage write"
    assert says in found.found
    assert fix in found.fix


def test_a_closed_port_fails_at_once_and_names_no_secret():
    began = time.monotonic()
    found = failure(*S3, f"storage.endpoint_url=http://127.0.0.1:{servers.closed_port()}")
    assert "Connection refused" in found.found
    assert "storage.endpoint_url" in found.fix
    assert time.monotonic() - began < 2


def test_a_folder_is_probed_like_a_bucket_and_left_empty(tmp_path):
    assert statuses("storage=file", f"storage.root=file://{tmp_path}") == {"storage": "ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails():
    found = failure("storage=file", "storage.root=file:///proc/ddpm")
    assert "storage.root" in found.fix


@pytest.mark.parametrize(("skew", "status"), [(0, "ok"), (-40, "ok"), (90, "warning"), (-1200, "failed")])
def test_the_clock_is_compared_with_the_servers(skew, status):
    with servers.serving(servers.fixed(403, skew_s=skew)) as url:
        [found] = skew_check("S3", http_date(url), time.time())
    assert found.status == status
    assert (found.fix is None) == (status == "ok")
    if status == "failed":
        assert "1200 s ahead of S3's" in found.found or "1199 s" in found.found or "1201 s" in found.found


def test_a_server_without_a_date_says_nothing_about_the_clock():
    assert skew_check("S3", http_date(f"http://127.0.0.1:{servers.closed_port()}"), time.time()) == []


def test_the_race_holds_on_local_files(tmp_path):
    assert race(Storage(), f"file://{tmp_path}/raced") is None
    assert os.listdir(tmp_path)
