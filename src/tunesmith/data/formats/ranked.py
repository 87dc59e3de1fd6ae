"""Several answers to one prompt, ranked or scored: {"prompt", "answers": [...], "scores": [...]}.

The answers may stand under `responses` or `completions`. Scores are higher for better answers; `ranks` (or `ranking`) instead are each
answer's place, 1 being the best, and may tie. UltraFeedback's rows are read too: {"instruction", "completions": [{"response",
"overall_score"}, ...]}. What pairs come of a list says data.ranked.
"""

from __future__ import annotations

from typing import Any

from tunesmith.core.types import Ranked, Row
from tunesmith.data.formats import answers, turns

LISTS = ("answers", "responses", "completions")
PLACES = ("ranks", "ranking")
COLUMNS = ("prompt", "instruction", "input", *LISTS, "scores", *PLACES, "system", "tools")


def looks_like(row: Row) -> bool:
    """Has a list of answers, and scores or ranks for them."""
    return any(isinstance(row.get(name), list) for name in LISTS) and (
        any(isinstance(row.get(name), list) for name in ("scores", *PLACES)) or _scored(row.get("completions"))
    )


def to_example(row: Row, key: str) -> Ranked:
    """The list of a row. Raises DataError: "answers_and_scores", "bad_score", "bad_rank", "too_few_answers", "empty_answer", ..."""
    turns.refuse_media(row, key)
    turns.no_near_miss(row, ("scores", "system", "tools"), key, "")
    name = next((name for name in LISTS if name in row), LISTS[0])
    given = turns.from_json(turns.required(row, name, key), key, name)
    if not isinstance(given, list):
        turns.fail(key, name, "not_a_list", f"expected a list of answers, got {str(given)[:80]!r}")
    scores, measured = _scores(row, given, key, name)
    if len(scores) != len(given):
        turns.fail(key, name, "answers_and_scores", f"{len(given)} answers, but {len(scores)} scores")
    if len(given) < 2:
        turns.fail(key, name, "too_few_answers", "a ranking needs two answers at least", "remove the row")
    prompt = turns.led_by_system(row, answers.read_prompt(row, key), key)
    found = [_answer(item, key, f"{name}[{place}]") for place, item in enumerate(given)]
    for place, answer in enumerate(found):
        answers.check(prompt, answer, key, f"{name}[{place}]")
    return Ranked(tuple(prompt), tuple(map(tuple, found)), tuple(scores), key, turns.tools_of(row.get("tools"), key), measured)


def _scored(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) and "overall_score" in item for item in value)


def _answer(item: Any, key: str, field: str) -> Any:
    if isinstance(item, dict) and "response" in item:
        item, field = item["response"], f"{field}.response"
    if item is None:
        turns.fail(key, field, "empty_answer", "the answer is null")
    return answers.read(item, "assistant", key, field)


def _scores(row: Row, given: list[Any], key: str, field: str) -> tuple[list[float], bool]:
    """A score for each answer, higher for better, and whether it is an amount rather than a place."""
    name = next((name for name in ("scores", *PLACES) if row.get(name) is not None), None)
    if name is None and _scored(given):
        return [
            answers.number(turns.required(item, "overall_score", key, f"{field}[{place}]"), key, f"{field}[{place}]", "bad_score")
            for place, item in enumerate(given)
        ], True
    found = turns.from_json(turns.required(row, name or "scores", key), key, name or "scores")
    if not isinstance(found, list):
        turns.fail(key, name or "scores", "not_a_list", f"expected a list of numbers, got {str(found)[:80]!r}")
    if name == "scores":
        return [answers.number(value, key, f"scores[{place}]", "bad_score") for place, value in enumerate(found)], True
    ranks = [answers.number(value, key, f"{name}[{place}]", "bad_rank") for place, value in enumerate(found)]
    if any(rank < 1 or rank > len(ranks) or rank != int(rank) for rank in ranks):
        turns.fail(key, name or "ranks", "bad_rank", f"a rank is an answer's place, from 1 (best) to {len(ranks)}; got {found}")
    return [len(ranks) + 1 - rank for rank in ranks], False
