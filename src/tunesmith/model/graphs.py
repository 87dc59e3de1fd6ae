"""Steps of sampling recorded on a GPU and run again: hundreds of small kernels run faster than they can be started one by one.

A step is recorded for a number of rows and a reach, after some ordinary ones of that kind, and is used where what it gives, run again and
with other numbers, is what the ordinary step gives. What cannot be recorded (layers that wait for numbers, such as some mixtures of
experts) goes the ordinary way for ever.
Written without a GPU at hand: the bookkeeping is tested with a recorder that runs the step again.
"""

from __future__ import annotations

import contextlib
import gc
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
LATER = 1000  # steps of a kind before it is tried again, when memory was short
MOST_GAP = 0.05  # mean difference of a row's log-probabilities, as of the sampling side from the trainer's in bf16
SWITCH = "TUNESMITH_GRAPHS"  # 0 in the environment: nothing is recorded


class Recorder(Protocol):
    """Runs a step once in a way that can be run again."""

    def __call__(self, step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        """How to run it again."""

    def forget(self) -> None:
        """Nothing that was recorded is run again."""


@dataclass(slots=True)
class Recorded:
    """A recorded step: the feed whose memory it reads, how to run it, where its logits lie, and whether other numbers have been tried."""

    feed: ArenaTokens
    run: Callable[[], Any]
    logits: Tensor
    proven: bool = False


class Graphs:
    """The recorded steps of one model's sampling. `step` gives the logits [size, V] of a feed; `off`: nothing is recorded."""

    def __init__(self, step: Callable[[ArenaTokens], Tensor], *, off: bool = False) -> None:
        self._step = step
        self._record: Recorder = CudaRecorder()
        self._known: dict[tuple[Any, ...], Recorded] = {}
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._place: tuple[int, int] | None = None
        self._moves = 0
        self._room: Tensor | None = None  # for the logits of all recorded steps: each is read before the next is run
        self.off = off or os.environ.get(SWITCH) == "0"

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget everything: weights or the arena will lie elsewhere."""
        self._known.clear()
        self._seen.clear()
        self._room = None
        self._record.forget()

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
        if (known := self._known.get(kind)) and known.proven:
            known.feed.replace(feed)
            known.run()
            return known.logits
        found = self._step(feed)
        self._seen[kind] += 1
        if known is not None:
            known.feed.replace(feed)
            self._prove(known, len(feed.rows), found)
        elif self._seen[kind] > PATIENCE and bool(torch.isfinite(found).all()):
            self._try(kind, feed, found)
        return found

    def _try(self, kind: tuple[Any, ...], feed: ArenaTokens, found: Tensor) -> None:
        """Record a step that has just been done."""
        try:
            if self._room is None or len(self._room) < len(found):
                self._room = torch.empty_like(found)
            logits = self._room.narrow(0, 0, len(found))
            known = Recorded(feed, self._record(lambda: logits.copy_(self._step(feed)), feed.device), logits)
            if self._agrees(known, len(feed.rows), found):
                self._known[kind] = known
        except torch.OutOfMemoryError:
            self.clear()
            self._seen[kind] = -LATER
        except RuntimeError as error:
            self._give_up(f"it cannot be recorded ({' '.join(str(error).split())[:200]})")

    def _prove(self, known: Recorded, rows: int, found: Tensor) -> None:
        """A second look, with numbers that came after the recording: what was written down then and not read would show."""
        known.proven = bool(torch.isfinite(found).all()) and self._agrees(known, rows, found)

    def _agrees(self, known: Recorded, rows: int, found: Tensor) -> bool:
        """Whether the recorded step gives these rows what the ordinary one did; gives up where it does not."""
        known.run()
        gap = (known.logits.log_softmax(-1) - found.log_softmax(-1)).abs().mean(-1).narrow(0, 0, rows).amax().item()
        if gap <= MOST_GAP:  # written so that NaN is refused
            return True
        self._give_up(f"run again it changes a row's log-probabilities by {gap:.1e}")
        return False

    def _give_up(self, why: str) -> None:
        self.off = True
        self.clear()
        logger.info("steps of sampling are not recorded: %s", why)


class CudaRecorder:
    """CUDA graphs that share their memory, as one runs at a time; they are recorded on a stream of their own."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def forget(self) -> None:
        """The memory of graphs that are gone is not asked for again: a pool without any has ended."""
        self._pool = None

    def __call__(self, step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        with torch.cuda.device(device):
            if self._stream is None or self._stream.device_index != torch.cuda.current_device():
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph, caller = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            # Not torch.cuda.graph: after a recording that failed it leaves the thread on its stream.
            with torch.cuda.stream(self._stream), _without_gc():
                step()  # libraries take memory for a stream at their first call, which would stay in the pool
                torch.cuda.synchronize()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            caller.wait_stream(self._stream)
        return graph.replay


@contextlib.contextmanager
def _without_gc() -> Any:
    """What the collector would free meanwhile may be of another stream."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
