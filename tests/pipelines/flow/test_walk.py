"""The walk: what runs, what is skipped and why, by results alone; and a preview that leaves no trace."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import ConfigError, compose
from pipelines.flow import GRAPH, Results, Site, Stage, StageSpec, StageStatus, select
from pipelines.flow.graph import stages
from pipelines.flow.stage import independent
from pipelines.flow.walk import preview, walk
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Silent
from pipelines.storage import NotFoundError, Storage, join

STORAGE = Storage()
NAMES = [spec.name for spec in GRAPH]


@dataclass(frozen=True)
class Written(Stage[str]):
    """A stage whose result is a file with the digest of its inputs, and of a source where it needs nothing."""

    spec: StageSpec  # type: ignore[misc]
    ran: list[str] = field(default_factory=list)
    checked: list[tuple[str, str]] = field(default_factory=list)
    aside: bool = False
    room: bool = False
    fills: bool = False
    work: Callable[[], object] = bool

    @property
    def on_ray(self):  # type: ignore[override]
        return self.aside

    @property
    def output(self) -> str:
        return join(self.config.storage.root, self.spec.gives)

    def inputs(self, site, given):
        needed = {name: getattr(given, name) for name in self.spec.needs}
        return needed or {"source": site.storage.read(join(self.config.storage.root, "source")).decode()}

    def content(self, inputs):
        return hashlib.sha256(repr(sorted(inputs.items())).encode()).hexdigest()

    def check(self, site, given):
        self.checked.append((self.name, "dataset" if given.dataset else "nothing"))

    def done(self, site, given, inputs):
        try:
            stored = site.storage.read(self.output).decode()
        except NotFoundError:
            return StageStatus(None, "there is none")
        return (
            StageStatus(stored, "there it is")
            if stored == self.content(inputs)
            else StageStatus(None, "it is of other inputs")
        )

    def fills_time(self, site):
        return self.fills

    def has_room(self, site):
        assert self.on_ray
        return self.room

    def run(self, site, given):
        self.ran.append(self.name)
        self.work()
        content = self.content(self.inputs(site, given))
        site.storage.write(self.output, content.encode())
        return content


class World:
    """A storage root with a source, and the stages of the graph on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = compose(["+experiment=digits", "storage=file", f"storage.root=file://{folder}"])
        self.ran: list[str] = []
        self.checked: list[tuple[str, str]] = []
        self.stages = tuple(Written(spec, config, self.ran, self.checked) for spec in GRAPH)
        self.site = Site(STORAGE, {}, Silent())
        self.change("first")

    def change(self, source: str) -> None:
        (self.folder / "source").write_text(source)

    def remove(self, *results: str) -> None:
        for name in results:
            (self.folder / name).unlink()

    def walk(self, first=None, last=None) -> list[str]:
        self.ran.clear()
        result = walk(self.stages, self.site, first, last)
        assert list(result.ran) == self.ran
        return list(result.ran)

    def files(self) -> dict[str, tuple[bytes, int]]:
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in self.folder.rglob("*")}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_every_stage_comes_after_what_it_needs_and_gives_a_result_of_its_own():
    there = set()
    for spec in GRAPH:
        assert set(spec.needs) <= there
        assert spec.gives not in there
        assert hasattr(Results(), spec.gives)
        there.add(spec.gives)


def test_the_stages_of_a_configuration_have_the_places_of_the_graph():
    config = compose(["+experiment=digits"])
    assert tuple(stage.spec for stage in stages(config)) == GRAPH
    assert [stage.output for stage in stages(config)] == [
        "s3://ddpm/datasets/digits",
        "s3://ddpm/runs/digits",
        "s3://ddpm/datasets/digits/evaluator",
        "None, run 'digits', evaluation/",
        "models:/digits",
        "models:/digits@champion",
    ]


def test_a_second_walk_runs_nothing_and_gives_the_same(world):
    first = walk(world.stages, world.site)
    again = walk(world.stages, world.site)
    assert first.ran == tuple(NAMES)
    assert (again.ran, list(again.skipped), again.results) == ((), NAMES, first.results)
    assert set(again.skipped.values()) == {"there it is"}


@given(lost=st.sets(st.sampled_from([spec.gives for spec in GRAPH])), first=st.sampled_from(NAMES))
def test_what_is_lost_and_nothing_else_is_made_again(tmp_path_factory, lost, first):
    world = World(tmp_path_factory.mktemp("walk"))
    world.walk()
    before = world.files()
    world.remove(*lost)
    expected = [spec.name for spec in GRAPH if spec.gives in lost]
    needed = [name for name in expected if NAMES.index(name) < NAMES.index(first)]
    if needed:
        with pytest.raises(ConfigError, match=f"the result of {needed[0]}, which comes before, is not there"):
            world.walk(first)
        assert world.ran == []
    else:
        assert world.walk(first) == expected
    assert world.walk() == ([] if not needed else expected)
    assert {path: content for path, (content, _) in world.files().items()} == {
        path: content for path, (content, _) in before.items()
    }


