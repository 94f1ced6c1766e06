"""The token of a server: where it comes from, and who has it."""

import pytest

from pipelines.presentation.errors import ConfigError
from pipelines.serving.token import client_token, is_allowed, server_token


def test_a_token_is_made_once_and_only_its_owner_reads_it(tmp_path):
    home = tmp_path / "home"
    first = server_token(None, home, {})
    assert server_token(None, home, {}) == first
    assert len(first.text) >= 32
    assert (home / "serve-token").stat().st_mode & 0o777 == 0o600
    assert client_token(None, home) == first.text
    assert client_token("given", home) == "given"
    assert client_token(None, tmp_path / "elsewhere") is None
    assert first.text not in first.digest


def test_a_file_goes_before_the_variable_and_that_before_our_own(tmp_path):
    (tmp_path / "file").write_text("a token that is in a file\n")
    environ = {"DDPM_SERVE_TOKEN": "a token that is in the environment"}
    assert server_token(str(tmp_path / "file"), tmp_path, environ).text == "a token that is in a file"
    assert server_token(None, tmp_path, environ).text == environ["DDPM_SERVE_TOKEN"]
    assert not (tmp_path / "serve-token").exists()


def test_a_short_token_and_a_missing_file_are_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="has 5 characters: use 16 or more"):
        server_token(None, tmp_path, {"DDPM_SERVE_TOKEN": "12345"})
    with pytest.raises(ConfigError, match=r"serving.token_file = /none: it cannot be read"):
        server_token("/none", tmp_path, {})


def test_only_the_bearer_of_the_token_is_allowed(tmp_path):
    token = server_token(None, tmp_path, {})
    assert is_allowed(f"Bearer {token.text}", token.digest)
    assert is_allowed(f"bearer {token.text}", token.digest)
    for wrong in (
        None,
        "",
        "Bearer",
        f"Basic {token.text}",
        f"Bearer {token.text}x",
        token.text,
        f"Bearer {token.digest}",
    ):
        assert not is_allowed(wrong, token.digest)
