"""What the shapes share: reading one turn's parts, tools and calls, and the check that a dialog can be learned from."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

from tunesmith.core.errors import DataError, did_you_mean
from tunesmith.core.types import Dialog, Message, Row, ToolCall
from tunesmith.data.readers import parse_json

TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("reasoning", "thinking")
LABELS = ("label", "kto_tag")
VERDICTS = {"true": 1.0, "false": 0.0}  # as text, in any case
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def fail(key: str, field: str, code: str, message: str, remedy: str = "") -> NoReturn:
    """Refuse a row: `field` is the path inside the row."""
    raise DataError(
        f"{field}: {message}" if field else message,
        where=key,
        remedy=remedy or "mend the row",
        code=code,
    )


def required(row: Row, name: str, key: str, field: str = "") -> Any:
    """The value under `name` in the row, or in its part at `field`; or the refusal that names the nearest key."""
    if name not in row:
        has = f"it has: {', '.join(map(str, row)) or 'nothing'}"
        fail(key, field, "wrong_key", f"there is no '{name}'{did_you_mean(name, row)}", f"{has}; see data columns")
    return row[name]


def is_list_with(value: Any, word: str) -> bool:
    """Is it a list, or the JSON text of one, with objects that have this key?"""
    if isinstance(value, str):
        return value.lstrip().startswith("[") and f'"{word}"' in value
    return isinstance(value, list) and any(isinstance(item, dict) and word in item for item in value)


def is_pair(row: Row) -> bool:
    """Has the row two answers, one preferred to the other?"""
    return "chosen" in row and "rejected" in row


def is_labelled(row: Row) -> bool:
    """Has the row a yes or no, or a number, for a label? Words are a class, and no verdict on an answer.

    Where a file knows text alone (csv), true, false, 0 and 1 are written as text.
    """
    return any(
        name in row
        and (row[name] is None or isinstance(row[name], bool | int | float) or str(row[name]).strip().lower() in (*VERDICTS, "0", "1"))
        for name in LABELS
    )


def string(value: Any, key: str, field: str) -> str:
    """The value as text. Numbers are taken as they are written; anything else is refused."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    fail(key, field, "not_text", f"expected text, got {json.dumps(value, default=str, ensure_ascii=False)[:80]}")


def from_json(value: Any, key: str, field: str) -> Any:
    """The value, parsed when it is JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        fail(key, field, "broken_json", f"this string is not JSON ({error}): {value[:80]!r}")


def tools_of(value: Any, key: str) -> tuple[dict[str, Any], ...]:
    """The tools offered, in OpenAI's wrapped form, from a list or its JSON text; bare function schemas are wrapped."""
    if value is None or value == "" or value == []:
        return ()
    value = from_json(value, key, "tools")
    if not isinstance(value, list):
        fail(key, "tools", "bad_tools", f"expected a list of function schemas, got {str(value)[:80]!r}")
    return tuple(_tool(from_json(item, key, f"tools[{place}]"), key, f"tools[{place}]") for place, item in enumerate(value))


def _tool(item: Any, key: str, field: str) -> dict[str, Any]:
    wrapped = isinstance(item, dict) and isinstance(item.get("function"), dict)
    inner = item["function"] if wrapped else item
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        fail(key, field, "bad_tools", "a tool is a function schema with a name")
    return item if wrapped else {"type": "function", "function": inner}


def calls_of(value: Any, key: str, field: str) -> tuple[ToolCall, ...]:
    """Tool calls from OpenAI's list, a bare {name, arguments}, a list of those, or JSON text of any."""
    value = from_json(value, key, field)
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    return tuple(_call(from_json(item, key, field), key, f"{field}[{place}]") for place, item in enumerate(items))


def _call(item: Any, key: str, field: str) -> ToolCall:
    inner = item["function"] if isinstance(item, dict) and isinstance(item.get("function"), dict) else item
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        fail(key, field, "bad_tool_call", f"a call needs a name and arguments, got {str(item)[:80]!r}")
    arguments = inner.get("arguments", inner.get("parameters"))
    arguments = from_json(arguments, key, f"{field}.arguments") if arguments not in (None, "") else {}
    if not isinstance(arguments, dict):
        fail(key, f"{field}.arguments", "bad_tool_call", f"arguments are a JSON object, got {str(arguments)[:80]!r}")
    identity = item.get("id")
    return ToolCall(inner["name"], arguments, identity if isinstance(identity, str) and identity else None)


def call_text(value: Any, key: str, field: str) -> tuple[str | None, tuple[ToolCall, ...]]:
    """Thinking and calls of a turn that is the JSON of its calls, perhaps after a <think> part."""
    thinking = None
    if isinstance(value, str) and (found := _THOUGHT.match(value)):
        thinking, value = found[1].strip("\n"), value[found.end() :]
    return thinking, calls_of(value, key, field)


