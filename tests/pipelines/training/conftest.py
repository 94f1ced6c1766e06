import pytest

from pipelines.shards.index import Dataset
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """8x8 digits in shards."""
    uri = f"file://{tmp_path_factory.mktemp('data')}/digits"
    return ingest("digits", uri, Storage(), image_size=8, channels=1, shard_samples=128).dataset
