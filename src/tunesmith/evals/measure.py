"""One model on one set of cases: for every task the numbers of every row, before anything is averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tunesmith.core.errors import RecipeError
from tunesmith.core.ports import SampleSettings
from tunesmith.core.types import Dialog, Text, Tokens
from tunesmith.data import overlong, render
from tunesmith.data.tokenizer import vocabulary
from tunesmith.evals.likelihood import row_sums
from tunesmith.evals.opening import Opened
from tunesmith.evals.rows import Case
from tunesmith.evals.task import Task
from tunesmith.grade.options import LETTERS
from tunesmith.infer.generate import chat_sampler, prompt_ids
from tunesmith.infer.sampler import context_limit

Place = int  # of a case in the list of all cases


@dataclass
class Measured:
    """`values[task label][metric][place]` is a grade, or (sum, count) where a ratio is to be made; answers and grades by place."""

    values: dict[str, dict[str, dict[Place, tuple[float, float]]]] = field(default_factory=dict)
    answers: dict[Place, str] = field(default_factory=dict)
    grades: dict[Place, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, why: str, key: str) -> None:
        """Note that a case was not measured."""
        self.left_out.setdefault(why, []).append(key)


def measure(opened: Opened, tasks: Sequence[Task], cases: Sequence[Case], *, max_new_tokens: int) -> Measured:
    """Every task on every case that fits the model's context; greedy answers, one generation for all tasks that grade one.

    Raises GradeError before anything is generated when a truth cannot be graded against; RecipeError when options are missing.
    """
    check_truths(tasks, cases)
    out = Measured()
    if any(task.kind == "answer" for task in tasks):
        _answer(out, opened, cases, max_new_tokens)
    for task in tasks:
        if task.kind == "likelihood":
            out.values[task.label] = {"perplexity": _likelihoods(out, opened, cases)}
        elif task.kind == "options":
            out.values[task.label] = _choices(out, opened, cases, options_of(task, cases))
        else:
            grades = {place: task.grade(cases[place], final_words(answer)).value for place, answer in out.answers.items()}
            for place, grade in grades.items():
                out.grades.setdefault(place, {})[task.label] = grade
            out.values[task.label] = {task.metric: {place: (grade, 1.0) for place, grade in grades.items()}}
    return out


def check_truths(tasks: Sequence[Task], cases: Sequence[Case]) -> None:
    """Grade an empty answer to every case, so that a truth that cannot be graded against fails now and not after an hour."""
    for task in tasks:
        if task.kind == "answer":
            for case in cases:
                task.grade(case, "")
        elif task.kind == "options":
            options_of(task, cases)


def final_words(answer: str) -> str:
    """The answer without its thinking part, as a reader of the chat sees it."""
    return answer.rpartition("</think>")[2]


def options_of(task: Task, cases: Sequence[Case]) -> list[tuple[str, ...]]:
    """The options of every case: its own, else the task's, else all different truths of the data.

    Raises RecipeError when that gives fewer than 2 or more than 26, or when a truth is none of them.
    """
    truths = [case.prompt().truth for case in cases]
    shared = tuple(str(option) for option in task.settings.get("options", ())) or tuple(sorted(set(truths)))
    out = [case.options or shared for case in cases]
    for case, truth, options in zip(cases, truths, out, strict=True):
        if not 2 <= len(options) <= len(LETTERS) or truth not in options:
            what = f"{len(options)} options" if truth in options else f"an answer {truth[:40]!r} that is none of the options"
            raise RecipeError(
                f"the task '{task.name}' has {what}",
                where=case.key,
                remedy=f"give rows with choices, or set options of the task (2 to {len(LETTERS)} texts, the answers among them)",
                code="bad_options",
            )
    return out


def _answer(out: Measured, opened: Opened, cases: Sequence[Case], max_new_tokens: int) -> None:
    limit = context_limit(opened.policy.model)
    prompts: dict[Place, list[int]] = {}
    for place, case in enumerate(cases):
        ids = prompt_ids(case.prompt(), opened.tokenizer, opened.template)
        if limit is not None and len(ids) >= limit:
            out.leave_out(f"the prompt fills the context of {limit} tokens", case.key)
        else:
            prompts[place] = ids
    sampler = chat_sampler(opened.policy, opened.tokenizer, opened.template)
    rows = sampler.sample(list(prompts.values()), SampleSettings(max_new_tokens=max_new_tokens, temperature=0.0))
    out.answers = {place: row[0].text for place, row in zip(prompts, rows, strict=True)}


def _likelihoods(out: Measured, opened: Opened, cases: Sequence[Case]) -> dict[Place, tuple[float, float]]:
    limit = context_limit(opened.policy.model)
    rows: list[Tokens] = []
    owners: list[Place] = []
    for place, case in enumerate(cases):
        # A dialog gives several when its template shows earlier turns otherwise than it asked for them.
        parts = [made.tokens for made in render.render(case.example, opened.template, opened.tokenizer)]
        if limit is not None and max(len(part) for part in parts) > limit:
            if isinstance(case.example, Text):
                parts = overlong.split_text(parts[0], limit, _bos(opened))
            else:
                parts = []
                out.leave_out(f"the row is longer than the context of {limit} tokens", case.key)
        rows += parts
        owners += [place] * len(parts)
    sums, weights = row_sums(opened.policy, rows)
    found: dict[Place, tuple[float, float]] = {}
    for place, loss, weight in zip(owners, sums.tolist(), weights.tolist(), strict=True):
        before = found.get(place, (0.0, 0.0))
        found[place] = (before[0] + loss, before[1] + weight)
    return {place: pair for place, pair in found.items() if pair[1] > 0}


def _choices(
    out: Measured, opened: Opened, cases: Sequence[Case], options: Sequence[tuple[str, ...]]
) -> dict[str, dict[Place, tuple[float, float]]]:
    limit = context_limit(opened.policy.model)
    rows: dict[tuple[Place, int], Tokens] = {}
    for place, case in enumerate(cases):
        made = {(place, number): _option(opened, case.dialog(), text) for number, text in enumerate(options[place])}
        if limit is not None and max(len(row) for row in made.values()) > limit:
            out.leave_out(f"an option does not fit the context of {limit} tokens", case.key)
        else:
            rows |= made
    sums, _ = row_sums(opened.policy, list(rows.values()))
    logps = dict(zip(rows, (-sums).tolist(), strict=True))
    by_sum: dict[Place, tuple[float, float]] = {}
    by_byte: dict[Place, tuple[float, float]] = {}
    for place in dict.fromkeys(place for place, _ in rows):
        texts = options[place]
        right = texts.index(cases[place].prompt().truth)
        total = np.array([logps[place, number] for number in range(len(texts))])
        by_sum[place] = (credit(total, right), 1.0)
        by_byte[place] = (credit(total / [len(text.encode()) for text in texts], right), 1.0)
    return {"accuracy": by_sum, "accuracy_per_byte": by_byte}


def credit(scores: np.ndarray[tuple[int], np.dtype[np.float64]], right: int) -> float:
    """1 when the right option scores highest, and its share when several tie there: order must not decide."""
    best = np.isclose(scores, scores.max(), rtol=0, atol=1e-9)
    return float(best[right] / best.sum())


def _option(opened: Opened, dialog: Dialog, text: str) -> Tokens:
    """The dialog with this option as its answer; only the option's words are scored, not the token that ends the turn."""
    answer = replace(dialog.messages[-1], content=text, thinking=None, tool_calls=(), weight=1.0)
    asked = tuple(replace(message, weight=0.0) if message.role == "assistant" else message for message in dialog.messages[:-1])
    tokens = render.render(Dialog((*asked, answer), dialog.key, dialog.tools), opened.template, opened.tokenizer, turns="last")[-1].tokens
    train = tokens.train.copy()
    last = int(np.flatnonzero(train)[-1])
    if int(tokens.ids[last]) in render.stop_ids(opened.template, opened.tokenizer):
        train[last] = 0
    return replace(tokens, train=train)


def _bos(opened: Opened) -> int | None:
    known = vocabulary(opened.tokenizer)
    return known.special[known.bos] if known.bos else None


def left_out_notes(parts: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for every reason why rows were left out."""
    return [
        f"{len(keys)} rows were left out because {why}: {', '.join(list(keys)[:3])}{', ...' if len(keys) > 3 else ''}."
        for why, keys in parts.items()
    ]
