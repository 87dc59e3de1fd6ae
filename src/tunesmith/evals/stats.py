"""Intervals and comparisons: every number with its n, its seed and what it may be by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import GradeError
from tunesmith.core.log import logger
from tunesmith.core.seed import stream

Floats = npt.NDArray[np.float64]
LEVEL = 0.95
DRAWS = 2000
_TEST_DRAWS = 9999


@dataclass(frozen=True)
class Interval:
    """An estimate from n rows and its two-sided interval at LEVEL."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Ours minus the base's on the same n rows: the difference, its interval, and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p_value: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """The difference as JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "p_value": self.p_value, "n": self.n}


def share(values: npt.ArrayLike) -> Interval:
    """The mean of grades in 0..1 with the Wilson score interval (Wilson 1927; Brown 2001, Statistical Science 16:101).

    For right and wrong this is the interval of a proportion. For grades in between it is wider than needed, because their variance
    is at most p (1 - p); unlike a bootstrap it does not shrink to nothing when a few rows all agree.
    Raises GradeError for no grades, or for one outside 0..1.
    """
    grades = _rows(values)
    if grades.min() < 0 or grades.max() > 1:
        raise GradeError(
            f"a grade of {grades[(grades < 0) | (grades > 1)][0]:g} is outside 0..1",
            where="grades",
            remedy="use mean() for grades on another scale",
            code="bad_grade",
        )
    n, p = len(grades), float(grades.mean())
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At all wrong and all right one end is exactly 0 or 1, which rounding would miss.
    return Interval(p, 0.0 if p == 0 else max(0.0, middle - half), 1.0 if p == 1 else min(1.0, middle + half), n)


def mean(values: npt.ArrayLike, *, seed: int = 0) -> Interval:
    """The mean with a percentile bootstrap interval over rows (Efron 1979)."""
    numbers = _rows(values)
    return ratio(numbers, np.ones_like(numbers), seed=seed)


def ratio(sums: npt.ArrayLike, counts: npt.ArrayLike, *, seed: int = 0) -> Interval:
    """sum(sums) / sum(counts) with a percentile bootstrap interval over rows: a row brings its sum and its count together.

    This is how a token-weighted loss is averaged; exp of all three is the perplexity and its interval.
    Raises GradeError for no rows, or for a row without a count.
    """
    top, below = _rows(sums), _counts(counts)
    if len(top) == 1:
        logger.warning("one row only: its interval is the value itself and says nothing about other rows")
    sums_drawn, counts_drawn = _resampled(seed, top, below)
    low, high = _ends(sums_drawn / counts_drawn)
    return Interval(float(top.sum() / below.sum()), low, high, len(top))


def paired(ours: npt.ArrayLike, base: npt.ArrayLike, *, seed: int = 0) -> Difference:
    """Mean difference of two models' grades on the same rows: bootstrap interval over rows, and a sign-flip test.

    Where every difference has the same size, as with right and wrong, the test is exact and is McNemar's (1947, exact binomial
    form); otherwise it draws sign flips, with the +1 that keeps p above 0 (Phipson 2010, SAGMB 9:39).
    Raises GradeError when the rows are not the same number.
    """
    left, right = _rows(ours), _rows(base)
    if len(left) != len(right):
        raise GradeError(f"{len(left)} rows against {len(right)}", where="paired", remedy="compare the same rows", code="not_paired")
    gaps = left - right
    (sums,) = _resampled(seed, gaps)
    low, high = _ends(sums / len(gaps))
    return Difference(float(gaps.mean()), low, high, flip_test(gaps, seed=seed), len(gaps))


def paired_perplexity(ours: npt.ArrayLike, base: npt.ArrayLike, counts: npt.ArrayLike, *, seed: int = 0) -> Difference:
    """Difference of two perplexities on the same tokens; ours and base are each row's summed negative log-likelihood.

    The test flips signs of the rows' differences in nats, so it asks whether the log perplexities differ.
    """
    left, right, below = _rows(ours), _rows(base), _counts(counts)
    if not len(left) == len(right) == len(below):
        raise GradeError(f"{len(left)} rows against {len(right)}", where="paired", remedy="compare the same rows", code="not_paired")
    mine, theirs, tokens = _resampled(seed, left, right, below)
    low, high = _ends(np.exp(mine / tokens) - np.exp(theirs / tokens))
    value = math.exp(left.sum() / below.sum()) - math.exp(right.sum() / below.sum())
    return Difference(value, low, high, flip_test(left - right, seed=seed), len(left))


def flip_test(gaps: Floats, *, seed: int = 0) -> float:
    """Two-sided p-value that differences scatter evenly around zero (Fisher's sign-flip test)."""
    moved = gaps[gaps != 0]
    n = len(moved)
    if n == 0:
        return 1.0
    if np.allclose(np.abs(moved), abs(moved[0]), rtol=1e-12, atol=0):
        fewer = int(min((moved > 0).sum(), (moved < 0).sum()))
        return min(1.0, float(2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n))
    seen = abs(moved.sum()) * (1 - 1e-12)
    if n <= 12:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ moved) >= seen).mean())
    random = stream(seed, "flip")
    hits = sum(
        int(np.count_nonzero(np.abs((1.0 - 2.0 * random.integers(0, 2, (block, n))) @ moved) >= seen)) for block in _blocks(_TEST_DRAWS, n)
    )
    return (hits + 1) / (_TEST_DRAWS + 1)


def _rows(values: npt.ArrayLike) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0:
        raise GradeError("there is nothing to average", where="statistics", remedy="evaluate at least one row", code="no_rows")
    if not np.isfinite(numbers).all():
        raise GradeError("a value is NaN or infinite", where="statistics", remedy="look at the row it comes from", code="not_finite")
    return numbers


def _counts(values: npt.ArrayLike) -> Floats:
    counts = _rows(values)
    if counts.min() <= 0:
        raise GradeError("a row has no tokens to average over", where="statistics", remedy="leave such rows out", code="no_rows")
    return counts


def _resampled(seed: int, *columns: Floats) -> list[Floats]:
    """The sum of every column over DRAWS resamples of its rows, the same rows for all columns."""
    table = np.stack(columns, axis=1)
    n = len(table)
    random = stream(seed, "bootstrap", n)
    even = np.full(n, 1 / n)
    sums = [random.multinomial(n, even, size=block).astype(np.float64) @ table for block in _blocks(DRAWS, n)]
    return list(np.concatenate(sums).T)


def _ends(estimates: Floats) -> tuple[float, float]:
    low, high = np.quantile(estimates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _blocks(draws: int, n: int) -> list[int]:
    size = max(1, min(draws, 4_000_000 // n))
    return [size] * (draws // size) + ([draws % size] if draws % size else [])
