"""Rows of all sources become tokens, one after the other, and each is entered into the ledger with what became of it."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import DataError, RecipeError, TunesmithError
from tunesmith.core.recipe import Fraction, Recipe, Source
from tunesmith.core.types import Dialog, Example, Kind, Labelled, Message, Pair, Prompt, Ranked, Row, Steps, Text, Wanted
from tunesmith.data.crew import Crew
from tunesmith.data.dataset import Builder
from tunesmith.data.detect import LOOK, WORDS, check_columns, detect, hold
from tunesmith.data.formats import COLUMNS, FORMATS
from tunesmith.data.formats.answers import behind, solution
from tunesmith.data.labels import Labels, StepLabels
from tunesmith.data.ledger import Ledger, Part
from tunesmith.data.notes import explain
from tunesmith.data.partners import partners
from tunesmith.data.problem import Problem
from tunesmith.data.readers import Found
from tunesmith.data.sources import read
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenise import DIALOGS, Outcome, Refused, Tokeniser, Used
from tunesmith.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]
LISTED = 1000  # problems kept with their own words; the ledger counts all
CHUNK = 256  # rows tokenised together
_CHUNK_SIZE = 4 << 20  # characters of them, about
_HASH_BYTES = 32
GOOD = 0.5  # the least value of an answer, or of a step, that is a good one


@dataclass
class Gathered:
    """The rows as tokens, the account, the problems of rows, and the faults that made a whole source unreadable."""

    train: Builder = field(default_factory=Builder)
    validation: Builder = field(default_factory=Builder)
    ledger: Ledger = field(default_factory=Ledger)
    problems: list[Problem] = field(default_factory=list)
    faults: list[TunesmithError] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Rows of one source; `held` is the part for those that a validation fraction takes, and `part` itself without one."""

    source: Source
    fraction: float
    format: str
    part: Part
    held: Part
    found: list[Found]


