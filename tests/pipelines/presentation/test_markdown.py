"""What is plain text stays plain text, in HTML and in Markdown alike, and one table has the same cells in both."""

from __future__ import annotations

import re

import pytest

from pipelines.presentation import html, markdown
from pipelines.presentation.blocks import (
    Bar,
    Code,
    Image,
    Items,
    Link,
    Listing,
    Section,
    Strong,
    Table,
    Text,
    number,
    with_interval,
)

EVIL = "<script>alert(1)</script> *a* _b_ [c](http://evil) `d` | # >"


@pytest.mark.parametrize("words", [EVIL, Strong(EVIL), Link(EVIL, "#here"), ["before ", EVIL, Code("x")]])
def test_plain_text_is_no_markup(words):
    text = markdown.words(words)
    assert "<script" not in text
    assert r"\*a\* \_b\_ \[c\](http://evil) \`d\` \| \# \>" in text
    page = str(html.words(words))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_words_within_a_line_keep_their_spaces():
    words = ["of the run ", Link(Code("digits"), "#r"), ", after ", Strong("all"), " images of batch_size"]
    assert markdown.words(words) == "of the run [`digits`](#r), after **all** images of batch_size"
    assert str(html.words(words)) == (
        'of the run <a href="#r" rel="noreferrer"><code>digits</code></a>, after <b>all</b> images of batch_size'
    )


def test_one_table_has_the_same_cells_in_both():
    table = Table(("score", "value"), [("a|b", "1"), (Code("c"), "2")], frozenset([1]), marked=frozenset([1]))
    page = html.page("t", "s", [Section("one", "One", [table], "How to read it.")], "f")
    assert re.findall(r'<th scope="row">(.*?)</th><td class="n">(.*?)</td>', page) == [
        ("a|b", "1"),
        ("<code>c</code>", "2"),
    ]
    assert page.count('<tr class="marked">') == 1
    lines = markdown.section(Section("one", "One", [table], "How to read it.")).splitlines()
    assert lines[:3] == ["### One", "", "How to read it."]
    assert lines[-4:] == ["| score | &emsp;value |", "| --- | --- |", r"| a\|b | &emsp;1 |", "| `c` | &emsp;2 |"]


def test_every_block_of_a_card_has_a_form_in_markdown_and_others_are_refused():
    blocks = [Text("x"), Items(["a", "b"]), Listing("ddpm up", "sh"), Image("u.png", "alt", "what")]
    assert [markdown.block(block) for block in blocks] == [
        "x",
        "- a\n- b",
        "```sh\nddpm up\n```",
        "what:\n\n![alt](u.png)",
    ]
    with pytest.raises(TypeError, match="'bar' has no form in Markdown"):
        markdown.block(Bar([], ""))


@pytest.mark.parametrize(
    "value, shown",
    [(None, ""), (float("nan"), "not a number"), (0.123456, "0.1235"), (1234.5, "1,234"), (-2500.0, "-2,500")],
)
def test_a_number_has_four_digits(value, shown):
    assert number(value) == shown


def test_a_number_has_its_interval_where_there_is_one():
    assert with_interval(2.0, 1.5, 2.5) == "2 (1.5 to 2.5)"
    assert with_interval(2.0, None, 2.5) == "2"
