"""The description of a run: every stage has lines of its own in it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from pipelines.tracking.note import describe, newest_picture, pictures_of, with_parts

PARTS = st.dictionaries(
    st.sampled_from(["Training", "Score", "Registered", "Goodput", "Samples", "Commands"]),
    st.text("abc *.", min_size=1).map(str.strip),
)


@given(PARTS, PARTS)
def test_what_was_written_last_of_each_part_is_there_in_whatever_order_the_stages_come(first, second):
    assert with_parts(with_parts("", first), second) == with_parts("", {**first, **second})


def test_parts_stand_in_their_order_one_to_a_line():
    note = with_parts(with_parts("", {"Goodput": "90 %.", "Score": "7.0."}), {"Training": "digits.", "Score": "6.5."})
    assert note == "**Training.** digits.  \n**Score.** 6.5.  \n**Goodput.** 90 %."


def test_the_score_of_an_older_checkpoint_does_not_replace_that_of_a_newer_one():
    newer, older = "at 10,240 images: distance 6.5.", "at 5,120 images: distance 9.0."
    assert with_parts(with_parts("", {"Score": newer}), {"Score": older}) == f"**Score.** {newer}"
    assert with_parts(with_parts("", {"Score": older}), {"Score": newer}) == f"**Score.** {newer}"
    again = "at 10,240 images: distance 6.4."
    assert with_parts(with_parts("", {"Score": newer}), {"Score": again}) == f"**Score.** {again}"


class SlowServer:
    """A run whose server takes a while between reading and writing."""

    run_id = "r"

    def __init__(self):
        self.note = ""

    def experiment_id(self):
        return "1"

    def names(self, folder):
        return []

    def tag(self, key):
        read = self.note
        time.sleep(0.05)
        return read

    def tags(self, tags):
        self.note = tags["mlflow.note.content"]


def test_of_two_threads_that_write_parts_at_once_neither_undoes_the_other():
    server = SlowServer()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda parts: describe(server, parts), [{"Score": "7.0."}, {"Goodput": "90 %."}]))
    assert server.note == "**Score.** 7.0.  \n**Goodput.** 90 %."


def test_what_a_person_has_written_stays_above():
    mine = "Try again with a larger network.\n\n- lr 0.002 diverges"
    assert with_parts(mine, {"Score": "7.0."}) == f"{mine}\n\n**Score.** 7.0."
    later = with_parts(with_parts(mine, {"Score": "7.0."}) + "\n\nBetter than the last.", {"Score": "6.5."})
    assert later == f"{mine}\n\nBetter than the last.\n\n**Score.** 6.5."


def test_the_description_of_an_earlier_release_is_replaced():
    earlier = (
        "10,240 images of `s3://ddpm/datasets/digits` in batches of 128 on 2 workers: eps-prediction, cosine schedule. "
        "Steps of all curves are images seen. Resume with `ddpm train … name=digits`; sample with "
        "`ddpm sample runs:/76845fc664e94e118b925a8947cc060d --out DIR`."
    )
    assert with_parts(earlier, {"Training": "digits."}) == "**Training.** digits."
    assert with_parts(f"{earlier}\nMine.", {"Training": "digits."}) == "Mine.\n\n**Training.** digits."


def test_the_newest_picture_is_shown_and_that_of_an_evaluation_where_there_are_two():
    names = [f"images/samples+step+{step}+timestamp+9+0a.png" for step in (0, 10240, 5120)]
    assert newest_picture([*names, "images/samples+step+20480+timestamp+9+0a+compressed.webp"]) == (
        names[1],
        "samples",
        10240,
    )
    scored = "images/evaluation+step+10240+timestamp+8+0b.png"
    assert newest_picture([*names, scored]) == (scored, "evaluation", 10240)
    assert newest_picture(["images/other.png"]) is None


def test_the_pictures_of_a_key_are_by_images_seen_and_the_newest_of_each():
    names = [f"images/samples+step+{step}+timestamp+{at}+0a.png" for step, at in ((10240, 8), (0, 7), (10240, 9))]
    others = ["images/evaluation+step+0+timestamp+8+0b.png", "images/samples+step+5+timestamp+9+0a+compressed.webp"]
    assert list(pictures_of([*names, *others], "samples").items()) == [(0, names[1]), (10240, names[2])]
    assert pictures_of(names, "evaluation") == {}
