import numpy as np

from pipelines.evaluation.rows import Rows


def test_rows_written_in_any_order_are_read_in_theirs(tmp_path):
    rows = Rows(tmp_path / "rows", (2, 3), np.float32)
    whole = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
    for first in (7, 0, 4):
        rows.write(first, whole[first : first + 4])
    assert len(rows) == 10
    np.testing.assert_array_equal(rows.read(0, 10), whole)
    np.testing.assert_array_equal(rows.read(8, 99), whole[8:])
    np.testing.assert_array_equal(rows.map(), whole)


def test_chunks_are_bounded_and_together_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.evaluation.rows.CHUNK", 2)
    rows = Rows(tmp_path / "rows", (5,), np.int64)
    whole = np.arange(35).reshape(7, 5)
    rows.write(0, whole)
    chunks = list(rows.chunks(0, len(rows)))
    assert max(map(len, chunks)) == 2
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_no_rows_are_no_rows(tmp_path):
    rows = Rows(tmp_path / "rows", (5,), np.int64)
    assert len(rows) == 0
    assert list(rows.chunks(0, len(rows))) == []
    assert rows.map().shape == (0, 5)
