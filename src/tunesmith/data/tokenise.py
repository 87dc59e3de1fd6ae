"""Rows of one shape become tokens, or reasons why not: a pure function of the rows, run in this process or in a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from tunesmith.core.errors import BugError, DataError, TemplateError, TunesmithError
from tunesmith.core.recipe import TokenLimits
from tunesmith.core.types import Dialog, Example, Message, Row, Text, Tokens, content_hash
from tunesmith.data.formats import FORMATS
from tunesmith.data.ledger import Fate
from tunesmith.data.overlong import cut_prompt, last_part, split_dialog, split_text, surely_over
from tunesmith.data.problem import Problem
from tunesmith.data.readers import Found
from tunesmith.data.render import Rendered, render_many
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer, tokenizer_hash


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that yields no tokens, with its fate and reason; `content` is its hash, "" when there is nothing to hash."""

    fate: Fate
    problem: Problem
    content: str = ""


@dataclass(frozen=True, slots=True)
class Used:
    """What a row became.

    `tokens` stand after the length policy; `before` and `longest` (tokens in all and of the longest text), `by_role` (role -> trained,
    untrained) and `notes` speak of it before. `content` is the row's hash, `lost` says what a split left out.
    """

    content: str
    tokens: list[Tokens]
    before: int
    longest: int
    by_role: dict[str, tuple[int, int]]
    notes: tuple[str, ...]
    fate: Literal["", "cut", "split"] = ""
    lost: tuple[str, ...] = ()


Outcome = Refused | Used


class _RefusalError(Exception):
    def __init__(self, fate: Fate, problem: Problem) -> None:
        super().__init__(problem.message)
        self.fate = fate
        self.problem = problem


