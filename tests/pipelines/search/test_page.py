"""The HTML page of a study is complete in itself."""

import math
import re
from dataclasses import replace

import numpy as np

from ddpm.generate import Sampling
from ddpm.quality import Interval
from pipelines.search import importance
from pipelines.search.confirmation import Confirmed
from pipelines.search.page import StudyPage
from pipelines.search.study_config import StudyConfig
from tests.pipelines.search.test_study import SPACE, STUDY, record


def test_the_page_holds_everything_and_loads_nothing():
    records = [record(i, 9.0 - i, 10.0 + i) for i in range(6)]
    records += [record(8, 30.0, state="stopped"), record(9, math.nan, state="failed")]
    eta = {"sampler.kind": "ddim", "sampler.eta": 0.5}
    records.append(record(11, 3.5, 8.0, **eta))
    pictures = {records[-1].trial: np.zeros((5, 8, 8, 1), np.uint8)}
    text = StudyPage(
        "first", STUDY, "models:/digits@champion", records, pictures=pictures, command="ddpm search"
    ).html()
    for one in records:
        assert one.trial in text
    assert text.count("Plotly.newPlot") == 5
    assert "cannot be told from 7 finished trials: their 3 parameters need at least 18" in text
    own = re.sub(r"<script\b[^>]*>.*?</script>", "", text, flags=re.DOTALL)  # the library has much in its strings
    assert own.count('src="data:image/png;base64,') == 1
    assert not [word for word in ("<script", "<link", 'src="http', "url(") if word in own]
    assert "sampler.eta=0.5" in text  # the best trial's parameters, as the command line takes them


def test_importances_are_shown_with_how_far_they_can_be_trusted_where_there_are_trials_enough(monkeypatch):
    monkeypatch.setattr(importance, "TREES", 4)
    monkeypatch.setattr(importance, "REFITS", 4)
    records = [record(i, 30.0 - i, **({"sampler.kind": "ddim"} if i % 2 else {})) for i in range(18)]
    page = StudyPage("first", STUDY, "a model", records)
    bar = page.figures()["importances"].data[0]
    assert sorted(bar.y) == ["guidance.scale", "sampler.kind", "sampler.steps"]
    assert len(bar.error_x.array) == 3
    text = page.html()
    assert text.count("Plotly.newPlot") == 6
    assert "Of 18 finished trials; the bars hold 90% of 4 fits" in text


def test_the_history_and_the_front_are_of_finished_trials_and_what_was_stopped_is_among_the_reports():
    first, better, cheap = record(0, 9.0, 20.0), record(2, 4.0, 30.0), record(3, 20.0, 5.0)
    first.scores["standard_error"] = cheap.scores["standard_error"] = 0.5
    stopped = record(1, 1.0, 1.0, state="stopped")
    figures = StudyPage("first", STUDY, "a model", [first, stopped, better, cheap]).figures()
    best = next(trace for trace in figures["history"].data if trace.mode == "lines")
    assert [*best.y] == [9.0, 9.0, 4.0, 4.0]
    front = figures["pareto_frechet_distance"].data[-1]
    assert [(x, y, error) for x, y, error in zip(front.x, front.y, front.error_y.array, strict=True)] == [
        (5.0, 20.0, 0.98),
        (20.0, 9.0, 0.98),
        (30.0, 4.0, 0.0),
    ]
    assert [trace.y for trace in figures["reports"].data] == [(9.0,), (1.0,), (4.0,), (20.0,)]
    eta = record(4, 5.0, **{"sampler.kind": "ddim", "sampler.eta": 0.25})
    shown = StudyPage("first", STUDY, "a model", [first, better, cheap, eta]).figures()
    lines = [trace for trace in shown["parallel"].data if trace.mode == "lines"]
    assert [len(line.x) for line in lines] == [4] * 4  # what only some trials have leaves none of them out
    assert [trace.x for trace in shown["slices"].data if len(trace.x) == 1] == [(0.25,)]


def test_a_page_of_a_study_that_has_just_begun():
    assert "Study first" in StudyPage("first", STUDY, "a model", [record(1, math.nan, state="running")]).html()


def test_the_page_shows_what_the_confirmation_found_and_for_what_it_holds():
    gain = Interval(0.52, 0.21, 0.83, (64,))
    scores = {"frechet_distance": 4.0, "evaluations": 9.0}
    better = Confirmed("best", {"a": 1.5}, Sampling(), "kid", gain, scores, gain, 3.27, 0.00054, better=True)
    found = [better, replace(better, trial="lucky", z=2.0, p=0.02275, better=False)]
    found.append(Confirmed("default", {}, Sampling(), "kid", gain, scores))
    page = StudyPage("s", STUDY, "a model", [record(1, 5.0)], found, seeds={"trials": 17, "confirmation": 18})
    row = r'<tr( class="marked")?><th scope="row"><code>(\w+)</code></th>(.*?)</tr>'
    rows = re.findall(row, page.html(), re.DOTALL)[:3]
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", rest, re.DOTALL) for _, name, rest in rows}
    assert [bool(marked) for marked, *_ in rows] == [True, False, False]
    assert cells["best"][:6] == ["0.52 (0.21 to 0.83)", "0.52 (0.21 to 0.83)", "3.27", "0.00054", "yes", "4"]
    assert cells["lucky"][2:5] == ["2.00", "0.023", "no"]
    assert cells["default"][1:5] == ["\u2014"] * 4
    assert "kernel distance (95 %)" in page.html()
    assert "Noise seeds: trials 17, confirmation 18." in page.html()
    caveat = "What is compared are these trained models"
    assert caveat not in page.html()
    trained = StudyConfig.model_validate({"kind": "training", "trials": 1, "space": SPACE})
    assert caveat in StudyPage("s", trained, "data", [record(1, 5.0)], found).html()
