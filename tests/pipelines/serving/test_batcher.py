"""Which requests are drawn together, and what each of them gets."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ddpm.generate import Sampling
from ddpm.inference import Drawing, Drawn, Noise
from pipelines.serving.batcher import Batcher, Waiting, next_batch

SLOW = Sampling.of(steps=9)
QUICK = Sampling.of(steps=3)


def drawing(seed: int, count: int = 1, sampling: Sampling = SLOW) -> Drawing:
    return Drawing(Noise.numbered(seed, count), sampling)


def waiting(*asked: Drawing, arrived: float = 0.0) -> list[Waiting]:
    return [Waiting(each, arrived, None) for each in asked]


def seeds(batch: list[Waiting]) -> list[int]:
    return [int(each.drawing.noise.seeds[0]) for each in batch]


class Recorder:
    """Draws pictures that are their seed and number, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, joined: Drawing) -> Drawn:
        assert self.go.wait(5)
        self.batches.append(joined.noise.seeds.tolist())
        if 666 in self.batches[-1]:
            raise RuntimeError("out of memory")
        return Drawn((joined.noise.seeds * 100 + joined.noise.ids).reshape(-1, 1, 1, 1).float())


def run(scenario, *, batch_size: int = 8, wait_s: float = 0.05):
    """Run a scenario of a batcher; return what it drew in which batches."""
    recorder = Recorder()

    async def main():
        with ThreadPoolExecutor(1) as executor:
            await asyncio.wait_for(scenario(Batcher(recorder, executor, batch_size, wait_s), recorder), 10)

    asyncio.run(main())
    return recorder.batches


def test_only_equal_settings_are_a_batch_in_order_of_arrival():
    queue = waiting(drawing(1), drawing(2, sampling=QUICK), drawing(3), drawing(4, sampling=QUICK))
    batch, _ = next_batch(queue, 1.0, batch_size=8, wait_s=0.5)
    assert seeds(batch) == [1, 3]
    assert seeds(next_batch([q for q in queue if q not in batch], 1.0, batch_size=8, wait_s=0.5)[0]) == [2, 4]


def test_a_batch_is_due_when_it_is_full_or_has_waited():
    queue = waiting(drawing(1, 3), arrived=10.0)
    assert next_batch(queue, 10.4, batch_size=4, wait_s=0.5) == ([], 10.5)
    assert seeds(next_batch(queue, 10.5, batch_size=4, wait_s=0.5)[0]) == [1]
    assert seeds(next_batch([*queue, *waiting(drawing(2), arrived=10.1)], 10.1, batch_size=4, wait_s=0.5)[0]) == [1, 2]
    assert next_batch([], 0.0, batch_size=4, wait_s=0.5) == ([], None)


def test_a_full_batch_of_others_does_not_wait_and_one_that_has_waited_goes_first():
    lone = waiting(drawing(1, sampling=QUICK), arrived=0.0)
    full = waiting(drawing(2, 4), arrived=0.1)
    assert seeds(next_batch([*lone, *full], 0.2, batch_size=4, wait_s=0.5)[0]) == [2]
    assert seeds(next_batch([*lone, *full], 0.5, batch_size=4, wait_s=0.5)[0]) == [1]


def test_a_request_that_does_not_fit_is_not_overtaken_by_smaller_ones():
    queue = waiting(drawing(1, 3), drawing(2, 3), drawing(3, 1))
    assert seeds(next_batch(queue, 0.0, batch_size=4, wait_s=9)[0]) == [1]
    assert seeds(next_batch(queue[1:], 0.0, batch_size=4, wait_s=9)[0]) == [2, 3]
    assert seeds(next_batch(waiting(drawing(7, 20)), 0.0, batch_size=4, wait_s=9)[0]) == [7]


def test_concurrent_requests_share_batches_and_each_gets_its_own_pictures():
    async def scenario(batcher, recorder):
        asked = [drawing(seed, 1 + seed % 3, QUICK if seed % 2 else SLOW) for seed in range(20)]
        shares = await asyncio.gather(*(batcher(each) for each in asked))
        for each, share in zip(asked, shares, strict=True):
            wanted = each.noise.seeds * 100 + each.noise.ids
            assert torch.equal(share.drawn.images.flatten(), wanted.float())
            assert share.batch.pictures <= 8
        assert sum(share.first for share in shares) == len(recorder.batches)
        assert sum(share.batch.pictures for share in shares if share.first) == sum(map(len, asked))

    batches = run(scenario)
    assert len(batches) < 10
    assert all(len({seed % 2 for seed in batch}) == 1 for batch in batches)


def test_a_request_waits_no_longer_than_the_batch_wait_for_others():
    async def scenario(batcher, recorder):
        share = await batcher(drawing(1))
        assert 0.05 <= share.batch.waited_s < 1

    run(scenario)


def test_requests_gather_while_the_network_is_busy():
    async def scenario(batcher, recorder):
        recorder.go.clear()
        first = asyncio.create_task(batcher(drawing(0)))
        await asyncio.sleep(0.1)
        rest = [asyncio.create_task(batcher(drawing(seed))) for seed in range(1, 6)]
        await asyncio.sleep(0.1)
        recorder.go.set()
        await asyncio.gather(first, *rest)

    assert run(scenario) == [[0], [1, 2, 3, 4, 5]]


def test_a_cancelled_request_is_not_drawn_and_takes_nobody_with_it():
    async def scenario(batcher, recorder):
        gone, stays = (asyncio.create_task(batcher(drawing(seed))) for seed in (1, 2))
        await asyncio.sleep(0.01)
        gone.cancel()
        share = await stays
        assert share.drawn.images.flatten().tolist() == [200]
        assert share.batch.requests == 1
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.waiting == 0

        recorder.go.clear()
        gone, stays = (asyncio.create_task(batcher(drawing(seed))) for seed in (3, 4))
        await asyncio.sleep(0.1)  # their batch is being drawn
        gone.cancel()
        recorder.go.set()
        assert (await stays).drawn.images.flatten().tolist() == [400]

    assert run(scenario) == [[2], [3, 4]]


def test_a_request_that_fails_its_batch_fails_alone():
    async def scenario(batcher, recorder):
        asked = [asyncio.create_task(batcher(drawing(seed))) for seed in (1, 666, 3)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert [done[i].drawn.images.flatten().tolist() for i in (0, 2)] == [[100], [300]]
        assert str(done[1]) == "out of memory"
        assert (await batcher(drawing(5))).drawn.images.flatten().tolist() == [500]

    run(scenario)
