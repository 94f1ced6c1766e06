"""What registered models may be called, and what MLflow's filters can hold."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.search_utils import SearchModelVersionUtils

from pipelines.checkpoints.lookup import ReferenceFormError, check_form, check_name
from pipelines.config import MODEL_NAME, ConfigError, compose, quoted_override

LETTERS = st.sampled_from(string.printable + "é写\x00\x7f")


@given(st.text(LETTERS, min_size=1, max_size=6))
def test_every_name_that_a_model_may_have_comes_through_mlflows_filter_as_it_is(name):
    if re.fullmatch(MODEL_NAME, name):
        parsed = SearchModelVersionUtils.parse_search_filter(f"name = '{name}' and run_id = 'ab'")
        assert [part["value"] for part in parsed] == [name, "ab"]


@pytest.mark.parametrize("name", ["m'x", "m\\", "'", "a' or name = 'b", "a\nb", "a\x00", "a/b", "a:b", "a@b", ""])
def test_a_name_that_cannot_be_asked_for_is_refused_wherever_it_is_given(name):
    with pytest.raises(ConfigError, match=r"registry.model: the name of a model has no / : @ ' or"):
        compose(["+experiment=digits", quoted_override("registry.model", name)])
    with pytest.raises(ReferenceFormError, match=r"the name of a model has no / : @ ' or"):
        check_name(name)
    for reference in (f"models:/{name}@champion", f"models:/{name}/1"):
        with pytest.raises(ReferenceFormError, match=r"has no / : @ ' or"):
            check_form(reference)


@pytest.mark.parametrize("name", ["digits", "my photos", 'the "best"', "写真", "a%b_c", "(a--b;c)"])
def test_other_names_are_taken(name):
    assert compose(["+experiment=digits", quoted_override("registry.model", name)]).registry.model == name
    check_form(f"models:/{name}@champion")
