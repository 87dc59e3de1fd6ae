"""ShareGPT rows: {"conversations": [{"from": "human", "value": "..."}, ...], "system": "...", "tools": "[...]"}.

A `function_call` turn holds the JSON of one call or of a list of calls, perhaps after a <think> part; it belongs to the assistant
turn before it, when there is one directly before. `observation` is the tool's result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from tunesmith.core.errors import did_you_mean
from tunesmith.core.types import Dialog, Message, Role, Row
from tunesmith.data.formats import turns

LISTS = ("conversations", "conversation", "messages")
ASIDE = ("system", "tools")
COLUMNS = (*LISTS, *ASIDE)
TURN = ("from", "value", "weight", "loss_weight", "train", "name")
SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
CALLS = ("function_call", "tool_call")


def looks_like(row: Row) -> bool:
    """A list of objects with a speaker under `from`, with neither a label nor two answers beside it."""
    return not turns.is_labelled(row) and not turns.is_pair(row) and any(turns.is_list_with(row.get(name), "from") for name in LISTS)


def to_example(row: Row, key: str) -> Dialog:
    """The dialog of a row. Raises DataError naming the turn and the field at fault."""
    turns.refuse_media(row, key)
    turns.no_near_miss(row, ASIDE, key, "")
    name = next((name for name in LISTS if name in row), "conversations")
    found = turns.from_json(turns.required(row, name, key), key, name)
    return turns.dialog(turns.led_by_system(row, read_turns(found, key, name), key), key, turns.tools_of(row.get("tools"), key))


def read_turns(value: Any, key: str, field: str) -> list[Message]:
    """The turns of a list of objects with `from` and `value`."""
    if not isinstance(value, list):
        turns.fail(key, field, "not_a_list", f"expected a list of turns, got {str(value)[:80]!r}")
    messages: list[Message] = []
    for place, turn in enumerate(value):
        _add(messages, turn, key, f"{field}[{place}]")
    return messages


def _add(messages: list[Message], turn: Any, key: str, field: str) -> None:
    if not isinstance(turn, dict):
        turns.fail(key, field, "not_an_object", f"a turn is an object, got {str(turn)[:80]!r}")
    turns.no_near_miss(turn, TURN, key, field)
    speaker = turns.required(turn, "from", key, field)
    value = turns.required(turn, "value", key, field)
    if speaker in CALLS:
        thinking, calls = turns.call_text(value, key, f"{field}.value")
        weight = turns.weight_of(turn, "assistant", key, field)
        last = messages[-1] if messages else None
        if last is not None and last.role == "assistant" and last.weight == weight and thinking is None:
            messages[-1] = replace(last, tool_calls=last.tool_calls + calls)
        else:
            messages.append(Message("assistant", "", thinking=thinking, tool_calls=calls, weight=weight))
        return
    if speaker not in SPEAKERS:
        known = (*SPEAKERS, *CALLS)
        near = did_you_mean(str(speaker), known)
        turns.fail(key, f"{field}.from", "unknown_role", f"unknown speaker {speaker!r}{near}", f"speakers: {', '.join(known)}")
    role = SPEAKERS[speaker]
    if value is None:
        turns.fail(key, f"{field}.value", "empty_answer" if role == "assistant" else "no_content", "the value is null")
    content = turns.string(value, key, f"{field}.value")
    name = cast(str | None, turn.get("name"))
    messages.append(Message(role, content, name=name, weight=turns.weight_of(turn, role, key, field)))
