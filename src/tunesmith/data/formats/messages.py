"""OpenAI chat rows: {"messages": [{"role", "content", ...}], "tools": [...], "system": "..."}.

Also read: the list under `conversations` or `conversation`; content as a list of text parts (joined without a separator) with
reasoning and tool_call parts among them; `weight` (or `loss_weight`, `train`) on assistant turns; tool calls with arguments as an
object or as JSON text; the older `function_call` and role `function`; thinking under `reasoning_content`, `reasoning` or `thinking`.
"""

from __future__ import annotations

import json
from typing import Any, cast

from tunesmith.core.errors import did_you_mean
from tunesmith.core.types import ROLES, Dialog, Message, Role, Row, ToolCall
from tunesmith.data.formats import turns

LISTS = ("messages", "conversations", "conversation")
ASIDE = ("system", "tools", "functions")
COLUMNS = (*LISTS, *ASIDE)
THINKING = ("reasoning_content", "reasoning", "thinking")
TURN = (
    *("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "weight", "loss_weight", "train", "refusal", "audio"),
    *THINKING,
)


def looks_like(row: Row) -> bool:
    """A list of objects with a role, with neither a label nor two answers beside it."""
    return not turns.is_labelled(row) and not _asks_for_two(row) and any(turns.is_list_with(row.get(name), "role") for name in LISTS)


def _asks_for_two(row: Row) -> bool:
    # Beside two answers the turns are their prompt, unless they are one of the two conversations once more (UltraFeedback, binarised).
    found: list[Any] = next((row[name] for name in LISTS if isinstance(row.get(name), list)), [])
    last = found[-1] if found else None
    return turns.is_pair(row) and not (isinstance(last, dict) and last.get("role") == "assistant")


def to_example(row: Row, key: str) -> Dialog:
    """The dialog of a row. Raises DataError naming the turn and the field at fault."""
    turns.refuse_media(row, key)
    turns.no_near_miss(row, ASIDE, key, "")
    name = next((name for name in LISTS if name in row), "messages")
    found = turns.from_json(turns.required(row, name, key), key, name)
    tools = turns.tools_of(row.get("tools") or row.get("functions"), key)
    return turns.dialog(turns.led_by_system(row, read_turns(found, key, name), key), key, tools)


def read_turns(value: Any, key: str, field: str) -> list[Message]:
    """The turns of a list of OpenAI messages."""
    if not isinstance(value, list):
        turns.fail(key, field, "not_a_list", f"expected a list of turns, got {str(value)[:80]!r}")
    return [_message(item, key, f"{field}[{place}]") for place, item in enumerate(value)]


def _message(turn: Any, key: str, field: str) -> Message:
    if not isinstance(turn, dict):
        turns.fail(key, field, "not_an_object", f"a turn is an object, got {str(turn)[:80]!r}")
    turns.no_near_miss(turn, TURN, key, field)
    given = turns.required(turn, "role", key, field)
    role = "tool" if given == "function" else given
    if role not in ROLES:
        near = did_you_mean(str(given), ROLES)
        turns.fail(key, f"{field}.role", "unknown_role", f"unknown role {given!r}{near}", f"roles: {', '.join(ROLES)}")
    if turn.get("audio"):
        turns.unsupported(key, f"{field}.audio", "sound")
    calls = turns.calls_of(turn.get("tool_calls"), key, f"{field}.tool_calls")
    calls += turns.calls_of(turn.get("function_call"), key, f"{field}.function_call")
    content, thinking, more_calls = _content(turn, role, bool(calls), key, field)
    calls += more_calls
    if calls and role != "assistant":
        turns.fail(key, field, "bad_tool_call", f"a {role} turn cannot call a tool")
    return Message(
        role=cast(Role, role),
        content=content,
        thinking=thinking,
        tool_calls=calls,
        name=_optional(turn, "name", key, field),
        tool_call_id=_optional(turn, "tool_call_id", key, field),
        weight=turns.weight_of(turn, role, key, field),
    )


def _optional(turn: Row, name: str, key: str, field: str) -> str | None:
    value = turn.get(name)
    return None if value is None or value == "" else turns.string(value, key, f"{field}.{name}")


def _content(turn: Row, role: str, has_calls: bool, key: str, field: str) -> tuple[str, str | None, tuple[ToolCall, ...]]:
    thoughts = [turns.string(turn[name], key, f"{field}.{name}") for name in THINKING if turn.get(name)]
    thinking = thoughts[0] if thoughts else None
    value = turn.get("content")
    if value is None:
        if has_calls:
            return "", thinking, ()
        code = "empty_answer" if role == "assistant" else "no_content"
        reason = "a refusal is not trained on" if turn.get("refusal") else "the content is missing, and there is no tool call"
        turns.fail(key, f"{field}.content", code, reason)
    if isinstance(value, list):
        return _parts(value, thinking, key, f"{field}.content")
    if role == "tool" and isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False), thinking, ()
    return turns.string(value, key, f"{field}.content"), thinking, ()


def _parts(parts: list[Any], thinking: str | None, key: str, field: str) -> tuple[str, str | None, tuple[ToolCall, ...]]:
    texts: list[str] = []
    thoughts = [thinking] if thinking else []
    calls: tuple[ToolCall, ...] = ()
    for place, part in enumerate(parts):
        here = f"{field}[{place}]"
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, dict) else None
        if kind in turns.TEXT_PARTS:
            texts.append(part if isinstance(part, str) else _value(part, ("text", "value"), key, here))
        elif kind in turns.THINKING_PARTS:
            thoughts.append(_value(part, ("value", "text", *THINKING), key, here))
        elif kind == "tool_call":
            calls += turns.calls_of(part.get("value", part.get("tool_call")), key, here)
        else:
            turns.unsupported(key, here, f"a part of type {kind!r}")
    return "".join(texts), "\n".join(thoughts) if thoughts else None, calls


def _value(part: Row, names: tuple[str, ...], key: str, field: str) -> str:
    name = next((name for name in names if part.get(name) is not None), names[0])
    return turns.string(turns.required(part, name, key, field), key, f"{field}.{name}")
