"""A user's held-out rows as cases: what is asked, what is right, and which options are offered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.recipe import Source
from tunesmith.core.seed import stream
from tunesmith.core.types import Dialog, Message, Prompt, Row, Text, content_hash
from tunesmith.data import formats
from tunesmith.data.detect import LOOK, detect
from tunesmith.data.formats import FORMATS, turns
from tunesmith.data.problem import Problem
from tunesmith.data.readers import Found
from tunesmith.data.sources import read
from tunesmith.grade.options import LETTERS

Data = str | Path | Sequence[Row]
_SHOWN = 10


@dataclass(frozen=True)
class Case:
    """One held-out row; `options` are the texts it offers to choose from, if it does."""

    example: Dialog | Text
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Where the row comes from, as file:line."""
        return self.example.key

    def dialog(self) -> Dialog:
        """The row as a dialog. Raises DataError for running text, which asks nothing."""
        if isinstance(self.example, Dialog):
            return self.example
        raise DataError(
            "running text has no question and no answer",
            where=self.key,
            remedy="score it with the task perplexity, or give rows with messages or prompt and completion",
            code="no_question",
        )

    def prompt(self) -> Prompt:
        """All turns before the last answer, and that answer as the truth."""
        whole = self.dialog()
        return Prompt(whole.messages[:-1], whole.messages[-1].content, self.key, whole.tools)


def read_cases(data: Data, *, limit: int | None = None, seed: int = 0) -> list[Case]:
    """The cases of a file, folder, hub id, or of rows in memory, in any of our formats.

    Also read are rows of {"question" | "prompt" | "messages", "choices", "answer"}, the answer as text, letter or number from 0.
    limit takes a seeded random part, in file order. Raises DataError listing the first ten rows that cannot be used.
    """
    source = Source(path=str(data) if isinstance(data, str | Path) else "rows")
    found = read(source) if isinstance(data, str | Path) else ((f"row:{place}", row) for place, row in enumerate(data, 1))
    cases, problems = [], []
    for item in _examples(iter(found), source):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            cases.append(item)
    if problems:
        shown = "\n".join(f"  {problem.key}: {problem.message}" for problem in problems[:_SHOWN])
        raise DataError(
            f"{len(problems)} of {len(problems) + len(cases)} rows cannot be evaluated:\n{shown}",
            where=problems[0].key,
            remedy=problems[0].remedy or "mend or remove these rows",
            code=problems[0].code,
        )
    if not cases:
        raise DataError("there is not one row to evaluate", where=source.path, remedy="give held-out rows", code="empty_file")
    if limit is None or limit >= len(cases):
        return cases
    kept = stream(seed, "limit", len(cases)).permutation(len(cases))[:limit]
    return [cases[place] for place in sorted(int(place) for place in kept)]


def cases_hash(cases: Iterable[Case]) -> str:
    """SHA-256 of what the cases say, wherever they were read from."""
    return content_hash([{**asdict(case.example), "key": "", "options": list(case.options)} for case in cases])


def as_text(messages: Sequence[Message]) -> str:
    """Turns for people: one user turn is its text, more are headed by their roles."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"[{message.role}]\n{_words(message)}" for message in messages)


def _words(message: Message) -> str:
    calls = [f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in message.tool_calls]
    return "\n".join(part for part in (message.content, *calls) if part)


def _examples(found: Iterator[Found], source: Source) -> Iterator[Case | Problem]:
    head = [item for _, item in zip(range(LOOK), found, strict=False)]
    if any(isinstance(row, dict) and "choices" in row for _, row in head):
        make = _choice_case
    else:
        function = FORMATS.get(detect(head, source)).function

        def make(row: Row, key: str) -> Case:
            example = function(row, key)
            if not isinstance(example, Dialog | Text):
                raise DataError(
                    "the row holds preferences, labels or steps; evaluation reads dialogs and texts",
                    where=key,
                    remedy="score such rows with 'tunesmith score'",
                    code="wrong_kind",
                )
            return Case(example)

    for key, row in chain(head, found):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            yield make(row, key)
        except DataError as error:
            yield Problem.of(error, key)


def _choice_case(row: Row, key: str) -> Case:
    options = turns.from_json(turns.required(row, "choices", key), key, "choices")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        turns.fail(key, "choices", "bad_options", f"expected a list of 2 to {len(LETTERS)} options")
    texts = tuple(turns.string(option, key, f"choices[{place}]") for place, option in enumerate(options))
    if len(set(texts)) < len(texts) or not all(text.strip() for text in texts):
        turns.fail(key, "choices", "bad_options", "two options are the same, or one is empty")
    right = texts[_right(turns.required(row, "answer", key), texts, key)]
    if "messages" in row:
        asked = formats.messages.to_example({"messages": [*row["messages"], {"role": "assistant", "content": right}]}, key)
        return Case(asked, texts)
    name = next((name for name in ("question", "prompt") if name in row), "question")
    system = [Message("system", turns.string(row["system"], key, "system"))] if row.get("system") else []
    user = Message("user", turns.string(turns.required(row, name, key), key, name))
    return Case(turns.dialog([*system, user, Message("assistant", right)], key), texts)


def _right(answer: Any, options: tuple[str, ...], key: str) -> int:
    place = answer if isinstance(answer, int) and not isinstance(answer, bool) else -1
    if isinstance(answer, str):
        letter = answer.strip().upper()
        place = options.index(answer) if answer in options else LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else -1
    if not 0 <= place < len(options):
        said = f"{answer!r} is none of the {len(options)} options (text, letter, or number from 0)"
        turns.fail(key, "answer", "truth_not_option", said)
    return place
