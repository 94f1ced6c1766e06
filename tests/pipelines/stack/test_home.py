import stat

from pipelines.stack.home import default_home, ensure_credentials


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
