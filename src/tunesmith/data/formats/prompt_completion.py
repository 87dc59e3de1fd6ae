"""Prompt-completion rows: {"prompt", "completion"}, each as text or as a list of messages; `system` and `tools` when there are.

Only the completion is trained: assistant turns inside a prompt get weight 0. Other names are mapped with `columns`, for
example {prompt: question, completion: answer}.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.core.types import Dialog, Message, Role, Row
from tunesmith.data.formats import turns
from tunesmith.data.formats.messages import read_turns

COLUMNS = ("prompt", "completion", "system", "tools")


def looks_like(row: Row) -> bool:
    """Has a prompt and a completion, and no label."""
    return "prompt" in row and "completion" in row and not turns.is_labelled(row)


def to_example(row: Row, key: str) -> Dialog:
    """The dialog of a row. Raises DataError naming the field at fault."""
    turns.refuse_media(row, key)
    turns.no_near_miss(row, COLUMNS, key, "")
    prompt = _side(turns.required(row, "prompt", key), "user", key, "prompt")
    completion = _side(turns.required(row, "completion", key), "assistant", key, "completion")
    context = [replace(message, weight=0.0) if message.role == "assistant" else message for message in prompt]
    return turns.dialog(turns.led_by_system(row, [*context, *completion], key), key, turns.tools_of(row.get("tools"), key))


def _side(value: Any, role: Role, key: str, field: str) -> list[Message]:
    if isinstance(value, list):
        return read_turns(value, key, field)
    if value is None:
        turns.fail(key, field, "empty_answer" if role == "assistant" else "empty_prompt", f"the {field} is null")
    return [Message(role, turns.string(value, key, field))]
