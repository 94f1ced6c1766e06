"""Copies of the newest state in the memory of the nodes, made and found again by all ranks together.

Each rank writes its part on its own node, and sends it to a rank of the next one. So a restart after the loss of a
process, or of one node, reads nothing from the store. A new copy is made before the one before it is deleted, and what
all ranks can have is agreed on before anything is read.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.checkpoints import Checkpoint, CheckpointState, Listed
from pipelines.checkpoints.local import LocalPart, NodeFolder, whole_state
from pipelines.checkpoints.parts import Part, PartsIndex, TensorRows
from pipelines.storage import layout
from pipelines.tracking import RunLog
from pipelines.training.loop.collectives import all_gather_objects, held_rows
from pipelines.training.loop.context import RunContext

logger = logging.getLogger(__name__)


def receivers(nodes: Sequence[str]) -> list[int | None]:
    """Return for each rank the rank on the next node that keeps its part too; None where there is one node.

    Args:
        nodes: the node of each rank.

    Examples:
        >>> receivers(["a", "a", "b", "b", "c"])
        [2, 3, 4, 4, 0]
    """
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, node in enumerate(nodes):
        ranks[node].append(rank)
    if len(ranks) == 1:
        return [None] * len(nodes)
    order = list(ranks)
    following = {node: ranks[order[(i + 1) % len(order)]] for i, node in enumerate(order)}
    return [following[node][ranks[node].index(rank) % len(following[node])] for rank, node in enumerate(nodes)]


class LocalCopies:
    """Makes copies while training goes on, in a thread, and finds those of an earlier attempt; of every rank.

    Args:
        log: rank 0's log, whose unsent metrics go into each copy; None on the other ranks.
    """

    def __init__(self, context: RunContext, log: RunLog | None) -> None:
        self.context, self.log, self.rank = context, log, context.rank
        self.node = NodeFolder(context.job.run_uri, context.job.tracker.run_id)
        self._nodes: list[str] = all_gather_objects(self.node.node_id())
        self._receivers = receivers(self._nodes)
        self._group = dist.new_group(backend="gloo") if context.world_size > 1 else None
        self._thread = ThreadPoolExecutor(1, "local-copies")
        self._running: Future[None] | None = None
        self._newest: str | None = None

    def keep(self, name: str, checkpoint: Checkpoint, rows: Sequence[TensorRows]) -> None:
        """Copy rows that have been staged, in the background, once the copy before is complete.

        Args:
            checkpoint: what is written beside them.
            rows: this rank's, as `written_rows` returns them.

        Raises:
            Exception: what kept the copy before from being made; a full node is a warning.
        """
        self.finish()
        self._running = self._thread.submit(self._keep, name, checkpoint, rows)

    def finish(self) -> None:
        """Wait until the newest copy is complete on this rank."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def close(self) -> None:
        """Let the thread end after its copy, without waiting for it."""
        self._thread.shutdown(wait=False)

    def delete(self) -> None:
        """Delete the copies on all nodes, when the run has ended and is stored; called by every rank."""
        self.finish()
        all_gather_objects(None)  # nobody writes any more
        self.node.delete()

    def _keep(self, name: str, checkpoint: Checkpoint, rows: Sequence[TensorRows]) -> None:
        part, listed = Part.of(self.rank, rows), Listed(self.context.job.epoch, checkpoint.images_seen, name)
        unsent = self.log.pack() if self.log else None
        state = checkpoint.state({}, {})
        record = LocalPart(listed, self.rank, self.context.world_size, part.size, part.index, state, unsent)
        text = record.to_json()
        # All ranks come by here: the copy before is complete on each of them, and older ones are of no more use.
        sizes = all_gather_objects(len(text), self._group)
        self.node.keep_only([name, *([self._newest] if self._newest else [])])
        self._newest = name
        receiver = self._receivers[self.rank]
        sends = [] if receiver is None else self._send([text, *part.buffers], receiver)
        self._write(record, iter(part.buffers))
        for sender in [rank for rank, to in enumerate(self._receivers) if to == self.rank]:
            received = LocalPart.from_json(self._receive(sizes[sender], sender), f"the record of rank {sender}")
            self._write(received, self._received(received, sender))
        for send in sends:
            send.wait()

    def _write(self, record: LocalPart, buffers: Iterator[bytes | memoryview]) -> None:
        """Write a part and its record on this node; where it is full, the copy is lost, and training goes on."""
        try:
            self.node.write(record.listed.name, layout.part_file(record.rank), buffers)
            self.node.record(record)
        except OSError as error:
            logger.warning("no local copy at %s images: %s", f"{record.listed.images_seen:,}", error)
            for _ in buffers:  # the rest is on its way
                pass

    def _send(self, buffers: Iterable[bytes | memoryview], to: int) -> list[dist.Work]:
        writable = [bytearray(b) if memoryview(b).readonly else b for b in buffers if len(b)]
        messages = [torch.frombuffer(buffer, dtype=torch.uint8) for buffer in writable]
        works = [dist.isend(message, to, self._group) for message in messages]
        return [work for work in works if work is not None]

    def _receive(self, size: int, sender: int) -> bytes:
        message = torch.empty(size, dtype=torch.uint8)
        dist.recv(message, sender, self._group)
        return message.numpy().tobytes()

    def _received(self, record: LocalPart, sender: int) -> Iterator[bytes]:
        """Yield what comes of a part, in the messages that `_send` makes of it."""
        for start, stop in _spans(record):
            yield self._receive(stop - start, sender)

    def found(
        self, tensors: Mapping[str, Tensor], stored: Listed | None
    ) -> Iterator[tuple[Listed, str, CheckpointState]]:
        """Yield the copies that are whole on all nodes together, newest first; called by every rank.

        Before one is yielded, each node has got the parts from which its ranks read.

        Args:
            tensors: those that are to be read, whole or DTensors.
            stored: the newest checkpoint of the store, if any: older copies are left out.

        Yields:
            (what it would be in the list of checkpoints, its address on this node, its state).
        """
        first_on_node = self._nodes.index(self._nodes[self.rank]) == self.rank
        here = {(part.listed, part.rank): part for part in (self.node.parts() if first_on_node else [])}
        holders: dict[Listed, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        ranks: dict[Listed, int] = {}
        for holder, there in enumerate(all_gather_objects([(*key, part.ranks) for key, part in here.items()])):
            for listed, part, count in there:
                holders[listed][part].append(holder)
                ranks[listed] = count
        for listed in sorted(holders, reverse=True):
            if stored is not None and (listed.epoch, listed.images_seen) < (stored.epoch, stored.images_seen):
                return
            if len(holders[listed]) == ranks[listed]:
                mine = {part: here.get((listed, part)) for part in holders[listed]}
                self._newest = listed.name
                yield listed, *self._collect(listed.name, mine, holders[listed], tensors)

    def _collect(
        self,
        name: str,
        here: Mapping[int, LocalPart | None],
        holders: Mapping[int, list[int]],
        tensors: Mapping[str, Tensor],
    ) -> tuple[str, CheckpointState]:
        """Bring the parts of a copy to the nodes that need them, and return its address on this node and its state.

        Args:
            here: the records that this rank has, by part.
            holders: the ranks that have a part, by part.
        """
        own = [record for part, record in here.items() if record is not None and holders[part][0] == self.rank]
        records = {record.rank: record for some in all_gather_objects(own) for record in some}
        index = PartsIndex.joined([records[part].index for part in sorted(records)], name)
        for part, sender, receiver in self._moves(_needed(index, tensors), holders):
            file = layout.part_file(part)
            if self.rank == sender:
                stored = np.memmap(self.node.folder(name) / file, np.uint8, "c")
                buffers = [stored[start:stop].data for start, stop in _spans(records[part])]
                for send in self._send(buffers, receiver):
                    send.wait()
            elif self.rank == receiver:
                self.node.write(name, file, self._received(records[part], sender))
        state = whole_state(records.values(), index)
        self.node.write(name, layout.PARTS_INDEX, [index.to_json()])
        if (unsent := records[0].unsent) is not None:
            self.node.write(name, layout.UNSENT, [unsent])
        all_gather_objects(None)  # what others on this node have brought is there
        return f"file://{self.node.folder(name)}", state

    def _moves(self, needed: set[int], holders: Mapping[int, list[int]]) -> list[tuple[int, int, int]]:
        """Return (part, rank that sends it, rank that receives it) for each node that needs a part and has it not.

        Args:
            needed: the parts from which this rank reads.
        """
        wanted: dict[str, set[int]] = defaultdict(set)
        for node, parts in zip(self._nodes, all_gather_objects(needed), strict=True):
            wanted[node] |= parts
        return [
            (part, holders[part][0], self._nodes.index(node))
            for node, parts in wanted.items()
            for part in sorted(parts)
            if node not in {self._nodes[holder] for holder in holders[part]}
        ]


def _spans(record: LocalPart) -> list[tuple[int, int]]:
    """Return the bytes (start, stop) of each buffer of a part that is not empty: its header, then each chunk."""
    chunks = sorted((c.start, c.stop) for t in record.index.tensors.values() for c in t.chunks if c.start < c.stop)
    return [(0, chunks[0][0] if chunks else record.size), *chunks]


def _needed(index: PartsIndex, tensors: Mapping[str, Tensor]) -> set[int]:
    """Return the parts with rows that this rank holds."""
    found = set()
    for rows in held_rows(tensors):
        chunks = index.tensors[rows.name].chunks if rows.name in index.tensors else ()
        found |= {c.part for c in chunks if c.first < rows.first + len(rows) and rows.first < c.first + c.rows}
    return found
