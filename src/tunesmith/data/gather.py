"""Rows of all sources become tokens, one after the other, and each is entered into the ledger with what became of it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal

from tunesmith.core.errors import BugError, DataError, RecipeError, TemplateError, TunesmithError
from tunesmith.core.recipe import Fraction, Recipe, Source
from tunesmith.core.types import Dialog, Example, Message, Prompt, Text, Tokens, content_hash
from tunesmith.data.dataset import Builder
from tunesmith.data.detect import LOOK, check_columns, detect, hold
from tunesmith.data.formats import COLUMNS, FORMATS
from tunesmith.data.ledger import Fate, Ledger, Part
from tunesmith.data.notes import explain
from tunesmith.data.overlong import cut_prompt, last_part, split_dialog, split_text, surely_over
from tunesmith.data.problem import Problem
from tunesmith.data.render import Rendered, render
from tunesmith.data.sources import read
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]
LISTED = 1000  # problems kept with their own words; the ledger counts all
_EVERY = 100  # rows between two reports of progress


@dataclass
class Gathered:
    """The rows as tokens, the account, the problems of rows, and the faults that made a whole source unreadable."""

    train: Builder = field(default_factory=Builder)
    validation: Builder = field(default_factory=Builder)
    ledger: Ledger = field(default_factory=Ledger)
    problems: list[Problem] = field(default_factory=list)
    faults: list[TunesmithError] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)


class _RefusalError(Exception):
    """A row that yields no tokens, with its fate and reason."""

    def __init__(self, fate: Fate, problem: Problem) -> None:
        super().__init__(problem.message)
        self.fate = fate
        self.problem = problem


@dataclass(frozen=True)
class _Row:
    """What one row became: the rendered forms as they were, and the tokens after the length policy."""

    rendered: list[Rendered]
    tokens: list[Tokens]
    fate: Literal["", "cut", "split"] = ""
    lost: tuple[str, ...] = ()


def gather(
    recipe: Recipe, tokenizer: Tokenizer, template: ChatTemplate, prompts: int, progress: Callable[[int], None] | None = None
) -> Gathered:
    """Read, render and bound every row of a recipe's sources; nothing is raised for a bad row or source, all of it is noted.

    `prompts` is how many prompts with their true answers are kept for the report; `progress` is called with the rows read since.
    """
    gatherer = _Gatherer(recipe, tokenizer, template, prompts, progress)
    validation = recipe.data.validation
    for split, source in _sources(recipe):
        try:
            gatherer.source(split, source, validation.fraction if isinstance(validation, Fraction) else 0.0)
        except (DataError, RecipeError) as error:
            gatherer.out.faults.append(error)
    return gatherer.finish()


def _sources(recipe: Recipe) -> Iterator[tuple[Split, Source]]:
    for source in recipe.data.train:
        yield "train", source
    if isinstance(recipe.data.validation, list):
        for source in recipe.data.validation:
            yield "validation", source


class _Gatherer:
    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, template: ChatTemplate, prompts: int, progress: Callable[[int], None] | None
    ) -> None:
        self.out = Gathered()
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._template = template
        self._wanted = prompts
        self._progress = progress
        self._unreported = 0
        self._bos: int | None = tokenizer.bos_token_id
        self._longest_piece = max((len(piece) for piece in tokenizer.get_vocab()), default=1)
        self._seen: dict[Split, set[str]] = {"train": set(), "validation": set()}
        self._held: list[tuple[str, str, Part]] = []
        self._prompts: dict[Split, list[tuple[int, str, Prompt]]] = {"train": [], "validation": []}

    def source(self, split: Split, source: Source, fraction: float) -> None:
        """Enter all rows of one source; `fraction` of them goes to validation, by content."""
        check_columns(source)
        rows = read(source)
        head = list(islice(rows, LOOK))
        name = detect(head, source)
        part = Part(source.path, split, name)
        held = Part(source.path, "validation", name) if fraction else part
        self.out.ledger.parts += [part, held] if fraction else [part]
        for key, row in chain(head, rows):
            self._report()
            if isinstance(row, Problem):
                self._refuse(part, "refused", row)
                continue
            if source.format == "auto":
                hold(name, head[0][0], key, row, source)
            part.unused_columns.update(str(column) for column in row if column not in COLUMNS[name])
            try:
                example = FORMATS[name].function(row, key)
            except DataError as error:
                self._refuse(part, "refused", Problem.of(error, key))
                continue
            content = hash_of(example)
            self._enter(held if fraction and int(content[:13], 16) < fraction * 16**13 else part, example, content, source.weight)

    def finish(self) -> Gathered:
        """The whole, once all sources are entered."""
        if self._progress is not None and self._unreported:
            self._progress(self._unreported)
        for content, key, part in self._held:
            if content in self._seen["train"]:
                self.out.ledger.overlap += 1
                part.note("note", Problem(key, "also_in_training", "this validation row is also trained on", "remove it from one side"))
        kept = self._prompts["validation"] or self._prompts["train"]
        self.out.prompts = [prompt for _, _, prompt in sorted(kept, key=lambda item: -item[0])]
        self.out.ledger.balance()
        return self.out

    def _report(self) -> None:
        self._unreported += 1
        if self._progress is not None and self._unreported >= _EVERY:
            self._progress(self._unreported)
            self._unreported = 0

    def _refuse(self, part: Part, fate: Fate, problem: Problem) -> None:
        part.read += 1
        part.note(fate, problem)
        if fate == "refused" and len(self.out.problems) < LISTED:
            self.out.problems.append(problem)

    def _enter(self, part: Part, example: Example, content: str, weight: float) -> None:
        try:
            row = self._bounded(example)
        except _RefusalError as refusal:
            self._refuse(part, refusal.fate, refusal.problem)
            return
        part.read += 1
        part.used += 1
        self._count(part, row, example.key)
        builder = self.out.train if part.split == "train" else self.out.validation
        for tokens in row.tokens:
            builder.add(tokens, weight)
        part.duplicates += content in self._seen[part.split]
        self._seen[part.split].add(content)
        if part.split == "validation":
            self._held.append((content, example.key, part))
        self._keep_prompt(part.split, example, content)

    def _count(self, part: Part, row: _Row, key: str) -> None:
        before = sum(len(rendered.tokens) for rendered in row.rendered)
        after = sum(len(tokens) for tokens in row.tokens)
        part.rows += len(row.tokens)
        part.tokens += after
        part.cut_tokens += max(before - after, 0)
        part.repeated_tokens += max(after - before, 0)
        part.longest = max(part.longest, *(len(rendered.tokens) for rendered in row.rendered))
        trained = 0
        for rendered in row.rendered:
            for role, (yes, no) in rendered.by_role.items():
                part.trained[role] += yes
                part.untrained[role] += no
                trained += yes
        if trained != (kept := sum(int((tokens.train != 0).sum()) for tokens in row.tokens)):
            raise BugError(f"{trained} trained tokens were rendered, {kept} are left after the length policy", where=key)
        for note in dict.fromkeys(note for rendered in row.rendered for note in rendered.notes):
            part.note("note", Problem(key, note.split(":")[0], explain(note)))
        if row.fate:
            over = f"more than max_length = {self._recipe.tokens.max_length} tokens"
            part.note(row.fate, Problem(key, "over_length", over, "raise tokens.max_length to keep such rows whole"))
        for lost in row.lost:
            part.note("note", Problem(key, "exchange_lost", lost, "raise tokens.max_length"))

    def _bounded(self, example: Example) -> _Row:
        limits = self._recipe.tokens
        if limits.overlong in ("drop", "error") and surely_over(example, limits.max_length, self._longest_piece):
            raise self._over(example.key, f"over {limits.max_length} tokens by its length in characters alone")
        rendered = self._rendered(example)
        longest = max(len(item.tokens) for item in rendered)
        if longest <= limits.max_length:
            return _Row(rendered, [item.tokens for item in rendered])
        if limits.overlong == "cut_prompt":
            return self._cut(rendered, example.key)
        if limits.overlong == "split":
            return self._split(example, rendered)
        raise self._over(example.key, f"{longest} tokens, over max_length = {limits.max_length}")

    def _rendered(self, example: Example) -> list[Rendered]:
        try:
            found = render(example, self._template, self._tokenizer, turns=self._recipe.data.turns)
        except (TemplateError, DataError) as error:
            raise _RefusalError("refused", Problem.of(error, example.key)) from error
        trained = [item for item in found if item.tokens.train.any()]
        if not trained:
            raise _RefusalError(
                "refused", Problem(example.key, "no_trained_tokens", "no token of the row would be trained", "see `tunesmith show`")
            )
        return trained

    def _over(self, key: str, message: str) -> _RefusalError:
        fate: Fate = "refused" if self._recipe.tokens.overlong == "error" else "dropped"
        return _RefusalError(
            fate, Problem(key, "over_length", message, "raise tokens.max_length, or choose tokens.overlong: cut_prompt or split")
        )

    def _cut(self, rendered: list[Rendered], key: str) -> _Row:
        limit = self._recipe.tokens.max_length
        cut = [cut_prompt(item.tokens, limit, self._bos) for item in rendered]
        whole = [tokens for tokens in cut if tokens is not None]
        if len(whole) < len(cut):
            message = f"from the first trained token on it is over max_length = {limit} tokens, and answers are never cut"
            raise _RefusalError("dropped", Problem(key, "answer_over_length", message, "raise tokens.max_length"))
        return _Row(rendered, whole, "cut")

    def _split(self, example: Example, rendered: list[Rendered]) -> _Row:
        limit = self._recipe.tokens.max_length
        if isinstance(example, Text):
            return _Row(rendered, [piece for item in rendered for piece in split_text(item.tokens, limit, self._bos)], "split")

        def fits(shorter: Dialog) -> bool:
            return not _learns(shorter) or all(len(item.tokens) <= limit for item in self._rendered(shorter))

        kept: list[Rendered] = []
        lost: list[str] = []
        pieces = [last_part(example, fits)] if self._recipe.data.turns == "last" else split_dialog(example, fits)
        for piece in pieces:
            if not _learns(piece):
                continue
            forms = self._rendered(piece)
            if all(len(item.tokens) <= limit for item in forms):
                kept += forms
            else:
                lost.append(f"{piece.key} is over max_length = {limit} tokens in one exchange and is left out")
        if not kept:
            message = f"every exchange alone is over max_length = {limit} tokens"
            raise _RefusalError("dropped", Problem(example.key, "exchange_over_length", message, "raise tokens.max_length"))
        return _Row(kept, [item.tokens for item in kept], "split", tuple(lost))

    def _keep_prompt(self, split: Split, example: Example, content: str) -> None:
        if isinstance(example, Text) or (prompt := prompt_of(example)) is None:
            return
        # The smallest hashes of content: spread over the data, the same on every run, and nothing else has to be remembered.
        heap, item = self._prompts[split], (-int(content, 16), prompt.key, prompt)
        if any(other[0] == item[0] for other in heap):
            return
        if len(heap) < self._wanted:
            heapq.heappush(heap, item)
        elif heap and item > heap[0]:
            heapq.heapreplace(heap, item)


def _learns(dialog: Dialog) -> bool:
    return any(message.weight for message in dialog.messages if message.role == "assistant")


def prompt_of(dialog: Dialog) -> Prompt | None:
    """What asks for the last answer, with that answer as the truth; None when the last answer has no words (a tool call)."""
    last = dialog.messages[-1]
    if last.role != "assistant" or not last.content.strip():
        return None
    return Prompt(dialog.messages[:-1], last.content, dialog.key, dialog.tools)


def hash_of(example: Example) -> str:
    """64 hex digits of what an example says, wherever it stands: copies have the same."""
    if isinstance(example, Text):
        return content_hash(example.text)
    return content_hash([[_said(message) for message in example.messages], list(example.tools)])


def _said(message: Message) -> list[object]:
    calls = [[call.name, call.arguments] for call in message.tool_calls]
    return [message.role, message.content, message.thinking, calls]
