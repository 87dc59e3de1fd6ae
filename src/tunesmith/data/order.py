"""Which rows each optimizer step sees: a pure function of lengths, weights, seed and epoch, so that (epoch, step) is all a resume needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import RecipeError
from tunesmith.core.recipe import StepBatch
from tunesmith.core.seed import stream
from tunesmith.data.pack import fit

WINDOW = 10_000  # rows shuffled together before they are fitted into steps
_GRAIN = 1 << 20

Rows = npt.NDArray[np.int64]


def epoch_steps(lengths: npt.NDArray[np.integer], repeats: npt.NDArray[np.floating], batch: StepBatch, seed: int, epoch: int) -> list[Rows]:
    """The row numbers of every optimizer step of one epoch.

    lengths [R] tokens a row; repeats [R] how often a row is seen in an epoch on average (see `copies`). With `batch.examples` the
    rows are shuffled and cut into steps of that many, the last one perhaps smaller. With `batch.tokens` windows of shuffled
    rows are packed by best-fit decreasing into steps of at most that many tokens, and the steps are shuffled.
    Raises RecipeError when a row is longer than `batch.tokens`.
    """
    rows = np.repeat(np.arange(len(lengths), dtype=np.int64), copies(repeats, seed, epoch))
    rows = rows[stream(seed, "shuffle", epoch).permutation(len(rows))]
    if batch.examples is not None:
        return [rows[start : start + batch.examples] for start in range(0, len(rows), batch.examples)]
    capacity = batch.tokens or 0
    if len(rows) and int(lengths[rows].max()) > capacity:
        longest = int(lengths[rows].max())
        raise RecipeError(
            f"a step of {capacity} tokens cannot hold a row of {longest}",
            where="run.batch.tokens",
            remedy=f"set run.batch.tokens to at least {longest}, or tokens.max_length to at most {capacity}",
            code="row_over_batch",
        )
    steps: list[Rows] = []
    for start in range(0, len(rows), WINDOW):
        window = rows[start : start + WINDOW]
        steps += [window[places] for places in fit(lengths[window], capacity)]
    return [steps[place] for place in stream(seed, "steps", epoch).permutation(len(steps))]


def copies(repeats: npt.NDArray[np.floating], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """How often each row [R] occurs in this epoch: floor(w), and once more with probability w - floor(w).

    The draws of successive epochs belong together (systematic sampling, Madow 1949): after E epochs a row has been seen
    floor(w E) or ceil(w E) times, so a row of weight 0.5 comes in every second epoch and never twice running.
    """
    weights = np.asarray(repeats, dtype=np.float64)
    whole = np.floor(weights)
    part = weights - whole
    offset = stream(seed, "repeat").integers(0, _GRAIN, len(weights)) / _GRAIN
    extra = np.floor(part * (epoch + 1) + offset) - np.floor(part * epoch + offset)
    counts: Rows = (whole + np.clip(extra, 0, 1)).astype(np.int64)
    return counts