def weight_of(turn: Row, role: str, key: str, field: str) -> float:
    """The training weight of a turn: `weight`, `loss_weight` or `train`; only an assistant turn may have one other than 0."""
    given = [name for name in ("weight", "loss_weight", "train") if turn.get(name) is not None]
    if not given:
        return 1.0
    value = turn[given[0]]
    if len(given) > 1 and len({float(turn[name]) for name in given if isinstance(turn[name], int | float)}) != 1:
        fail(key, field, "bad_weight", f"{' and '.join(given)} disagree")
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        fail(key, f"{field}.{given[0]}", "bad_weight", f"expected a number of at least 0, got {value!r}")
    if role != "assistant" and value:
        fail(
            key,
            f"{field}.{given[0]}",
            "bad_weight",
            f"a {role} turn is never trained, but has weight {value}",
            "only assistant turns have a weight",
        )
    return float(value) if role == "assistant" else 1.0


def no_near_miss(row: Row, known: Sequence[str], key: str, field: str) -> None:
    """Refuse a key that is nearly one of ours that is not there (`wieght`), because it would be ignored unseen."""
    miss = _near_miss(tuple(map(str, row)), tuple(known))
    if miss is not None:
        fail(key, field, "wrong_key", f"unknown key '{miss[0]}'; did you mean '{miss[1]}'?")


@lru_cache(maxsize=1024)  # rows of one file have the same few sets of keys
def _near_miss(names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, str] | None:
    absent = [name for name in known if name not in names and len(name) > 3]
    for name in names:
        for ours in difflib.get_close_matches(name, absent, n=1, cutoff=0.8):
            if name not in known and name[:1] == ours[:1]:
                return name, ours
    return None


def led_by_system(row: Row, messages: list[Message], key: str) -> list[Message]:
    """The turns with the row's own `system` in front, when it has one. Raises DataError when the turns begin with another."""
    if not row.get("system"):
        return messages
    system = string(row["system"], key, "system")
    if messages and messages[0].role in ("system", "developer"):
        if messages[0].content != system:
            fail(key, "system", "two_systems", "the row has a system text, and its turns begin with another one", "keep one of them")
        return messages
    return [Message("system", system), *messages]


def unsupported(key: str, field: str, what: str) -> NoReturn:
    """Refuse pictures, sound and the like."""
    fail(key, field, "unsupported_part", f"{what} cannot be trained on: text only", "keep the text alone")


def refuse_media(row: Row, key: str) -> None:
    """Refuse a row that carries pictures, sound or video beside its text."""
    for name in ("images", "image", "audios", "audio", "videos", "video"):
        if row.get(name):
            unsupported(key, name, f"'{name}'")


def dialog(messages: list[Message], key: str, tools: tuple[dict[str, Any], ...] = ()) -> Dialog:
    """The checked dialog of these turns. Raises DataError when nothing could be learned from it or its order is broken."""
    roles = [message.role for message in messages]
    spoken = [role for role in roles if role not in ("system", "developer")]
    if not roles:
        fail(key, "", "no_messages", "the dialog has no turns")
    if not spoken:
        fail(key, "", "only_system", "the dialog is a system prompt and nothing else")
    if "assistant" not in spoken:
        fail(key, "", "no_assistant", "no assistant turn: there is nothing to learn")
    if spoken[0] != "user":
        code = "assistant_first" if spoken[0] == "assistant" else "tool_first"
        fail(key, "", code, f"the {spoken[0]} speaks before any user turn", "put the user's turn first")
    if spoken[-1] != "assistant":
        fail(
            key, "", "last_not_assistant", f"the last turn is the {spoken[-1]}'s, not the assistant's", "remove the turn or add the answer"
        )
    for place, message in enumerate(messages):
        _check_turn(message, messages[:place], key, f"turn {place + 1} ({message.role})")
    if not any(message.weight for message in messages if message.role == "assistant"):
        fail(key, "", "nothing_trained", "every assistant turn has weight 0")
    return Dialog(tuple(messages), key, tools)


def _check_turn(message: Message, before: list[Message], key: str, field: str) -> None:
    if message.role == "tool" and not _answers_a_call(before):
        fail(key, field, "tool_without_call", "a tool's result that follows no assistant turn")
    if message.content.strip() or message.tool_calls:
        return
    if message.role == "assistant" and message.weight:
        fail(key, field, "empty_answer", "the answer is empty")
    if message.role == "user":
        fail(key, field, "empty_prompt", "the user's turn is empty")


def _answers_a_call(before: list[Message]) -> bool:
    others = [message.role for message in before if message.role != "tool"]
    return bool(others) and others[-1] == "assistant"
