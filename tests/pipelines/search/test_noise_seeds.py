"""No two studies select or confirm on the same noise, nor on that of an evaluation."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import compose
from pipelines.search.study import _hashed, confirmation_seed, trials_seed

BASE = compose(["+experiment=digits", "evaluation.seed=7", "evaluation.seeds=3"])
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(NAMES, NAMES, st.lists(NAMES, max_size=5, unique=True))
def test_every_study_and_every_confirmation_has_noise_of_its_own(one, other, trials):
    selected, confirmed = trials_seed(BASE, one), confirmation_seed(BASE, one, trials)
    assert (selected == trials_seed(BASE, other)) is (one == other)
    assert (confirmed == confirmation_seed(BASE, other, trials)) is (one == other)
    assert confirmed not in (selected, confirmation_seed(BASE, one, [*trials, "one more"]))
    assert {selected, confirmed}.isdisjoint({7, 8, 9})


def test_the_same_study_resumed_with_nothing_to_do_confirms_on_the_same_noise():
    assert confirmation_seed(BASE, "s", ["b", "a"]) == confirmation_seed(BASE, "s", ["a", "b"])
    assert trials_seed(BASE, "s") == trials_seed(BASE, "s")


def test_seeds_are_exact_in_json_and_those_that_are_taken_are_not_used():
    first = _hashed("x", BASE)
    second = _hashed("x", BASE, first)
    of_evaluations = BASE.evaluation.model_copy(update={"seed": first, "seeds": 1})
    assert _hashed("x", BASE.model_copy(update={"evaluation": of_evaluations})) == second != first
    assert max(first, second) < 2**48


def test_the_seeds_are_those_of_the_studies_that_are_stored():
    assert (trials_seed(BASE, "s"), confirmation_seed(BASE, "s", ["a", "b"])) == (214253034529993, 256642421003706)
