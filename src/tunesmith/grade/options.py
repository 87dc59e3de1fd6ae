"""Which of the offered options an answer chooses."""

# Every grader takes prompt, answer and truth, whichever of them it looks at.
# ruff: noqa: ARG001

from __future__ import annotations

import re
from collections.abc import Sequence

from tunesmith.core.errors import GradeError
from tunesmith.core.types import Grade
from tunesmith.grade.text import normal

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choice(prompt: str, answer: str, truth: str, *, options: Sequence[str] = (), letters: str = "ABCD") -> Grade:
    """1 when the answer chooses the option that the truth names.

    options: the texts offered, lettered A, B, C, ... in that order; without them only letters are understood (letters: those offered).
    The truth is a letter or an option's text. An answer chooses by a leading letter ("B", "(B)", "B. Paris"), by saying that the answer
    is one ("the answer is B"; the last such phrase counts), by being an option's text, or by holding exactly one option's text.
    An answer that chooses none or several is worth 0 and the reason says so.
    Raises GradeError when the truth is none of the options, or when two options read the same.
    """
    known = LETTERS[: len(options)] if options else letters.upper()
    texts = [normal(text, ignore_case=True, ignore_punctuation=True) or normal(text, ignore_case=True) for text in options]
    if set(known) - set(LETTERS) or not known:
        raise GradeError(f"the letters {letters!r} are not all of A to Z", where="letters", remedy="write e.g. ABCDE", code="bad_options")
    if len(set(texts)) != len(texts) or len(options) > len(LETTERS) or not all(texts):
        raise GradeError(
            f"the options {list(options)!r} are too many, empty or not different",
            where="options",
            remedy="offer 2 to 26 different texts",
            code="bad_options",
        )
    want = _index(truth, known, texts)
    if want is None:
        raise GradeError(
            f"the truth {truth[:80]!r} is none of the options",
            where="truth",
            remedy=f"name one of: {', '.join(options or known)}",
            code="truth_not_option",
        )
    got = chosen(answer, known, texts)
    if got is None:
        return Grade(0.0, "chooses no single option")
    return Grade(float(got == want), f"chooses {known[got]}")


def chosen(answer: str, letters: str, texts: Sequence[str]) -> int | None:
    """The index of the option an answer chooses, or None when it chooses none or several; texts are normalised."""
    whole = _index(answer, letters, texts)
    if whole is not None:
        return whole
    said = re.findall(rf"(?i:\banswer(?:\s+is|\s*:|\s+would be)\s*:?\s*)(?:\*\*)?\(?([{letters}])\b(?!['’])", answer)
    if said:
        return letters.index(said[-1])
    first = re.match(rf"\s*(?:\*\*)?(?:\(([{letters}])\)|([{letters}])(?:[.):](?=\s|$)|\s*\n))", answer)
    if first:
        return letters.index(first[1] or first[2])
    return _only_text(normal(answer, ignore_case=True, ignore_punctuation=True), texts)


def _index(text: str, letters: str, texts: Sequence[str]) -> int | None:
    plain = normal(text, ignore_case=True, ignore_punctuation=True) or normal(text, ignore_case=True)
    if plain in texts:
        return list(texts).index(plain)
    letter = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    return letters.index(letter[1].upper()) if letter and letter[1].upper() in letters else None


def _only_text(answer: str, texts: Sequence[str]) -> int | None:
    # Longer options are taken out first, so that "cat food" does not count as "cat" too.
    found = set()
    for place in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        pattern = rf"(?<!\w){re.escape(texts[place])}(?!\w)"
        if re.search(pattern, answer):
            found.add(place)
            answer = re.sub(pattern, " \0 ", answer)
    return found.pop() if len(found) == 1 else None