class Tokeniser:
    """Everything that rows are tokenised with."""

    def __init__(self, turns: Literal["all", "last"], limits: TokenLimits, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._turns = turns
        self._limits = limits
        self._template = template
        self._tokenizer = tokenizer
        self._bos: int | None = tokenizer.bos_token_id

    @cached_property
    def _longest_piece(self) -> int:
        return max((len(piece) for piece in self._tokenizer.get_vocab()), default=1)

    @property
    def hash(self) -> str:
        """64 hex digits of all that decides what rows become."""
        return content_hash([self._turns, self._limits.model_dump(mode="json"), self._template.hash, tokenizer_hash(self._tokenizer)])

    def rows(self, format: str, found: Sequence[Found]) -> list[Outcome]:
        """The outcome of each row, in order; all of them are encoded together. Raises BugError when the accounts disagree."""
        outcomes: dict[int, Outcome] = {}
        examples: dict[int, Example] = {}
        for place, (key, row) in enumerate(found):
            started = self._start(format, row, key)
            if isinstance(started, Refused):
                outcomes[place] = started
            else:
                examples[place] = started
        rendered = render_many(list(examples.values()), self._template, self._tokenizer, turns=self._turns)
        for (place, example), forms in zip(examples.items(), rendered, strict=True):
            outcomes[place] = self._end(example, forms)
        return [outcomes[place] for place in range(len(found))]

    def _start(self, format: str, row: Row | Problem, key: str) -> Example | Refused:
        if isinstance(row, Problem):
            return Refused("refused", row)
        try:
            example = FORMATS[format].function(row, key)
        except DataError as error:
            return Refused("refused", Problem.of(error, key))
        limit = self._limits.max_length
        refuses = self._limits.overlong in ("drop", "error")
        # A piece has one character at least: the vocabulary is only asked for its longest where that could matter.
        if refuses and surely_over(example, limit, 1) and surely_over(example, limit, self._longest_piece):
            over = self._over(key, f"over {limit} tokens by its length in characters alone")
            return Refused(over.fate, over.problem, hash_of(example))
        return example

    def _end(self, example: Example, found: list[Rendered] | DataError | TemplateError) -> Outcome:
        content = hash_of(example)
        try:
            return self._bounded(example, content, _trained(found, example.key))
        except _RefusalError as refusal:
            return Refused(refusal.fate, refusal.problem, content)

    def _bounded(self, example: Example, content: str, rendered: list[Rendered]) -> Used:
        longest = max(len(item.tokens) for item in rendered)
        if longest <= self._limits.max_length:
            return _used(content, rendered, [item.tokens for item in rendered])
        if self._limits.overlong == "cut_prompt":
            return _used(content, rendered, self._cut(rendered, example.key), "cut")
        if self._limits.overlong == "split":
            if isinstance(example, Text):
                limit = self._limits.max_length
                return _used(
                    content, rendered, [piece for item in rendered for piece in split_text(item.tokens, limit, self._bos)], "split"
                )
            kept, lost = self._split(example)
            return _used(content, kept, [item.tokens for item in kept], "split", lost)
        raise self._over(example.key, f"{longest} tokens, over max_length = {self._limits.max_length}")

    def _over(self, key: str, message: str) -> _RefusalError:
        fate: Fate = "refused" if self._limits.overlong == "error" else "dropped"
        return _RefusalError(
            fate, Problem(key, "over_length", message, "raise tokens.max_length, or choose tokens.overlong: cut_prompt or split")
        )

    def _cut(self, rendered: list[Rendered], key: str) -> list[Tokens]:
        limit = self._limits.max_length
        cut = [cut_prompt(item.tokens, limit, self._bos) for item in rendered]
        whole = [tokens for tokens in cut if tokens is not None]
        if len(whole) < len(cut):
            message = f"from the first trained token on it is over max_length = {limit} tokens, and answers are never cut"
            raise _RefusalError("dropped", Problem(key, "answer_over_length", message, "raise tokens.max_length"))
        return whole

    def _split(self, dialog: Dialog) -> tuple[list[Rendered], tuple[str, ...]]:
        """The shorter dialogs that fit, and what is said of those that do not."""
        limit = self._limits.max_length

        def fits(shorter: Dialog) -> bool:
            return not _learns(shorter) or all(len(item.tokens) <= limit for item in self._again(shorter))

        kept: list[Rendered] = []
        lost: list[str] = []
        pieces = [last_part(dialog, fits)] if self._turns == "last" else split_dialog(dialog, fits)
        for piece in pieces:
            if not _learns(piece):
                continue
            forms = self._again(piece)
            if all(len(item.tokens) <= limit for item in forms):
                kept += forms
            else:
                lost.append(f"{piece.key} is over max_length = {limit} tokens in one exchange and is left out")
        if not kept:
            message = f"every exchange alone is over max_length = {limit} tokens"
            raise _RefusalError("dropped", Problem(dialog.key, "exchange_over_length", message, "raise tokens.max_length"))
        return kept, tuple(lost)

    def _again(self, shorter: Dialog) -> list[Rendered]:
        (found,) = render_many([shorter], self._template, self._tokenizer, turns=self._turns)
        return _trained(found, shorter.key)


def _trained(found: list[Rendered] | DataError | TemplateError, key: str) -> list[Rendered]:
    if isinstance(found, TunesmithError):
        raise _RefusalError("refused", Problem.of(found, key)) from found
    trained = [item for item in found if item.tokens.train.any()]
    if not trained:
        problem = Problem(key, "no_trained_tokens", "no token of the row would be trained", "see `tunesmith show`")
        raise _RefusalError("refused", problem)
    return trained


def _used(
    content: str, rendered: list[Rendered], tokens: list[Tokens], fate: Literal["", "cut", "split"] = "", lost: tuple[str, ...] = ()
) -> Used:
    by_role: dict[str, tuple[int, int]] = {}
    for item in rendered:
        for role, (yes, no) in item.by_role.items():
            old = by_role.get(role, (0, 0))
            by_role[role] = (old[0] + yes, old[1] + no)
    trained = sum(yes for yes, _ in by_role.values())
    if trained != (kept := sum(int(np.count_nonzero(row.train)) for row in tokens)):
        raise BugError(f"{trained} trained tokens were rendered, {kept} are left after the length policy", where=rendered[0].tokens.key)
    sizes = [len(item.tokens) for item in rendered]
    notes = tuple(dict.fromkeys(note for item in rendered for note in item.notes))
    return Used(content, tokens, sum(sizes), max(sizes), by_role, notes, fate, lost)


def _learns(dialog: Dialog) -> bool:
    return any(message.weight for message in dialog.messages if message.role == "assistant")


def hash_of(example: Example) -> str:
    """64 hex digits of what an example says, wherever it stands: copies have the same."""
    if isinstance(example, Text):
        return content_hash(example.text)
    return content_hash([[_said(message) for message in example.messages], list(example.tools)])


def _said(message: Message) -> list[object]:
    calls = [[call.name, call.arguments] for call in message.tool_calls]
    return [message.role, message.content, message.thinking, calls]
