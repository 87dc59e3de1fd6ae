"""OpenAI's rows for preference tuning: {"input": {"messages", "tools"}, "preferred_output": [...], "non_preferred_output": [...]}.

The older names preferred_completion and non_preferred_completion are read too.
"""

from __future__ import annotations

from tunesmith.core.types import Pair, Row
from tunesmith.data.formats import answers, turns
from tunesmith.data.formats.messages import read_turns

GOOD, BAD = ("preferred_output", "preferred_completion"), ("non_preferred_output", "non_preferred_completion")
COLUMNS = ("input", *GOOD, *BAD)
INPUT = ("messages", "tools", "functions", "parallel_tool_calls")


def looks_like(row: Row) -> bool:
    """Has a preferred output or one that is not preferred."""
    return any(name in row for name in (*GOOD, *BAD))


def to_example(row: Row, key: str) -> Pair:
    """The pair of a row. Raises DataError naming the part at fault."""
    given = turns.from_json(turns.required(row, "input", key), key, "input")
    if not isinstance(given, dict):
        turns.fail(key, "input", "not_an_object", f"input is an object with messages, got {str(given)[:80]!r}")
    turns.no_near_miss(given, INPUT, key, "input")
    prompt = read_turns(turns.required(given, "messages", key, "input"), key, "input.messages")
    sides = {}
    for word, names in (("chosen", GOOD), ("rejected", BAD)):
        name = next((name for name in names if name in row), names[0])
        sides[name] = answers.read_side(turns.required(row, name, key), word, key, name)
    return answers.pair(prompt, sides, key, turns.tools_of(given.get("tools") or given.get("functions"), key))
