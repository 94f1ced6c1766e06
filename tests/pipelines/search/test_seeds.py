"""No two studies select or confirm on the same noise, nor on that of an evaluation."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import compose
from pipelines.search.seeds import NoiseSeeds, _hashed

BASE = compose(["+experiment=digits", "evaluation.seed=7", "evaluation.seeds=3"])
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(NAMES, NAMES, st.lists(NAMES, max_size=5, unique=True))
def test_every_study_and_every_confirmation_has_noise_of_its_own(one, other, trials):
    first, second = NoiseSeeds.of(BASE, one), NoiseSeeds.of(BASE, other)
    assert (first.trials == second.trials) is (one == other)
    assert (first.confirmation(trials) == second.confirmation(trials)) is (one == other)
    assert first.confirmation(trials) not in (first.trials, first.confirmation([*trials, "one more"]))
    assert {first.trials, first.confirmation(trials)}.isdisjoint({7, 8, 9})


def test_the_same_study_resumed_with_nothing_to_do_confirms_on_the_same_noise():
    seeds = NoiseSeeds.of(BASE, "s")
    assert seeds.confirmation(["b", "a"]) == seeds.confirmation(["a", "b"])
    assert seeds == NoiseSeeds.of(BASE, "s")


def test_seeds_are_exact_in_json_and_those_that_are_taken_are_not_used():
    first = _hashed("x", ())
    second = _hashed("x", {first})
    assert first != second
    assert max(first, second) < 2**48
