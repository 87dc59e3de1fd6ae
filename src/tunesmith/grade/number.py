"""The number an answer ends on."""

# Every grader takes prompt, answer and truth, whichever of them it looks at.
# ruff: noqa: ARG001

from __future__ import annotations

import re
from fractions import Fraction

from tunesmith.core.errors import GradeError
from tunesmith.core.types import Grade

# A sign counts only where nothing is subtracted (5-3 ends on 3); 1,234 is one number, 1,23 is two; H2O holds none.
_NUMBER = re.compile(
    r"(?<![^\W_])(?<![0-9][.,])"
    r"(?P<sign>(?<![0-9)\]] )(?<![0-9)\]%])[-−+])?\s?[$€£¥]?\s?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])(?:\.[0-9]++)?+|[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?:(?P<power>[eE][-+]?[0-9]{1,3}+(?![0-9]))|(?![eE][-+]?[0-9]))"
    r"(?:/(?P<below>[0-9]+)(?![0-9/]|\.[0-9]))?"
)
_MARK = "####"
_MOST_DIGITS = 1000


def numeric(prompt: str, answer: str, truth: str, *, tolerance: float = 0.0, relative: float = 0.0) -> Grade:
    """1 when the answer's number is the truth's number.

    The number is the first one after the last `####` (Cobbe 2021, arXiv:2110.14168) or, without that mark, the last one in the
    text. Read are signs, thousands separators (1,234), decimals with a point, exponents, fractions (3/4) and a currency sign before the
    number; a percent sign and units are passed over. Arithmetic is exact: |answer - truth| <= tolerance + relative x |truth|.
    Raises GradeError when the truth holds no number, or several and no `####`.
    """
    if tolerance < 0 or relative < 0:
        raise GradeError(
            f"a tolerance of {min(tolerance, relative)} is negative", where="grader numeric", remedy="use 0 or more", code="bad_setting"
        )
    want = _of_truth(truth)
    found = numbers(answer.rpartition(_MARK)[2])
    if not found:
        return Grade(0.0, "no number in the answer" if _MARK not in answer else f"no number after {_MARK}")
    got = found[0] if _MARK in answer else found[-1]
    near = abs(got - want) <= Fraction(tolerance) + Fraction(relative) * abs(want)
    return Grade(float(near), f"{_text(got)} {'is' if near else 'is not'} {_text(want)}")


def numbers(text: str) -> list[Fraction]:
    """Every number in the text, in order, exactly (one of more than 1000 digits counts as 10^1000: no parser takes them all)."""
    out = []
    for match in _NUMBER.finditer(text):
        value = _value(match["whole"].replace(",", ""), match["power"] or "")
        if match["sign"] in ("-", "−"):
            value = -value
        below = _value(match["below"] or "1")
        out += [value / below] if below else [value, Fraction(0)]
    return out


def _value(digits: str, power: str = "") -> Fraction:
    return Fraction(digits + power) if len(digits) <= _MOST_DIGITS else Fraction(10**_MOST_DIGITS)


def _of_truth(truth: str) -> Fraction:
    found = numbers(truth.rpartition(_MARK)[2])
    if not found or (len(found) > 1 and _MARK not in truth):
        what = "holds no number" if not found else f"holds {len(found)} numbers"
        raise GradeError(
            f"the truth {truth[:80]!r} {what}",
            where="truth",
            remedy=f"give one number, or mark the result with '{_MARK} 18'",
            code="truth_not_number",
        )
    return found[0]


def _text(value: Fraction) -> str:
    if value.denominator == 1 or abs(value) >= 10**15:
        text = str(int(value))
        return text if len(text) <= 24 else f"{text[:20]}... ({len(text)} digits)"
    return f"{float(value):.6g}"
