"""Graders over plain text: equal, contained, matched by a pattern."""

# Every grader takes prompt, answer and truth, whichever of them it looks at.
# ruff: noqa: ARG001

from __future__ import annotations

import re
import unicodedata

from tunesmith.core.errors import GradeError
from tunesmith.core.types import Grade


def exact(
    prompt: str, answer: str, truth: str, *, strip: bool = True, ignore_case: bool = False, ignore_punctuation: bool = False
) -> Grade:
    """1 when the answer is the truth, character for character after normalisation.

    Both sides are brought to Unicode NFC, so that composed and decomposed letters agree. strip takes white space off both ends;
    ignore_case compares case-folded; ignore_punctuation drops every Unicode punctuation character and joins runs of white space
    (the answer normalisation of Rajpurkar 2016, arXiv:1606.05250, without its removal of articles).
    Raises GradeError when nothing of the truth is left to compare.
    """
    want = normal(truth, strip=strip, ignore_case=ignore_case, ignore_punctuation=ignore_punctuation)
    if not want:
        raise empty_truth(truth)
    got = normal(answer, strip=strip, ignore_case=ignore_case, ignore_punctuation=ignore_punctuation)
    return Grade(1.0, "equal") if got == want else Grade(0.0, f"{_short(got)} is not {_short(want)}")


def contains(prompt: str, answer: str, truth: str, *, ignore_case: bool = False, whole_words: bool = True) -> Grade:
    """1 when the truth stands somewhere in the answer.

    whole_words asks for no letter or digit right before or after it, so that 10 is not found in 100.
    Raises GradeError for an empty truth, which every answer contains.
    """
    want = normal(truth, ignore_case=ignore_case)
    if not want:
        raise empty_truth(truth)
    got = normal(answer, ignore_case=ignore_case)
    found = re.search(rf"(?<!\w){re.escape(want)}(?!\w)", got) if whole_words else want in got
    return Grade(1.0, "contained") if found else Grade(0.0, f"{_short(want)} does not occur")


def regex(prompt: str, answer: str, truth: str, *, pattern: str | None = None, full: bool = False, ignore_case: bool = False) -> Grade:
    """1 when a regular expression matches the answer; a pattern with a group must capture the truth.

    pattern is the expression (default: the truth itself); full asks that it match the whole answer. Of several matches the last
    one's first group counts. Patterns are Python's `re`, searched over lines as one text; they come from the recipe and are
    trusted (a catastrophic one is slow).
    Raises GradeError for a pattern that does not compile, or that matches the empty text and so would pass every answer.
    """
    source = truth if pattern is None else pattern
    try:
        compiled = re.compile(source, re.DOTALL | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise GradeError(
            f"the pattern {source!r} does not compile: {error}",
            where="grader regex",
            remedy="mend the regular expression",
            code="bad_pattern",
        ) from error
    captures = pattern is not None and compiled.groups > 0
    if not full and not captures and compiled.search(""):
        raise GradeError(
            f"the pattern {source!r} matches the empty text, so every answer would pass",
            where="grader regex",
            remedy="ask for at least one character, or set full: true",
            code="bad_pattern",
        )
    matches = [compiled.fullmatch(answer)] if full else list(compiled.finditer(answer))
    last = matches[-1] if matches else None
    if last is None:
        return Grade(0.0, f"no match of {source!r}")
    if not captures:
        return Grade(1.0, f"matched {_short(last.group(0))}")
    got, want = (last.group(1) or "").strip(), truth.strip()
    if not want:
        raise empty_truth(truth)
    return Grade(float(got == want), f"captured {_short(got)}")


def normal(text: str, *, strip: bool = True, ignore_case: bool = False, ignore_punctuation: bool = False) -> str:
    """The text in the form in which it is compared."""
    text = unicodedata.normalize("NFC", text)
    if ignore_case:
        text = unicodedata.normalize("NFC", text.casefold())
    if ignore_punctuation:
        text = " ".join("".join(c for c in text if not unicodedata.category(c).startswith("P")).split())
    return text.strip() if strip else text


def empty_truth(truth: str) -> GradeError:
    """The error for a truth of which nothing is left to compare."""
    return GradeError(
        f"the truth {truth!r} is empty once normalised, so an empty answer would be right",
        where="truth",
        remedy="give every row a truth, or relax the normalisation",
        code="empty_truth",
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
