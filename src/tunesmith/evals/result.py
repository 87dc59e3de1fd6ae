"""One number of an evaluation beside the base model's, and how it is written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunesmith.core.types import Score
from tunesmith.evals.stats import Difference, Interval

Grades = Mapping[str, float]
_LOWER = ("perplexity", "loss")  # numbers of their own scale, where less is better; all other metrics are shares of 1


@dataclass(frozen=True)
class Result:
    """A score, the base model's interval, and their paired difference on the same rows."""

    score: Score
    base: Interval | None = None
    difference: Difference | None = None

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which way the number should go."""
        return "lower" if self.score.metric in _LOWER else "higher"

    @property
    def share(self) -> bool:
        """Whether the number lies in 0..1 and is shown in percent."""
        return self.score.metric not in _LOWER

    @property
    def name(self) -> str:
        """Task and metric as one name, e.g. `json_fields accuracy`."""
        return self.score.task if self.score.task == self.score.metric else f"{self.score.task} {self.score.metric}"

    @property
    def decimals(self) -> int:
        """Decimals that suit both models' numbers."""
        ends = [(self.score.low, self.score.high), *([(self.base.low, self.base.high)] if self.base else [])]
        return max(places(low, high) for low, high in ends)

    @property
    def change(self) -> Literal["better", "worse", "unclear"]:
        """Is the model better than the base, beyond chance at the 5 % level?"""
        gap = self.difference
        if gap is None or gap.p_value >= 0.05 or gap.low <= 0 <= gap.high:
            return "unclear"
        return "better" if (gap.value > 0) == (self.better == "higher") else "worse"

    def as_dict(self) -> dict[str, Any]:
        """The row of `eval --json`: the keys of Score, then base_low, base_high, difference, better."""
        return {
            **asdict(self.score),
            "base_low": self.base.low if self.base else None,
            "base_high": self.base.high if self.base else None,
            "difference": self.difference.as_dict() if self.difference else None,
            "better": self.better,
        }


def sample_row(
    key: str, prompt: str, truth: str, tuned: str, grades: Grades, *, base: str | None = None, base_grades: Grades | None = None
) -> dict[str, Any]:
    """One sample as `eval --json` and the report page have it: `tuned` is the model's answer, `base` the base's or null."""
    return {
        "key": key,
        "prompt": prompt,
        "truth": truth,
        "tuned": tuned,
        "grades": dict(grades),
        "base": base,
        "base_grades": dict(base_grades) if base_grades is not None else None,
    }


def places(low: float, high: float) -> int:
    """The decimals with which numbers of this interval are written: enough to show its width in two digits."""
    width = high - low
    return 2 if width <= 0 else min(6, max(0, 1 - math.floor(math.log10(width))))


def number(value: float, decimals: int, *, share: bool = False) -> str:
    """A value for people; shares in percent."""
    return f"{100 * value:.1f} %" if share else f"{value:,.{decimals}f}"


def span(low: float, high: float, decimals: int, *, share: bool = False) -> str:
    """An interval for people; the percent sign stands with the value."""
    return f"{100 * low:.1f}–{100 * high:.1f}" if share else f"{low:,.{decimals}f}–{high:,.{decimals}f}"


def gap(difference: Difference, *, share: bool) -> str:
    """A difference with its sign; shares in percentage points."""
    return f"{100 * difference.value:+.1f} pp" if share else f"{difference.value:+,.{places(difference.low, difference.high)}f}"


def gap_span(difference: Difference, *, share: bool) -> str:
    """The interval of a difference, both ends signed."""
    if share:
        return f"{100 * difference.low:+.1f} … {100 * difference.high:+.1f}"
    decimals = places(difference.low, difference.high)
    return f"{difference.low:+,.{decimals}f} … {difference.high:+,.{decimals}f}"


def p_text(p_value: float) -> str:
    """A p-value for people."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
