"""Where the loop's work comes from: rows on disk, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.core.recipe import Run
from tunesmith.core.types import Tokens
from tunesmith.data.dataset import TokenSet
from tunesmith.data.order import epoch_steps


class Offline:
    """A fixed set of rows, seen in shuffled epochs; the position is the number of steps done and nothing else.

    Rows of one group (the two sides of a pair) go together and count as one example. Put other arrays beside the same rows with `rows`.
    """

    def __init__(self, rows: TokenSet, run: Run) -> None:
        self.rows = rows
        self._starts = rows.groups()
        self._ends = np.append(self._starts[1:], len(rows))
        self._lengths = np.add.reduceat(rows.lengths, self._starts) if len(rows) else rows.lengths
        self._run = run
        self._plan = lru_cache(maxsize=2)(self._plan_of)
        self._sizes: list[int] = []
        self.total = run.steps if run.steps is not None else self._steps_of_epochs(run.epochs if run.epochs is not None else 1.0)

    def _plan_of(self, epoch: int) -> list[npt.NDArray[Any]]:
        return epoch_steps(self._lengths, self.rows.repeats[self._starts], self._run.batch, self._run.seed, epoch)

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
            yield self._rows_of(self._plan(epoch)[step])
            step += 1

    def _rows_of(self, groups: npt.NDArray[Any]) -> list[Tokens]:
        found, seen = [], Counter[int]()
        for group in groups.tolist():
            rows = [self.rows[row] for row in range(self._starts[group], self._ends[group])]
            if seen[group] and rows[0].group:  # the same pair twice in one step is two pairs
                rows = [replace(row, group=f"{row.group}+{seen[group]}") for row in rows]
            seen[group] += 1
            found += rows
        return found

    @property
    def examples(self) -> int:
        """How many groups there are."""
        return len(self._starts)

    def used(self) -> npt.NDArray[np.bool_]:
        """Which rows [R] the steps up to the total see."""
        groups = np.zeros(len(self._starts), dtype=np.bool_)
        epoch, left = 0, self.total
        while left > 0 and not groups.all():
            for step in self._plan(epoch)[:left]:
                groups[step] = True
            left -= self._size(epoch)
            epoch += 1
        return np.repeat(groups, self._ends - self._starts)
