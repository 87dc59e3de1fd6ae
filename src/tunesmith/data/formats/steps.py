"""Solutions in steps, each with its label: {"prompt", "completions": ["step", ...], "labels": [true, false, ...]}.

Math-Shepherd's rows are read too: {"input": the question and the steps, each ended by the mark "ки", "label": the same text with + or - in
the place of each mark}. A label is true or false, or a number: how likely the solution is right up to there.
"""

from __future__ import annotations

import re

from tunesmith.core.types import Row, Steps
from tunesmith.data.formats import answers, turns

MARK = "ки"
COLUMNS = ("prompt", "completions", "labels", "input", "label", "system", "tools")
_SIGNED = re.compile(r"[+-][ \t]*(\n|$)")
_FIRST = re.compile(r"\bStep 1\s*:")


def looks_like(row: Row) -> bool:
    """Has steps and their labels, or a text with marks and the same text with signs."""
    return (isinstance(row.get("completions"), list) and "labels" in row) or _is_marked(row)


def to_example(row: Row, key: str) -> Steps:
    """The solution of a row.

    Raises DataError: "steps_and_labels", "no_steps", "empty_step", "label_missing", "bad_label", "step_marker_absent", "no_prompt".
    """
    turns.refuse_media(row, key)
    if "completions" not in row and "input" in row:
        prompt, steps, values = _read_marked(row, key)
    else:
        turns.no_near_miss(row, ("prompt", "completions", "labels", "system", "tools"), key, "")
        prompt, steps, values = _read_lists(row, key)
    if not steps:
        turns.fail(key, "completions", "no_steps", "the solution has no steps", "remove the row")
    if len(steps) != len(values):
        turns.fail(key, "labels", "steps_and_labels", f"{len(steps)} steps, but {len(values)} labels", "give each step one label")
    for place, step in enumerate(steps):
        if not step.strip():
            turns.fail(key, f"completions[{place}]", "empty_step", "the step is empty", "remove the step and its label")
    context = turns.led_by_system(row, answers.read(prompt, "user", key, "prompt"), key)
    found = Steps(tuple(context), tuple(steps), tuple(values), key, tools=turns.tools_of(row.get("tools"), key))
    answers.check(context, answers.solution(found), key, "")
    return found


def _is_marked(row: Row) -> bool:
    text, label = row.get("input"), row.get("label")
    if not isinstance(text, str) or not isinstance(label, str):
        return False
    # Without marks and signs it is a row of this kind all the same, and is refused for what it lacks.
    return MARK in text or bool(_SIGNED.search(label)) or bool(_FIRST.search(text) and _FIRST.search(label))


def _read_lists(row: Row, key: str) -> tuple[object, list[str], list[float]]:
    if row.get("labels") is None:
        turns.fail(key, "labels", "label_missing", "the steps have no labels", "give each step one")
    lists = []
    for name in ("completions", "labels"):
        found = turns.from_json(turns.required(row, name, key), key, name)
        if not isinstance(found, list):
            turns.fail(key, name, "not_a_list", f"expected a list, got {str(found)[:80]!r}")
        lists.append(found)
    steps = [turns.string(step, key, f"completions[{place}]") for place, step in enumerate(lists[0])]
    return turns.required(row, "prompt", key), steps, [_value(value, key, place) for place, value in enumerate(lists[1])]


def _value(label: object, key: str, place: int) -> float:
    if label is None:
        turns.fail(key, f"labels[{place}]", "label_missing", f"step {place + 1} has no label", "give it one, or remove the row")
    return answers.verdict(label, key, f"labels[{place}]")


def _read_marked(row: Row, key: str) -> tuple[object, list[str], list[float]]:
    text, label = (turns.string(turns.required(row, name, key), key, name) for name in ("input", "label"))
    *pieces, rest = text.split(MARK)
    if not pieces:
        turns.fail(key, "input", "step_marker_absent", f"no step of it ends with the mark {MARK!r}", f"end each step with {MARK}")
    if rest.strip():
        turns.fail(key, "input", "steps_and_labels", f"the text goes on behind the last mark: {rest.strip()[:60]!r}", "end it with a mark")
    values, position = [], 0
    for place, piece in enumerate(pieces):
        position += len(piece)
        sign = label[position : position + 1]
        if label[position - len(piece) : position] != piece or sign not in ("+", "-"):
            turns.fail(key, "label", "steps_and_labels", f"step {place + 1} is not the input's, with + or - for its mark", "mend the row")
        values.append(float(sign == "+"))
        position += 1
    first = _FIRST.search(pieces[0])
    if first is None or not pieces[0][: first.start()].strip():
        turns.fail(key, "input", "no_prompt", "no question stands before 'Step 1:'", "write the question, and then Step 1: ...")
    prompt, head = pieces[0][: first.start()].strip(), pieces[0][first.start() :]
    return prompt, [step.strip() for step in (head, *pieces[1:])], values
