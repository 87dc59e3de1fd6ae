"""Pairs whose label may be wrong: the same answers twice, nearly the same, judged both ways, or a refusal preferred to an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from tunesmith.data.inspection.words import folded

NEAR = 0.9  # answers at least this similar are nearly the same
_WORDS = 300  # of a longer answer, half of them from its beginning and half from its end are compared
_FEW, _MANY = 2, 20
_HEAD = 160  # characters in which a refusal shows
_CANNOT = r"(?:can't|cannot|can not|won't|will not|am unable|am not able|'m unable|'m not able)"
_REFUSAL = re.compile(
    rf"\b(?:sorry|afraid|apologi[sz]e),? (?:but )?(?:that )?i ?{_CANNOT}"
    rf"|\bas an? (?:ai|artificial intelligence|language model)[^.]{{0,40}} i ?(?:{_CANNOT}|do not|don't)"
    rf"|\bi ?{_CANNOT} (?:to )?(?:help|assist|answer|provide|fulfill?|comply|do that|discuss|generate|create|write|share|support|engage)"
    r"|\bi must (?:decline|refuse)\b"
)
_NOTHING = frozenset(
    {"", "n/a", "na", "none", "null", "nothing", "no answer", "no comment", "no response", "i don't know", "i do not know"}
)


@dataclass(frozen=True)
class Suspect:
    """A row to look at: its key, how suspicious it is (0 to 1), and why."""

    key: str
    score: float
    reason: str


def suspect(key: str, chosen: str, rejected: str) -> Suspect | None:
    """What one pair alone gives away; None where nothing is odd. The cost is bounded, however long the answers are."""
    one, other = folded(chosen), folded(rejected)
    if one == other:
        return Suspect(key, 1.0, "the answers differ in white space or case alone")
    if is_empty(one) and not is_empty(other):
        return Suspect(key, 0.9, "chosen says nothing, rejected does")
    if is_refusal(one) and not is_refusal(other) and not is_empty(other):
        return Suspect(key, 0.8, "chosen refuses, rejected answers")
    alike = similarity(one, other)
    if alike >= NEAR:
        return Suspect(key, min(alike, 0.99), f"the answers are nearly the same ({100 * alike:.0f} %)")
    if len(one.split()) <= _FEW and len(other.split()) >= _MANY:
        return Suspect(key, 0.5, f"chosen is {one!r}, rejected has {len(other.split())} words")
    return None


def is_refusal(text: str) -> bool:
    """Whether a folded answer begins by refusing (in English)."""
    return _REFUSAL.search(text[:_HEAD].replace("’", "'")) is not None


def is_empty(text: str) -> bool:
    """Whether a folded answer says nothing: no letter or digit, or a word for nothing."""
    return text.strip(" .!?-") in _NOTHING or not any(sign.isalnum() for sign in text)


def similarity(one: str, other: str) -> float:
    """How alike two folded answers are, word by word, 0 to 1: twice the matching words over all words; 0 where surely less than NEAR."""
    left, right = _clipped(one.split()), _clipped(other.split())
    # Long answers are clipped, so their lengths are compared before.
    if 2 * min(len(one), len(other)) < (NEAR - 0.1) * (len(one) + len(other)):
        return 0.0
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    # Each of the two is an upper bound of ratio() and much cheaper.
    if matcher.real_quick_ratio() < NEAR or matcher.quick_ratio() < NEAR:
        return 0.0
    return matcher.ratio()


def _clipped(words: list[str]) -> list[str]:
    return words if len(words) <= _WORDS else words[: _WORDS // 2] + words[-_WORDS // 2 :]