def test_another_source_makes_everything_that_depends_on_it_again(world):
    world.walk()
    world.change("second")
    with pytest.raises(ConfigError, match=r"ingest.*it is of other inputs.*--from ingest"):
        world.walk("train")
    assert world.walk() == NAMES
    world.change("first")
    assert world.walk() == NAMES  # a result has one place, and the first one's was written over


@given(first=st.sampled_from([None, *NAMES]), last=st.sampled_from([None, *NAMES]))
def test_from_and_until_choose_a_part_of_the_order(first, last):
    start, end = NAMES.index(first or NAMES[0]), NAMES.index(last or NAMES[-1])
    if end < start:
        with pytest.raises(ConfigError, match=f"{last} comes before {first}"):
            select(GRAPH, first, last)
        return
    before, chosen = select(GRAPH, first, last)
    assert (*before, *chosen) == GRAPH[: end + 1]
    assert [spec.name for spec in chosen] == NAMES[start : end + 1]


def test_until_leaves_the_rest_for_later(world):
    assert world.walk(last="evaluate") == NAMES[:4]
    assert not (world.folder / "version").exists()
    assert world.walk("register") == NAMES[4:]


def test_one_stage_asks_for_what_it_needs_and_not_for_what_merely_comes_before(world):
    world.walk(last="ingest")
    assert world.walk("evaluator", "evaluator") == ["evaluator"]  # as an orchestrator may, before the training
    with pytest.raises(ConfigError, match="the result of train, which comes before, is not there"):
        world.walk("evaluate", "evaluate")
    assert world.walk("train", "train") == ["train"]
    assert world.walk("evaluate", "evaluate") == ["evaluate"]
    world.remove("dataset")
    with pytest.raises(ConfigError, match="the result of ingest, which comes before, is not there"):
        world.walk("gate", "gate")


@pytest.mark.parametrize("option, span", [("--from", ("learn", None)), ("--until", (None, "learn"))])
def test_a_stage_that_does_not_exist_is_named_with_those_that_do(world, option, span):
    with pytest.raises(
        ConfigError, match=f"{option} learn: there is no such stage. Allowed: {', '.join(NAMES)}"
    ) as error:
        walk(world.stages, world.site, *span)
    assert error.value.exit_code == 2


def test_later_stages_are_checked_before_one_runs_and_never_where_nothing_does(world):
    world.walk(last="train")
    assert world.checked == [
        ("ingest", "nothing"),
        ("train", "nothing"),
        ("train", "dataset"),
    ]
    world.checked.clear()
    world.walk(last="train")
    assert world.checked == []


def test_a_preview_says_what_a_walk_does_and_leaves_no_trace(world):
    world.walk(last="train")
    before = world.files()
    found = preview(world.stages, world.site)
    assert [(stage.name, stage.runs, stage.reason) for stage in found] == [
        ("ingest", False, "there it is"),
        ("train", False, "there it is"),
        ("evaluator", True, "there is none"),
        ("evaluate", True, "it is made from the evaluator, which is not there yet"),
        ("register", True, "it is made from the evaluation, which is not there yet"),
        ("gate", True, "it is made from the version, which is not there yet"),
    ]
    assert found[1].inputs == {"dataset": (world.folder / "dataset").read_text()}
    assert found[4].inputs == {}
    assert world.files() == before
    assert [stage.name for stage in preview(world.stages, world.site, "train", "evaluate")] == NAMES[1:4]
    world.remove("run")
    with pytest.raises(ConfigError, match="the result of train, which comes before, is not there: there is none"):
        preview(world.stages, world.site, "evaluate")


