"""Alpaca rows: {"instruction", "input", "output"}, with `system` and `history` (a list of [question, answer]) when there are.

The user's turn is the instruction, then a line break and the input when the input is not empty.
"""

from __future__ import annotations

from tunesmith.core.types import Dialog, Message, Row
from tunesmith.data.formats import turns

COLUMNS = ("instruction", "input", "output", "system", "history")


def looks_like(row: Row) -> bool:
    """Has an instruction and an output, and no label."""
    return "instruction" in row and "output" in row and not turns.is_labelled(row)


def to_example(row: Row, key: str) -> Dialog:
    """The dialog of a row. Raises DataError naming the field at fault."""
    turns.refuse_media(row, key)
    turns.no_near_miss(row, COLUMNS, key, "")
    prompt = read_prompt(row, key)
    output = turns.required(row, "output", key)
    if output is None:
        turns.fail(key, "output", "empty_answer", "the answer is null")
    answer = Message("assistant", turns.string(output, key, "output"))
    return turns.dialog(turns.led_by_system(row, [*prompt, answer], key), key)


def read_prompt(row: Row, key: str) -> list[Message]:
    """The turns before the answer, without the row's own `system`."""
    question = turns.string(turns.required(row, "instruction", key), key, "instruction")
    given = row.get("input")
    extra = "" if given is None else turns.string(given, key, "input")
    return [*_history(row, key), Message("user", "\n".join(part for part in (question, extra) if part.strip()))]


def _history(row: Row, key: str) -> list[Message]:
    pairs = turns.from_json(row.get("history") or [], key, "history")
    out: list[Message] = []
    for place, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        field = f"history[{place}]"
        if not isinstance(pair, list) or len(pair) != 2:
            turns.fail(key, field, "bad_history", f"expected [question, answer], got {str(pair)[:80]!r}")
        out += [Message("user", turns.string(pair[0], key, field)), Message("assistant", turns.string(pair[1], key, field))]
    return out
