"""Which values the settings of objectives may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from tunesmith.core.errors import RecipeError, did_you_mean
from tunesmith.objective.shape import Divergence, Lengths

Range = tuple[Callable[[float], bool], str]
POSITIVE: Range = (lambda value: value > 0, "above 0")
NOT_NEGATIVE: Range = (lambda value: value >= 0, "of at least 0")
SHARE: Range = (lambda value: 0 <= value <= 1, "from 0 to 1")
RANGES: dict[str, Range] = {
    "beta": POSITIVE,
    "tau": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "gamma": NOT_NEGATIVE,
    "centre": NOT_NEGATIVE,
    "nll_weight": NOT_NEGATIVE,
    "token_weight": NOT_NEGATIVE,
    "label_smoothing": (lambda value: 0 <= value < 0.5, "of at least 0 and below 0.5"),
    "ld_alpha": SHARE,
    "alpha_coefficient": SHARE,
    "desirable_weight": POSITIVE,
    "undesirable_weight": POSITIVE,
    "shift": (lambda _value: True, ""),
}
# exo takes the logarithm of its smoothing.
OF_ONE: dict[tuple[str, str], Range] = {("exo", "label_smoothing"): (lambda value: 0 < value < 0.5, "above 0 and below 0.5")}
# Settings that are read only where another has a certain value.
ONLY_WITH = {"ld_alpha": ("lengths", "desensitised"), "alpha_coefficient": ("divergence", "alpha")}


def check_values(name: str, known: Mapping[str, Any], given: Mapping[str, Any], where: str, lengths: tuple[str, ...] = ()) -> None:
    """Raise RecipeError for the first setting of objective `name` that makes no sense (bad_value) or is not read (unread_setting).

    `known` are all its settings with their defaults, `lengths` the values that its own `lengths` may have.
    """
    words = {"lengths": lengths or get_args(Lengths), "divergence": get_args(Divergence)}
    for setting, value in given.items():
        if setting in words:
            if value not in words[setting]:
                near = did_you_mean(value, words[setting]) if isinstance(value, str) else ""
                _refuse(f"objective '{name}' has no {setting} '{value}'{near}", setting, f"use one of: {', '.join(words[setting])}", where)
        elif value is None and known[setting] is None:
            continue
        else:
            allowed, range_ = OF_ONE.get((name, setting)) or RANGES[setting]
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not allowed(value):
                _refuse(f"{setting} of objective '{name}' is {value!r}", setting, f"give a number {range_}".rstrip(), where)
    for setting, (other, needed) in ONLY_WITH.items():
        if setting in given and given.get(other, known[other]) != needed:
            raise RecipeError(
                f"{setting} is not read unless {other} is {needed}",
                where=f"{where}.{setting}",
                remedy=f"set {other}: {needed}, or leave {setting} out",
                code="unread_setting",
            )


def _refuse(message: str, setting: str, remedy: str, where: str) -> None:
    raise RecipeError(message, where=f"{where}.{setting}", remedy=remedy, code="bad_value")