def test_a_preview_of_the_real_stages_starts_and_writes_nothing(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(b"")
    config = compose(
        [
            *("data=folder", "model=unet_small", "data.num_classes=1", "data.image_size=8", "storage=file"),
            *(f"storage.root=file://{tmp_path}/root", f"data.source={tmp_path}/photos"),
            *(f"data.uri=file://{tmp_path}/ds", "tracking.uri=http://127.0.0.1:9"),
        ]
    )
    before = sorted(tmp_path.rglob("*"))
    found = preview(stages(config), Site(STORAGE, {}, Silent()))
    assert [stage.runs for stage in found] == [True] * 6
    assert found[0].reason == f"file://{tmp_path}/ds holds no dataset that a flow has finished"
    assert len(found[0].inputs["source"]) == 64
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_that_cannot_be_written_ends_a_walk_before_anything_runs(world, tmp_path):
    (tmp_path / "file").write_text("")
    config = compose(["+experiment=digits", "storage=file", f"storage.root=file://{tmp_path}/file/below"])
    with pytest.raises(PipelineError):
        walk([Written(GRAPH[0], config, world.ran)], world.site)
    assert world.ran == []


# --- side by side ---


def of(world: World, **parts: dict[str, object]) -> tuple[Written, ...]:
    """Return the stages of a world, some of them with other fields."""
    return tuple(replace(stage, **parts.get(stage.name, {})) for stage in world.stages)


def test_stages_of_which_neither_needs_the_other_are_independent():
    pairs = {(a.name, b.name) for a in GRAPH for b in GRAPH if independent(a, b)}
    assert pairs == {("train", "evaluator"), ("evaluator", "train")}


def test_independent_stages_run_side_by_side_where_there_is_room(world):
    meeting, threads = threading.Barrier(2, timeout=20), {}

    def meet(name):
        threads[name] = threading.current_thread()
        meeting.wait()  # which only both together pass

    train, evaluator = {"work": lambda: meet("train")}, {"work": lambda: meet("evaluator")}
    result = walk(of(world, train=train, evaluator={**evaluator, "aside": True, "room": True}), world.site)
    assert result.ran == tuple(NAMES)
    assert result.results == walk(world.stages, world.site).results
    assert threads["train"] is threading.main_thread()  # it has the signals
    assert threads["evaluator"] is not threading.main_thread()


@pytest.mark.parametrize("aside", [{"aside": True, "room": False}, {"aside": False, "room": True}])
def test_without_room_for_both_and_without_ray_they_run_one_after_another(world, aside):
    at_work = []

    def alone():
        assert threading.current_thread() is threading.main_thread()
        at_work.append(len(world.ran))

    aside = {**aside, "work": alone}
    assert walk(of(world, train={"work": alone}, evaluator=aside), world.site).ran == tuple(NAMES)
    assert (world.ran, at_work) == (NAMES, [2, 3])


def test_a_stage_that_fills_the_time_comes_after_one_that_cannot_run_beside_it(world):
    begun: list[str] = []
    parts: dict[str, dict[str, object]] = {name: {"work": lambda name=name: begun.append(name)} for name in NAMES}
    parts["train"] |= {"fills": True}
    parts["evaluator"] |= {"aside": True}
    assert walk(of(world, **parts), world.site).ran == tuple(NAMES)
    assert begun == ["ingest", "evaluator", "train", *NAMES[3:]]


def test_a_stage_that_fills_the_time_runs_beside_one_for_which_there_is_room(world):
    meeting = threading.Barrier(2, timeout=20)
    train, evaluator = {"fills": True, "work": meeting.wait}, {"aside": True, "room": True, "work": meeting.wait}
    assert walk(of(world, train=train, evaluator=evaluator), world.site).ran == tuple(NAMES)


def fails(name: str, after: threading.Event | None = None, then: threading.Event | None = None):
    def fail():
        assert after is None or after.wait(20)
        if then is not None:
            then.set()
        raise PipelineError(f"{name} has failed")

    return fail


@pytest.mark.parametrize("failing, other", [("train", "evaluator"), ("evaluator", "train")])
def test_a_stage_that_fails_leaves_the_other_at_work_and_its_error_comes_after_that(world, failing, other):
    began, failed, finished = (threading.Event() for _ in range(3))

    def work():
        began.set()
        assert failed.wait(20)
        threading.Event().wait(0.05)
        finished.set()

    parts = {failing: {"work": fails(failing, began, failed)}, other: {"work": work}}
    parts["evaluator"] |= {"aside": True, "room": True}
    with pytest.raises(PipelineError, match=f"{failing} has failed"):
        walk(of(world, **parts), world.site)
    assert finished.is_set()
    assert sorted(world.ran) == ["evaluator", "ingest", "train"]  # and nothing after them
    world.ran.clear()
    assert walk(world.stages, world.site).ran == (failing, "evaluate", "register", "gate")


def test_of_two_errors_one_is_raised_and_the_other_is_shown(world):
    class Lines(Silent):
        said: list[str] = []

        def stage(self, name, text):
            self.said.append(f"{name}  {text}")

    failed = threading.Event()
    parts = {
        "train": {"work": fails("train", then=failed)},
        "evaluator": {"work": fails("evaluator", after=failed), "aside": True, "room": True},
    }
    with pytest.raises(PipelineError, match="train has failed"):
        walk(of(world, **parts), Site(STORAGE, {}, Lines()))
    assert Lines.said == ["evaluator  beside train", "failed  evaluator has failed"]


def test_a_preview_names_what_runs_side_by_side(world):
    stages = of(world, evaluator={"aside": True})
    beside = {row.name: row.beside for row in preview(stages, world.site) if row.beside}
    assert beside == {"train": ("evaluator",), "evaluator": ("train",)}
    walk(stages, world.site, last="train")
    assert not any(row.beside for row in preview(stages, world.site))
    assert not any(row.beside for row in preview(world.stages, world.site))
