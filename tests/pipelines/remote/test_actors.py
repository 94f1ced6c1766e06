"""Work that actors share is done to its end, whatever becomes of any of them."""

import time
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayActorError

from pipelines.remote.actors import LOOK_EVERY_S, ActorPool, PooledActor


class Actors:
    """Actors whose calls are done at once, but for the losses of a test."""

    def __init__(self, monkeypatch, losses):
        self.started, self.losses = 0, losses  # number of the actor -> calls that it answers before it is lost
        monkeypatch.setattr(ray, "remote", lambda kind: self)
        monkeypatch.setattr(ray, "wait", lambda refs, num_returns=1, timeout=None: (refs[:1], refs[1:]))
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(ray, "kill", lambda actor: None)

    def options(self, **_):
        return self

    def remote(self, *_):
        self.started += 1
        return Actor(self.started)

    def get(self, ref):
        number, answer, ready = ref
        if not ready:
            self.losses[number] = self.losses.get(number, 100) - 1
            if self.losses[number] < 0:
                raise RayActorError
        return answer


class Actor:
    def __init__(self, number):
        self.number = number
        self.finished = 0
        self.ready = SimpleNamespace(remote=lambda: (number, self.finished, True))
        self.call = SimpleNamespace(remote=lambda method, unit: (number, unit.upper(), False))


PATIENCE_S = 300.0


def answers(count, words, said=None):
    """What a pool gives for words, in order."""
    notice = print if said is None else said.append
    with ActorPool(PooledActor, (), {"CPU": 1.0}, count, PATIENCE_S, notice) as actors:
        return sorted(actors.map("draw", [(word,) for word in words]))


def test_the_work_of_a_lost_actor_is_done_by_another(monkeypatch):
    actors = Actors(monkeypatch, {1: 1, 2: 0})
    assert answers(2, "abcde") == list(enumerate("ABCDE"))
    assert actors.started == 4


def test_the_work_is_given_up_where_every_actor_is_lost(monkeypatch):
    Actors(monkeypatch, dict.fromkeys(range(100), 0))
    with pytest.raises(RayActorError):
        answers(2, "ab")


class Silent(Actors):
    """Actors of which the first one stands still as soon as it is asked to draw, until it is ended."""

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch, {})
        self.now, self.ended, self.drawing = 0.0, [], False
        monkeypatch.setattr(ray, "wait", self.wait)
        monkeypatch.setattr(ray, "kill", lambda actor: self.ended.append((actor.number, self.now)))
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, refs, num_returns=1, timeout=None):
        def answers(ref):
            number, _, ready = ref
            self.drawing |= number == 1 and not ready
            return number != 1 or not self.drawing or bool(self.ended)

        done = [ref for ref in refs if answers(ref)]
        if not done:
            self.now += timeout
        return done[:1], [ref for ref in refs if ref not in done[:1]]

    def get(self, ref):
        if self.ended and ref[0] == 1:
            raise RayActorError
        return ref[1]


def test_an_actor_that_hangs_is_named_and_ended_and_its_work_done_by_another(monkeypatch):
    actors, said = Silent(monkeypatch), []
    assert answers(2, "abcde", said) == list(enumerate("ABCDE"))
    number, at = actors.ended[0]  # before all of them are, at the end of the work
    assert number == 1
    assert PATIENCE_S <= at <= PATIENCE_S + 3 * LOOK_EVERY_S
    assert len(said) == 1
    assert "has not answered for" in said[0]


class Kept(Silent):
    """Actors of which the first one has finished its call and answers, and whose result does not come."""

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.made = []

    def remote(self, *_):
        self.made.append(super().remote())
        return self.made[-1]

    def wait(self, refs, num_returns=1, timeout=None):
        if not self.ended and any(ref[0] == 1 and not ref[2] for ref in refs):
            self.made[0].finished = 1
            done = [ref for ref in refs if ref[0] != 1]
        else:
            done = refs
        if not done:
            self.now += timeout
        return done[:1], [ref for ref in refs if ref not in done[:1]]


def test_an_actor_that_works_for_long_is_waited_for_and_one_whose_result_does_not_come_is_ended(monkeypatch):
    actors, said = Kept(monkeypatch), []
    assert answers(2, "abcde", said) == list(enumerate("ABCDE"))
    number, at = actors.ended[0]
    assert number == 1
    assert PATIENCE_S <= at <= PATIENCE_S + 3 * LOOK_EVERY_S
    assert "or its result has not come" in said[0]


def test_an_actor_that_waits_for_an_object_does_not_count_as_working(monkeypatch):
    answers = []

    class Fetching(PooledActor):
        def take(self, reference):
            answers.append(self.ready())
            found = self.fetch(reference)
            answers.append(self.ready())
            return found

    actor = Fetching()

    def get(reference):
        answers.append(actor.ready())
        if reference == "lost":
            raise KeyError(reference)
        return reference

    monkeypatch.setattr(ray, "get", get)
    assert actor.call("take", "model") == "model"
    assert answers == [0, 1, 0]  # working, waiting, working
    assert actor.ready() == 1
    with pytest.raises(KeyError):
        actor.call("take", "lost")
    assert actor.ready() == 2  # and not three
