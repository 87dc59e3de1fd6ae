"""Does length alone tell the better answer? Shares with intervals, effect sizes, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

Unit = Literal["characters", "tokens"]
Counter = Callable[[list[str]], list[int]]
_LEVEL = 0.95
# What counts as a small, a medium and a large difference (Cohen 1988, Statistical Power Analysis, 2.2.4).
_SMALL, _MEDIUM, _LARGE = 0.2, 0.5, 0.8


@dataclass(frozen=True)
class LengthBias:
    """How the lengths of good and bad answers differ.

    `longer` is the share of pairs in which the good answer is the longer one, of those whose lengths differ, with its 95 % Wilson
    interval low..high (None for answers that are not in pairs); `ties` counts pairs of equal length. `superiority` is the probability
    that the good answer is the longer one, ties counted half: the accuracy of a judge who looks at length alone. `effect` is Cohen's d
    of log-lengths: for pairs the mean difference over the deviation of the differences, else over the pooled deviation; None where it
    is not defined.
    """

    unit: Unit
    good: float
    bad: float
    longer: float | None
    low: float | None
    high: float | None
    ties: int
    effect: float | None
    superiority: float
    verdict: str


def paired_bias(good: Sequence[int], bad: Sequence[int], unit: Unit = "characters") -> LengthBias:
    """The bias of pairs: good[k] and bad[k] are the lengths of the two answers of pair k; there is one pair at least."""
    ours, theirs = np.asarray(good), np.asarray(bad)
    n, more, ties = len(ours), int((ours > theirs).sum()), int((ours == theirs).sum())
    gaps = _logs(ours) - _logs(theirs)
    effect = _over(float(gaps.mean()), float(gaps.std(ddof=1)) if n > 1 else 0.0)
    low, high = wilson(more, n - ties) if n > ties else (None, None)
    superiority = (more + ties / 2) / n
    share = more / (n - ties) if n > ties else None
    certain = low is not None and high is not None and not low <= 0.5 <= high
    said = _verdict("chosen", effect, superiority, certain=certain)
    return LengthBias(unit, float(np.median(ours)), float(np.median(theirs)), share, low, high, ties, effect, superiority, said)


def unpaired_bias(good: Sequence[int], bad: Sequence[int], unit: Unit = "characters") -> LengthBias:
    """The bias of single answers: lengths of the good ones and of the bad ones, one of each at least.

    The superiority is that of Vargha and Delaney (2000, J. Educ. Behav. Stat. 25:101), over all couples of a good and a bad answer.
    """
    ours, theirs = np.asarray(good), np.asarray(bad)
    order = np.sort(theirs)
    below, upto = np.searchsorted(order, ours, "left"), np.searchsorted(order, ours, "right")
    superiority = float(((below + upto) / 2).sum() / (len(ours) * len(theirs)))
    one, other = _logs(ours), _logs(theirs)
    freedom = len(one) + len(other) - 2
    squares = ((one - one.mean()) ** 2).sum() + ((other - other.mean()) ** 2).sum()
    effect = _over(float(one.mean() - other.mean()), math.sqrt(squares / freedom) if freedom else 0.0)
    # The deviation of Mann and Whitney's statistic when there is no difference (1947, Ann. Math. Stat. 18:50).
    spread = math.sqrt((len(ours) + len(theirs) + 1) / (12 * len(ours) * len(theirs)))
    said = _verdict("good", effect, superiority, certain=abs(superiority - 0.5) > _z() * spread)
    middle = float(np.median(ours)), float(np.median(theirs))
    return LengthBias(unit, *middle, None, None, None, int((upto - below).sum()), effect, superiority, said)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of hits out of n > 0 (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    z, p = _z(), hits / n
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At none and at all, one end is exactly 0 or 1, which rounding would miss.
    return 0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half


def _verdict(who: str, effect: float | None, superiority: float, *, certain: bool) -> str:
    judge = f"a judge of length alone is right on {100 * max(superiority, 1 - superiority):.0f} %"
    if not certain:
        return f"no sign of a length bias ({judge})"
    way = "longer" if superiority > 0.5 else "shorter"
    size = abs(effect) if effect is not None else math.inf
    word = "large" if size >= _LARGE else "medium" if size >= _MEDIUM else "small" if size >= _SMALL else "negligible"
    said = f"{who} answers are {way}: a {word} length bias ({judge})"
    return said if word in ("negligible", "small") else f"{said}; compare with a length-normalised loss, or balance the lengths"


def _logs(lengths: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
    return np.log(np.maximum(lengths, 1).astype(np.float64))


def _over(gap: float, deviation: float) -> float | None:
    if deviation > 1e-12:
        return gap / deviation
    return 0.0 if abs(gap) < 1e-12 else None


def _z() -> float:
    return NormalDist().inv_cdf((1 + _LEVEL) / 2)
