"""The files of results are texts that people can read and compare: each row of a table is a line."""

from __future__ import annotations

import json

from benchmarks.results import LINE, ROW, make_parser, rounded, to_text, with_earlier
from tests.benchmarks.programs import RESULTS


def test_a_row_of_a_table_is_a_line_and_what_is_too_long_for_one_is_divided():
    row = {"system": "ours", "images_per_s": [1.5, 2.5], "machine": "x" * LINE}
    wide = {"trial": "a", "params": {"machine": "x" * LINE, "rate": 0.1}, "scores": ["y" * (ROW - LINE)]}
    text = to_text({"commit": "abc", "machine": "z" * LINE, "rows": [row, wide]})
    assert text.splitlines() == [
        "{",
        ' "commit": "abc",',
        f' "machine": "{"z" * LINE}",',
        ' "rows": [',
        f"  {json.dumps(row)},",
        "  {",
        '   "trial": "a",',
        f'   "params": {json.dumps(wide["params"])},',
        f'   "scores": {json.dumps(wide["scores"])}',
        "  }",
        " ]",
        "}",
    ]
    assert json.loads(text) == {"commit": "abc", "machine": "z" * LINE, "rows": [row, wide]}


def test_what_is_measured_in_parts_keeps_the_rows_of_other_cases_in_the_order_of_the_cases(tmp_path):
    file = tmp_path / "benchmarks" / "results" / "some.json"
    options = make_parser("some", "Some.", "less").parse_args([])
    options.out = tmp_path
    cases = [{"ranks": ranks} for ranks in (2, 4, 8)]
    four, two = {"way": "a", "ranks": 4, "s": 1.0}, [{"way": way, "ranks": 2, "s": 1.0} for way in "ab"]
    assert with_earlier(options, "some", "rows", [four], cases) == [four]
    file.write_text(json.dumps({"rows": [four]}))
    assert with_earlier(options, "some", "rows", two, cases) == [*two, four]
    file.write_text(json.dumps({"rows": [*two, four]}))
    assert with_earlier(options, "some", "rows", [{**four, "s": 2.0}], cases) == [*two, {**four, "s": 2.0}]


def test_floats_are_rounded_to_six_significant_digits_and_nothing_else_is():
    value = {"a": [0.123456789, 123456789, True], "b": (1e-9 / 3, None, "0.123456789")}
    assert rounded(value) == {"a": [0.123457, 123456789, True], "b": [3.33333e-10, None, "0.123456789"]}


def test_every_file_of_results_has_this_form_and_all_of_them_are_short():
    texts = {path.name: path.read_text() for path in RESULTS.glob("*.json")}
    assert {name for name, text in texts.items() if text != to_text(rounded(json.loads(text)))} == set()
    assert sum(text.count("\n") for text in texts.values()) <= 3_200
