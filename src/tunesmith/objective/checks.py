"""Which values the settings of objectives may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from tunesmith.core.errors import RecipeError, did_you_mean
from tunesmith.objective.rows import Divergence, Lengths

WORDS: dict[str, tuple[str, ...]] = {"lengths": get_args(Lengths), "divergence": get_args(Divergence)}
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda value: value > 0, "above 0"),
    "tau": (lambda value: value > 0, "above 0"),
    "gamma": (lambda value: value >= 0, "at least 0"),
    "alpha": (lambda value: value >= 0, "at least 0"),
    "centre": (lambda value: value >= 0, "at least 0"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "at least 0 and below 0.5"),
    "ld_alpha": (lambda value: 0 <= value <= 1, "in 0..1"),
    "divergence_alpha": (lambda value: 0 <= value <= 1, "in 0..1"),
    "desirable_weight": (lambda value: value > 0, "above 0"),
    "undesirable_weight": (lambda value: value > 0, "above 0"),
}


def check_values(known: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError (bad_value) for the first setting whose value makes no sense."""
    for name, value in given.items():
        if name in WORDS:
            if value not in WORDS[name]:
                hint = did_you_mean(value, WORDS[name]) if isinstance(value, str) else ""
                _refuse(name, value, f"one of {', '.join(WORDS[name])}{hint}", where)
            continue
        allowed, words = RANGES.get(name, (lambda _value: True, "a number"))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not allowed(value):
            _refuse(name, value, f"a number {words}" if name in RANGES else words, where)
    if given.get("label_smoothing") == 0 and known.get("label_smoothing") == 1e-3:
        _refuse("label_smoothing", 0, "a number above 0: exo takes its logarithm", where)


def _refuse(name: str, value: Any, words: str, where: str) -> None:
    raise RecipeError(f"{name} is {value!r}", where=f"{where}.{name}", remedy=f"give {words}", code="bad_value")
