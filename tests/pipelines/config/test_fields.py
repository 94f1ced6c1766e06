"""What `ddpm config` shows: every field with its meaning, and where each value came from."""

from __future__ import annotations

import pytest

from pipelines.config import ConfigError, compose, flatten, groups
from pipelines.config.fields import choices, config_fields, explain, in_words, origins, sections


@pytest.mark.parametrize("field", config_fields(), ids=lambda field: f"{field.key}-{'-'.join(field.kinds)}")
def test_every_field_of_the_configuration_has_a_meaning_and_a_type(field):
    assert len(field.meaning.split()) >= 2, f"{field.key} has no description: say what it does"
    assert field.meaning[0].isupper() or not field.meaning[0].isalpha()
    assert field.meaning.endswith(".")
    assert field.type not in ("", "section")


def test_every_section_and_every_shipped_file_has_a_meaning():
    for name, meaning in sections().items():
        assert len(meaning.split()) >= 3, name
    for group in groups():
        for choice in choices(group):
            assert choice.meaning, choice.override


@pytest.mark.parametrize(
    "overrides", [[], ["+experiment=digits"], ["sampler=heun", "model=dit_digits", "objective=p2"]]
)
def test_every_value_of_a_configuration_is_explained_once_and_none_besides(overrides):
    found = explain(overrides)
    assert {each.field.key: each.value for each in found} == flatten(compose(overrides).model_dump(mode="json"))
    assert len(found) == len({each.field.key for each in found})


@pytest.mark.parametrize(
    "overrides", [[], ["+experiment=cifar10"], ["sampler=langevin", "schedule=edm", "data=folder"]]
)
def test_unset_fields_have_their_defaults_and_required_ones_are_set(overrides):
    for each in explain([*overrides, "data.num_classes=10", "data.image_size=32"]):
        if each.origin == "default":
            assert not each.field.required or each.field.key.endswith(".kind"), each.field.key
            if not each.field.required:
                assert each.value == each.field.default, each.field.key


@pytest.mark.parametrize(
    "key, overrides, origin",
    [
        ("optim.betas", [], "default"),
        ("optim.warmup_images", [], "conf/optim/adamw.yaml"),
        ("optim.warmup_images", ["+experiment=digits"], "conf/experiment/digits.yaml"),
        ("optim.warmup_images", ["+experiment=digits", "optim.warmup_images=3"], "override"),
        ("optim.warmup_images", ["+experiment=digits_score"], "conf/experiment/digits.yaml"),
        ("sampler.steps", ["+experiment=digits_score"], "conf/experiment/digits_score.yaml"),
        ("sampler.kind", ["+experiment=digits_score"], "conf/sampler/langevin.yaml"),
        ("sampler.kind", ["sampler=heun"], "conf/sampler/heun.yaml"),
        ("images", [], "conf/config.yaml"),
        ("cluster.max_failures", ["cluster.max_failures=7"], "override"),
        ("guidance.scale", ["guidance={scale:2.0}"], "override"),
        ("checkpoint.keep", ["~checkpoint.keep"], "default"),
    ],
)
def test_an_origin_names_the_last_that_set_the_value(key, overrides, origin):
    (each,) = explain(overrides, key)
    assert each.origin == origin


def test_an_origin_is_a_file_that_has_the_value():
    for key, origin in origins(["+experiment=digits_learned_variance"]).items():
        assert origin.startswith("conf/"), key


def test_a_section_is_explained_alone_and_a_field_of_another_kind_says_so():
    assert {each.field.key.partition(".")[0] for each in explain([], "optim")} == {"optim"}
    (eta,) = explain(["sampler=heun"], "sampler.eta")
    assert (eta.unused, eta.field.kinds) == ("sampler.kind is heun", ("ddim",))


@pytest.mark.parametrize(
    "key, message",
    [("optim.lrr", r"no 'lrr' in optim\. .*Did you mean 'lr'\?"), ("optimm", r"Did you mean 'optim'\?")],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key, message):
    with pytest.raises(ConfigError, match=message):
        explain([], key)


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "number", "exclusiveMinimum": 0}, ("number", "> 0")),
        ({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}, ("whole number or null", ">= 1")),
        ({"enum": ["a", "b"]}, ("text", "a, b")),
        ({"type": "array", "items": {"type": "boolean"}}, ("list of booleans", "each true, false")),
        (
            {"type": "array", "prefixItems": [{"type": "number", "minimum": 0, "maximum": 1}] * 2},
            ("list of 2 numbers", "each >= 0 and <= 1"),
        ),
    ],
)
def test_types_are_put_into_words(schema, words):
    assert in_words(schema) == words
