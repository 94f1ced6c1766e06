import pytest

from pipelines.checkpoints import ModelError
from pipelines.models import resolve
from pipelines.storage import Storage


@pytest.mark.parametrize(
    "reference, message",
    [
        ("nowhere", "names no model"),
        ("runs:/abc", "needs an MLflow server"),
        ("models:/x@y", "needs an MLflow server"),
    ],
)
def test_references_that_name_nothing_say_what_a_reference_is(reference, message):
    with pytest.raises(ModelError, match=message):
        resolve(reference, tracking_uri=None, storage=Storage())
