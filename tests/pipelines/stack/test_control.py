from pipelines import stack


def test_nothing_recorded_is_nothing_running(tmp_path):
    home = tmp_path / "none"
    assert stack.read_state(home) is None
    assert stack.down(home) == []
    assert [service.running for service in stack.status(home)] == [False] * 3
    assert not home.exists()
