"""Steps of sampling recorded on a GPU and run again: hundreds of small kernels run faster than they can be started one by one.

A step is recorded for a number of rows and a reach, after a few ordinary ones of that kind, and is used where its first run gives what the
ordinary step gave. What cannot be recorded (layers that wait for numbers, such as some mixtures of experts) goes the ordinary way for ever.
Written without a GPU at hand: the bookkeeping is tested with a recorder that runs the step again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.core.log import logger
from tunesmith.model.arena_feed import ArenaTokens

PATIENCE = 8  # ordinary steps of a kind before one is recorded, which takes about as long as so many
MOST_GAP = 0.05  # mean difference of log-probabilities, as of the sampling side from the trainer's in bf16
SWITCH = "TUNESMITH_GRAPHS"  # 0 in the environment: nothing is recorded


class Recorder(Protocol):
    """Runs a step once in a way that can be run again: returns how, and where its result lies each time."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]: ...


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded step: the feed whose memory it reads, how to run it, and where its logits lie."""

    feed: ArenaTokens
    run: Callable[[], Any]
    logits: Tensor


class Graphs:
    """The recorded steps of one model's sampling. `step` gives the logits [size, V] of a feed."""

    def __init__(self, step: Callable[[ArenaTokens], Tensor], recorder: Recorder | None = None) -> None:
        self._step, self._record = step, recorder or CudaRecorder()
        self._known: dict[tuple[Any, ...], Recorded] = {}
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._place: tuple[int, int] | None = None
        self._moves = 0
        self.off = os.environ.get(SWITCH) == "0"

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget everything: weights or the arena will lie elsewhere."""
        self._known.clear()
        self._seen.clear()

    def logits(self, feed: ArenaTokens) -> Tensor:
        """The step's logits [size, V]; they may lie where the next call writes its own."""
        form = () if feed.mix is None else feed.mix.form
        if self.off or form is None:
            return self._step(feed)
        place, moves = (id(feed.arena), feed.arena.grown), form[0] if form else self._moves
        if (place, moves) != (self._place, self._moves):
            self.clear()
            self._place, self._moves = place, moves
        kind = (feed.size, feed.longest, form)
        if known := self._known.get(kind):
            known.feed.replace(feed)
            known.run()
            return known.logits
        self._seen[kind] += 1
        found = self._step(feed)
        if self._seen[kind] > PATIENCE and bool(torch.isfinite(found).all()):
            self._try(kind, feed, found)
        return found

    def _try(self, kind: tuple[Any, ...], feed: ArenaTokens, found: Tensor) -> None:
        """Record a step that has just been done, and see whether it gives the same."""
        try:
            run, logits = self._record(lambda: self._step(feed))
            run()
            gap = float((logits.log_softmax(-1) - found.log_softmax(-1)).abs().mean())
        except RuntimeError as error:
            self._give_up(f"it cannot be recorded ({' '.join(str(error).split())[:200]})")
            return
        if not gap <= MOST_GAP:  # written so that NaN is refused
            self._give_up(f"run again it changes log-probabilities by {gap:.1e}")
            return
        self._known[kind] = Recorded(feed, run, logits)

    def _give_up(self, why: str) -> None:
        self.off = True
        self.clear()
        logger.info("steps of sampling are not recorded: %s", why)


class CudaRecorder:
    """CUDA graphs that share their memory: one runs at a time, and its logits are read before the next."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step()
        return graph.replay, logits
