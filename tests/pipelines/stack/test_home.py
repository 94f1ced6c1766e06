import os
import re
import stat
from pathlib import Path

import pytest

from pipelines.stack.home import StackError, default_home, ensure_credentials, ray_folder


def test_home_comes_from_the_environment_or_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDPM_HOME", raising=False)
    assert default_home() == tmp_path / ".ddpm"
    monkeypatch.setenv("DDPM_HOME", "elsewhere")
    assert default_home() == tmp_path / "elsewhere"


def test_credentials_are_made_once_and_are_the_users_alone(tmp_path):
    ensure_credentials(tmp_path)
    files = ["credentials", "s3.json", "ray-token"]
    first = [(tmp_path / name).read_text() for name in files]
    ensure_credentials(tmp_path)
    assert [(tmp_path / name).read_text() for name in files] == first
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files} == {0o600}
    secret = first[0].split("aws_secret_access_key = ")[1].strip()
    assert len(secret) >= 40
    assert secret in first[1]


def test_ray_has_a_folder_of_this_user_that_is_closed_to_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/" + "long/" * 20)
    folder = ray_folder(tmp_path)
    assert folder.parent == Path(f"/tmp/ddpm-{os.getuid()}")
    assert re.fullmatch(r"ray-[0-9a-f]{8}", folder.name)  # short: a socket's path has at most 107 bytes
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345678)
    Path("/tmp/ddpm-12345678").symlink_to(tmp_path)
    try:
        with pytest.raises(StackError, match="is another user's"):
            ray_folder(tmp_path)
    finally:
        Path("/tmp/ddpm-12345678").unlink()


def test_each_stack_has_a_folder_of_its_own_for_ray(tmp_path):
    """Ray gives a submitted job the address in this folder's `ray_current_cluster`: the newest head's."""
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert ray_folder(tmp_path / "other") != ray_folder(tmp_path)
    assert ray_folder(tmp_path / "link") == ray_folder(tmp_path / "other")
