"""Where the loop's work comes from: rows on disk, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.core.recipe import Run
from tunesmith.core.types import Tokens
from tunesmith.data.dataset import TokenSet
from tunesmith.data.order import epoch_steps


class Offline:
    """A fixed set of rows, seen in shuffled epochs; the position is the number of steps done and nothing else."""

    def __init__(self, rows: TokenSet, run: Run) -> None:
        self.rows = rows
        self._run = run
        self._plan = lru_cache(maxsize=2)(self._plan_of)
        self._sizes: list[int] = []
        self.total = run.steps if run.steps is not None else self._steps_of_epochs(run.epochs if run.epochs is not None else 1.0)

    def _plan_of(self, epoch: int) -> list[npt.NDArray[Any]]:
        return epoch_steps(self.rows.lengths, self.rows.repeats, self._run.batch, self._run.seed, epoch)

    def _size(self, epoch: int) -> int:
        while len(self._sizes) <= epoch:
            self._sizes.append(len(self._plan(len(self._sizes))))
        return self._sizes[epoch]

    def _steps_of_epochs(self, epochs: float) -> int:
        whole = math.floor(epochs)
        steps = sum(self._size(epoch) for epoch in range(whole))
        return max(1, steps + round((epochs - whole) * self._size(whole)) if epochs > whole else steps)

    def place(self, done: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of the step that follows `done` steps."""
        epoch = 0
        while done >= self._size(epoch):
            done -= self._size(epoch)
            epoch += 1
        return epoch, done

    def epochs_done(self, done: int) -> float:
        """How many passes over the data `done` steps are."""
        epoch, step = self.place(done)
        return epoch + step / self._size(epoch)

    def steps(self, done: int) -> Iterator[list[Tokens]]:
        """The rows of every step after the first `done`, up to the total."""
        epoch, step = self.place(done)
        for _ in range(done, self.total):
            if step >= self._size(epoch):
                epoch, step = epoch + 1, 0
            yield [self.rows[int(row)] for row in np.asarray(self._plan(epoch)[step])]
            step += 1