def gather(
    recipe: Recipe,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompts: int,
    wanted: Wanted = DIALOGS,
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> Gathered:
    """Read, render and bound every row of a recipe's sources; nothing is raised for a bad row or source, all of it is noted.

    `wanted` is what the objective asks of the rows; `prompts` is how many prompts with their true answers are kept for the report;
    `progress` is called with the rows done since; `workers` is how many processes may help when there is much to do (None: one less than
    the cores). The result does not depend on it.
    """
    out = Gathered()
    if wanted.kind != "dialogs" and recipe.tokens.overlong == "split":
        out.faults.append(
            RecipeError(
                f"tokens.overlong: split is for dialogs and text, and this objective learns from {WORDS[wanted.kind]}",
                where="tokens.overlong",
                remedy="choose drop, cut_prompt or error",
                code="split_not_possible",
            )
        )
        return out
    entry = _Entry(out, prompts, recipe.tokens.max_length, wanted)
    tokeniser = Tokeniser(recipe.data.turns, recipe.tokens, template, tokenizer, recipe.data.ranked, wanted)
    with Crew(tokeniser, workers) as crew:
        for chunk, outcomes in crew.outcomes(_chunks(recipe, out, wanted.kind)):
            entry.enter(chunk, outcomes)
            if progress is not None:
                progress(len(outcomes))
    entry.finish()
    return out


def _chunks(recipe: Recipe, out: Gathered, kind: Kind) -> Iterator[Chunk]:
    """The rows of all sources; a source that cannot be read ends early and leaves a fault."""
    validation = recipe.data.validation
    for split, source in _sources(recipe):
        try:
            yield from _chunks_of(split, source, validation.fraction if isinstance(validation, Fraction) else 0.0, out, kind)
        except (DataError, RecipeError) as error:
            out.faults.append(error)


def _sources(recipe: Recipe) -> Iterator[tuple[Split, Source]]:
    for source in recipe.data.train:
        yield "train", source
    if isinstance(recipe.data.validation, list):
        for source in recipe.data.validation:
            yield "validation", source


def _chunks_of(split: Split, source: Source, fraction: float, out: Gathered, kind: Kind) -> Iterator[Chunk]:
    check_columns(source)
    rows = read(source)
    head = list(islice(rows, LOOK))
    name = detect(head, source, kind)
    part = Part(source.path, split, name)
    held = Part(source.path, "validation", name) if fraction else part
    out.ledger.parts += [part, held] if fraction else [part]
    first = head[0][0]
    found: list[Found] = []
    size = 0
    try:
        for key, row in chain(head, rows):
            if isinstance(row, dict):
                if source.format == "auto":
                    hold(name, first, key, row, source, kind)
                part.unused_columns.update(str(column) for column in row if column not in COLUMNS[name])
            found.append((key, row))
            size += _size(row)
            if len(found) == CHUNK or size >= _CHUNK_SIZE:
                yield Chunk(source, fraction, name, part, held, found)
                found, size = [], 0
    except (DataError, RecipeError):
        # What was read before the fault is entered all the same.
        yield Chunk(source, fraction, name, part, held, found)
        raise
    if found:
        yield Chunk(source, fraction, name, part, held, found)


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 1


class _Entry:
    """Enters outcomes into the ledger and the token sets, in the order of the rows."""

    def __init__(self, out: Gathered, prompts: int, max_length: int, wanted: Wanted) -> None:
        self._out = out
        self._most = prompts
        self._wanted = wanted
        self._limit = max_length
        self._over = f"more than max_length = {max_length} tokens"
        self._contents: dict[Split, bytearray] = {"train": bytearray(), "validation": bytearray()}
        self._owners: dict[Split, array[int]] = {"train": array("q"), "validation": array("q")}  # place of the row's part in the ledger
        self._labels: dict[Split, Labels] = {"train": Labels(), "validation": Labels()}
        self._steps = StepLabels()  # of the training rows
        self._held: list[str] = []  # keys of the validation rows
        self._prompts: dict[Split, list[tuple[int, str, Prompt]]] = {"train": [], "validation": []}

    def enter(self, chunk: Chunk, outcomes: list[Outcome]) -> None:
        """One outcome for each row of the chunk."""
        places = {id(part): place for place, part in enumerate(self._out.ledger.parts)}
        for (key, row), outcome in zip(chunk.found, outcomes, strict=True):
            # Answers to one prompt stay on one side.
            deciding = outcome.prompt or outcome.content
            aside = chunk.fraction and deciding and int(deciding[:13], 16) < chunk.fraction * 16**13
            part = chunk.held if aside else chunk.part
            part.read += 1
            if isinstance(outcome, Refused):
                part.note(outcome.fate, outcome.problem)
                if outcome.fate == "refused" and len(self._out.problems) < LISTED:
                    self._out.problems.append(outcome.problem)
            else:
                self._owners[part.split].append(places[id(part)])
                if self._wanted.kind == "labels":
                    self._labels[part.split].enter(outcome, part, places[id(part)])
                elif self._wanted.kind == "steps" and part.split == "train":
                    self._steps.enter(outcome)
                self._use(part, key, outcome, chunk.source.weight)
                assert isinstance(row, dict)
                self._keep_prompt(part, chunk.format, row, key, outcome.content)

    def _use(self, part: Part, key: str, used: Used, weight: float) -> None:
        part.used += 1
        self._count(part, key, used)
        builder = self._out.train if part.split == "train" else self._out.validation
        for tokens in used.tokens:
            builder.add(tokens, weight)
        self._contents[part.split] += bytes.fromhex(used.content)
        if part.split == "validation":
            self._held.append(key)

    def _count(self, part: Part, key: str, used: Used) -> None:
        after = sum(len(tokens) for tokens in used.tokens)
        part.rows += len(used.tokens)
        part.tokens += after
        part.cut_tokens += max(used.before - after, 0)
        part.repeated_tokens += max(after - used.before, 0)
        part.longest = max(part.longest, used.longest)
        for role, (yes, no) in used.by_role.items():
            part.trained[role] += yes
            part.untrained[role] += no
        for note in used.notes:
            part.note("note", Problem(key, note.split(":")[0], explain(note)))
        if used.fate:
            part.note(used.fate, Problem(key, "over_length", self._over, "raise tokens.max_length to keep such rows whole"))
        for problem in used.aside:
            part.note("note", problem)
        for lost in used.lost:
            part.note("note", Problem(key, "exchange_lost", lost, "raise tokens.max_length"))

    def _keep_prompt(self, part: Part, format: str, row: Row, key: str, content: str) -> None:
        # The smallest hashes of content: spread over the data, the same on every run, and nothing else has to be remembered.
        heap, rank = self._prompts[part.split], -int(content, 16)
        if (len(heap) >= self._most and (not heap or rank <= heap[0][0])) or any(other[0] == rank for other in heap):
            return
        example = FORMATS[format].function(row, key)
        if (prompt := prompt_of(example)) is None:
            return
        push = heapq.heappush if len(heap) < self._most else heapq.heapreplace
        push(heap, (rank, key, prompt))

    def finish(self) -> None:
        """Copies, rows on both sides, and the prompts, once all rows are entered."""
        ledger = self._out.ledger
        contents = {split: np.frombuffer(data, dtype=f"S{_HASH_BYTES}") for split, data in self._contents.items()}
        for split, digests in contents.items():
            copies = np.asarray(self._owners[split], dtype=np.int64)[_again(digests)]
            for part, count in zip(ledger.parts, np.bincount(copies, minlength=len(ledger.parts)).tolist(), strict=True):
                part.duplicates += count
        for place in np.flatnonzero(np.isin(contents["validation"], contents["train"])).tolist():
            ledger.overlap += 1
            problem = Problem(self._held[place], "also_in_training", "this validation row is also trained on", "remove it from one side")
            ledger.parts[self._owners["validation"][place]].note("note", problem)
        try:
            self._finish_labels(contents)
        except DataError as error:
            self._out.faults.append(error)
        kept = self._prompts["validation"] or self._prompts["train"]
        self._out.prompts = [prompt for _, _, prompt in sorted(kept, key=lambda item: -item[0])]
        ledger.balance()

    def _finish_labels(self, contents: Mapping[Split, npt.NDArray[np.bytes_]]) -> None:
        """The labels are counted, and each row gets its partner where the objective wants one."""
        parts = self._out.ledger.parts
        where = ", ".join(dict.fromkeys(part.source for part in parts))
        self._steps.check(where)
        for labels in self._labels.values():
            labels.finish(parts)
        self._labels["train"].check(where)
        if self._wanted.mismatched:
            self._out.train = self._accompanied(self._out.train, "train", contents["train"], where)
            self._out.validation = self._accompanied(self._out.validation, "validation", contents["validation"], where)

    def _accompanied(self, alone: Builder, split: Split, contents: npt.NDArray[np.bytes_], where: str) -> Builder:
        if not len(alone):
            return alone
        rows, both = alone.build(), Builder()
        others = partners(rows, contents, self._limit, where)
        for place, (row, other) in enumerate(zip(rows, others, strict=True)):
            both.add(row, rows.repeats[place])
            both.add(other, rows.repeats[place])
            part, learned = self._out.ledger.parts[self._owners[split][place]], int(np.count_nonzero(other.train))
            part.rows += 1
            part.tokens += len(other)
            part.trained["mismatched"] += learned
            part.untrained["mismatched"] += len(other) - learned
        return both


def _good_one(example: Pair | Labelled | Steps | Ranked) -> Dialog | None:
    """The prompt with the answer that was preferred; None when the only answer is not a good one."""
    answer: Sequence[Message]
    if isinstance(example, Pair):
        answer = example.chosen
    elif isinstance(example, Ranked):
        answer = example.answers[max(range(len(example.scores)), key=lambda place: example.scores[place])]
    elif min(example.values if isinstance(example, Steps) else [example.value]) < GOOD:
        return None
    else:
        answer = solution(example) if isinstance(example, Steps) else example.answer
    return behind(example.prompt, answer, example.key, example.tools)


def _again(digests: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
    """Which of the digests [R] stood before."""
    again = np.ones(len(digests), dtype=np.bool_)
    again[np.unique(digests, return_index=True)[1]] = False
    return again


def prompt_of(example: Example) -> Prompt | None:
    """What asks for the last answer, with that answer as the truth; None when it has no words (a tool call) or is not a good one."""
    if isinstance(example, Text):
        return None
    dialog = example if isinstance(example, Dialog) else _good_one(example)
    last = dialog.messages[-1] if dialog is not None else None
    if dialog is None or last is None or last.role != "assistant" or not last.content.strip():
        return None
    return Prompt(dialog.messages[:-1], last.content, dialog.key, dialog.tools)
