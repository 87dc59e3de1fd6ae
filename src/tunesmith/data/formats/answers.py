"""What the shapes with judged answers share: reading one side, and the check that it is an answer to the prompt before it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.types import Dialog, Message, Pair, Role, Row, Steps
from tunesmith.data.formats import alpaca, messages, sharegpt, turns

TURNS = ("conversations", "conversation", "messages")
_HUMAN = re.compile(r"\s*Human:")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def behind(prompt: Sequence[Message], answer: Sequence[Message], key: str, tools: tuple[dict[str, Any], ...] = ()) -> Dialog:
    """The dialog of a prompt and an answer to it, of which the answer alone can be trained."""
    context = (replace(message, weight=0.0) if message.role == "assistant" else message for message in prompt)
    return Dialog((*context, *answer), key, tools)


def check(prompt: Sequence[Message], answer: Sequence[Message], key: str, field: str) -> None:
    """Raise DataError, naming the side, unless prompt and answer are a dialog that can be learned from."""
    try:
        turns.dialog(list(behind(prompt, answer, key).messages), key)
    except DataError as error:
        turns.fail(key, field, error.code, error.message, error.remedy)


def read(value: Any, role: Role, key: str, field: str) -> list[Message]:
    """The turns of one side: text, one turn, or a list of turns, in OpenAI's words or in ShareGPT's."""
    found = [value] if isinstance(value, dict) else value
    if not isinstance(found, list):
        return [Message(role, turns.string(found, key, field))]
    if turns.is_list_with(found, "from"):
        return sharegpt.read_turns(found, key, field)
    return messages.read_turns(found, key, field)


def read_prompt(row: Row, key: str) -> list[Message]:
    """The turns of a row's `prompt`, of its list of turns, or of its instruction and input.

    Raises DataError "no_prompt" when the row has none of them.
    """
    name = next((name for name in ("prompt", *TURNS) if row.get(name) is not None), None)
    if name is not None:
        found = turns.from_json(row[name], key, name) if name in TURNS else row[name]
        return from_transcript(found) or read(found, "user", key, name)
    if "instruction" not in row:
        has = ", ".join(map(str, row))
        turns.fail(key, "", "no_prompt", f"there is no prompt (it has: {has})", "give it under prompt; see data columns")
    return alpaca.read_prompt(row, key)


def pair(
    prompt: Sequence[Message],
    sides: Mapping[str, Sequence[Message]],
    key: str,
    tools: tuple[dict[str, Any], ...] = (),
    margin: float | None = None,
) -> Pair:
    """The checked pair of two answers, the preferred one first, each under its name in the row.

    Raises DataError "empty_chosen", "empty_rejected", "same_answers", and what a dialog that cannot be learned from raises.
    """
    for word, (name, answer) in zip(("chosen", "rejected"), sides.items(), strict=True):
        if not any(message.content.strip() or message.tool_calls for message in answer):
            turns.fail(key, name, f"empty_{word}", f"the {word} answer is empty", "remove the row, or give it an answer")
        check(prompt, answer, key, name)
    chosen, rejected = sides.values()
    if said(chosen) == said(rejected):
        turns.fail(key, "", "same_answers", "chosen and rejected are the same answer, so neither is better", "remove the row")
    return Pair(tuple(prompt), tuple(chosen), tuple(rejected), key, tools, margin)


def read_side(value: Any, word: str, key: str, field: str) -> list[Message]:
    """The turns of the "chosen" or "rejected" side. Raises DataError "empty_chosen" or "empty_rejected" where nothing is said."""
    if value is None:
        turns.fail(key, field, f"empty_{word}", f"the {word} answer is null", "remove the row, or give it an answer")
    try:
        return read(value, "assistant", key, field)
    except DataError as error:
        raise (
            error if error.code != "empty_answer" else DataError(error.message, where=key, remedy=error.remedy, code=f"empty_{word}")
        ) from error


def said(answer: Sequence[Message]) -> list[object]:
    """What an answer says, without outer white space and without the names that calls happen to have."""
    return [
        (turn.role, turn.content.strip(), (turn.thinking or "").strip(), [(call.name, call.arguments) for call in turn.tool_calls])
        for turn in answer
    ]


def number(value: Any, key: str, field: str, code: str, expected: str = "a number") -> float:
    """A finite number, also as text, which is all that csv knows. Raises DataError with this code when it is anything else."""
    read: Any = None if isinstance(value, bool) else value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            read = float(value)
    if not isinstance(read, int | float) or not math.isfinite(read):
        turns.fail(key, field, code, f"expected {expected}, got {str(value)[:80]!r}")
    return float(read)


def verdict(value: Any, key: str, field: str) -> float:
    """A label: true or false as 1 or 0, or a number. Raises DataError `bad_label` when it is anything else."""
    if isinstance(value, bool):
        return float(value)
    said = turns.VERDICTS.get(value.strip().lower()) if isinstance(value, str) else None
    return said if said is not None else number(value, key, field, "bad_label", "true, false or a number")


def from_transcript(text: Any) -> list[Message]:
    r"""The turns of Anthropic's "\n\nHuman: ... \n\nAssistant: ..."; none when the text does not begin like one.

    An "Assistant:" with nothing behind it, at the end, asks for the answer and is no turn.
    """
    if not isinstance(text, str) or not _HUMAN.match(text):
        return []
    pieces = _SPEAKER.split(f"\n\n{text.lstrip()}")[1:]
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    found = [Message(roles[who], words.strip()) for who, words in zip(pieces[::2], pieces[1::2], strict=True)]
    return found[:-1] if found[-1].role == "assistant" and not found[-1].content else found


def solution(steps: Steps) -> list[Message]:
    """The answer that steps make together."""
    return [Message("assistant", steps.separator.join(steps.steps))]
