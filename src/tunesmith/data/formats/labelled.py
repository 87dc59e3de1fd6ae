"""Single answers with a label: {"prompt", "completion", "label"}, or {"messages", "label"} where the last turn is the answer.

The turns may stand under `conversations` (ShareGPT or OpenAI turns) too, or the row be Alpaca's (instruction, input, output); the label
may stand under `kto_tag`. It is true or false (or 1 or 0);
a number of another size, or under `score`, is a score, which a reward model can be fitted to. With both, the label counts.
"""

from __future__ import annotations

from tunesmith.core.errors import did_you_mean
from tunesmith.core.types import Labelled, Message, Row
from tunesmith.data.formats import answers, turns

VALUES = (*turns.LABELS, "score")
COLUMNS = ("prompt", "completion", *answers.TURNS, *VALUES, "instruction", "input", "output", "history", "system", "tools")


def looks_like(row: Row) -> bool:
    """Has an answer and a label or a score."""
    scored = isinstance(row.get("score"), int | float)
    return has_answer(row) and (scored or turns.is_labelled(row)) and not turns.is_pair(row)


def has_answer(row: Row) -> bool:
    """Has a prompt and a completion, an instruction and an output, or a list of turns."""
    both = ("prompt" in row and "completion" in row) or ("instruction" in row and "output" in row)
    return both or any(turns.is_list_with(row.get(name), word) for name in answers.TURNS for word in ("role", "from"))


def to_example(row: Row, key: str) -> Labelled:
    """The labelled answer of a row. Raises DataError: "label_missing", "bad_label", and those of a dialog that cannot be learned from."""
    turns.refuse_media(row, key)
    turns.no_near_miss(row, ("system", "tools"), key, "")
    value = _value(row, key)
    tools = turns.tools_of(row.get("tools"), key)
    prompt, answer = _read(row, key)
    prompt = turns.led_by_system(row, prompt, key)
    answers.check(prompt, answer, key, "")
    return Labelled(tuple(prompt), tuple(answer), value, key, tools)


def _read(row: Row, key: str) -> tuple[list[Message], list[Message]]:
    if row.get("prompt") is None and (name := next((name for name in (*answers.TURNS, "completion") if name in row), None)):
        value = turns.from_json(row[name], key, name) if name in answers.TURNS else row[name]
        if not isinstance(value, list):
            turns.fail(key, name, "no_prompt", "there is no prompt that this answers", "give it under prompt; see data columns")
        whole = answers.read(value, "assistant", key, name)
        return whole[:-1], whole[-1:]
    name = "output" if "output" in row and "completion" not in row else "completion"
    given = turns.required(row, name, key)
    if given is None:
        turns.fail(key, name, "empty_answer", "the answer is null")
    return answers.read_prompt(row, key), answers.read(given, "assistant", key, name)


def _value(row: Row, key: str) -> float:
    name = next((name for name in VALUES if row.get(name) is not None), None)
    if name is None:
        near = next((near for word in row if word not in COLUMNS and (near := did_you_mean(str(word), VALUES))), "")
        turns.fail(key, "label", "label_missing", f"the answer has no label{near}", "say label: true or false, or remove the row")
    return answers.verdict(row[name], key, name)
