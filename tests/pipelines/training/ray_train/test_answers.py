import pytest
import ray
from ray.exceptions import GetTimeoutError

from pipelines.training.errors import TrainingError
from pipelines.training.ray_train.answers import answer


def test_a_missing_answer_is_an_error_that_names_the_question(monkeypatch):
    def get(reference, timeout):
        if timeout < 100:
            raise GetTimeoutError
        return reference.upper()

    monkeypatch.setattr(ray, "get", get)
    assert answer("yes", "the progress of the workers") == "YES"
    with pytest.raises(TrainingError, match=r"no answer within 5 s on the progress of the workers: .*resumes"):
        answer("yes", "the progress of the workers", timeout_s=5)
