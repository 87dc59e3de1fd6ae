"""Rows of one shape become tokens, or reasons why not: a pure function of the rows, run in this process or in a worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from tunesmith.core.errors import BugError, DataError, TemplateError, TunesmithError
from tunesmith.core.recipe import TokenLimits
from tunesmith.core.types import Dialog, Example, Labelled, Message, Pair, Ranked, Row, Steps, Text, Tokens, Wanted, content_hash
from tunesmith.data.formats import FORMATS
from tunesmith.data.judged import Judged, Rule, dialogs_of, first_trained, mark, only, pairs_of
from tunesmith.data.ledger import Fate
from tunesmith.data.overlong import cut_front, cut_prompt, last_part, split_dialog, split_text, surely_over
from tunesmith.data.problem import Problem
from tunesmith.data.readers import Found
from tunesmith.data.render import Rendered, render_many
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer, tokenizer_hash


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that yields no tokens, with its fate and reason; `content` is its hash ("": nothing to hash), `prompt` that of its prompt."""

    fate: Fate
    problem: Problem
    content: str = ""
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Used:
    """What a row became.

    `tokens` stand after the length policy; `before` and `longest` (tokens in all and of the longest text), `by_role` (role -> trained,
    untrained) and `notes` speak of it before. `content` is the row's hash, `lost` says what a split left out, and `aside` which pairs of a
    ranked list. `prompt` is the hash of the prompt that judged answers belong to, "" for a dialog or text.
    """

    content: str
    tokens: list[Tokens]
    before: int
    longest: int
    by_role: dict[str, tuple[int, int]]
    notes: tuple[str, ...]
    fate: Literal["", "cut", "split"] = ""
    lost: tuple[str, ...] = ()
    aside: tuple[Problem, ...] = ()
    prompt: str = ""


Outcome = Refused | Used


class _RefusalError(Exception):
    def __init__(self, fate: Fate, problem: Problem) -> None:
        super().__init__(problem.message)
        self.fate = fate
        self.problem = problem


@dataclass(frozen=True, slots=True)
class _Part:
    """What is used or refused as one, and the texts to render for it (none where it is `over` the limit by its characters alone)."""

    example: Dialog | Text | Judged
    texts: tuple[Dialog | Text, ...]
    over: _RefusalError | None = None


@dataclass(frozen=True, slots=True)
class _Started:
    """A row as it was read, its parts (several pairs of a ranked list, else itself), and what of it gives no pair."""

    example: Example
    parts: tuple[_Part, ...]
    ties: tuple[Problem, ...] = ()


DIALOGS = Wanted()


class Tokeniser:
    """Everything that rows are tokenised with: `ranked` says what pairs a ranked list gives, `wanted` what of them is trained."""

    def __init__(
        self,
        turns: Literal["all", "last"],
        limits: TokenLimits,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        ranked: Rule = "best_worst",
        wanted: Wanted = DIALOGS,
    ) -> None:
        self._turns = turns
        self._ranked: Rule = ranked
        self._wanted = wanted
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
        how = [self._turns, self._ranked, asdict(self._wanted), self._limits.model_dump(mode="json")]
        return content_hash([how, self._template.hash, tokenizer_hash(self._tokenizer)])

    def rows(self, format: str, found: Sequence[Found]) -> list[Outcome]:
        """The outcome of each row, in order; all of them are encoded together. Raises BugError when the accounts disagree."""
        started = [self._start(format, row, key) for key, row in found]
        texts = [text for row in started if not isinstance(row, Refused) for part in row.parts for text in part.texts]
        rendered = iter(render_many(texts, self._template, self._tokenizer, turns=self._turns))
        return [row if isinstance(row, Refused) else self._end(row, rendered) for row in started]

    def _start(self, format: str, row: Row | Problem, key: str) -> _Started | Refused:
        if isinstance(row, Problem):
            return Refused("refused", row)
        try:
            example = FORMATS[format].function(row, key)
        except DataError as error:
            return Refused("refused", Problem.of(error, key))
        if not isinstance(example, Ranked):
            return _Started(example, (self._part(example),))
        pairs, ties = pairs_of(example, self._ranked)
        if not pairs:
            return Refused("dropped", ties[0], hash_of(example), hash_of_prompt(example))
        return _Started(example, tuple(map(self._part, pairs)), tuple(ties))

    def _part(self, example: Dialog | Text | Judged) -> _Part:
        texts = (example,) if isinstance(example, Dialog | Text) else tuple(dialogs_of(example))
        limit = self._limits.max_length
        refuses = self._limits.overlong in ("drop", "error")
        # A piece has one character at least: the vocabulary is only asked for its longest where that could matter.
        if refuses and any(surely_over(text, limit, 1) and surely_over(text, limit, self._longest_piece) for text in texts):
            over = self._over(example.key, f"over {limit} tokens by its length in characters alone")
            return _Part(example, (), over)
        return _Part(example, texts)

    def _end(self, row: _Started, rendered: Iterator[list[Rendered] | DataError | TemplateError]) -> Outcome:
        """What became of a row; `rendered` goes on behind the texts of its parts."""
        content, prompt = hash_of(row.example), hash_of_prompt(row.example)
        used: list[Used] = []
        refusals: list[_RefusalError] = []
        for part in row.parts:
            forms = [next(rendered) for _ in part.texts]
            try:
                used.append(self._ended(part, content, forms))
            except _RefusalError as refusal:
                refusals.append(refusal)
        if not used:
            return Refused(refusals[0].fate, refusals[0].problem, content, prompt)
        aside = (*row.ties, *(refusal.problem for refusal in refusals))
        return replace(used[0] if len(used) == 1 else _joined(used), aside=aside, prompt=prompt)

    def _ended(self, part: _Part, content: str, found: list[list[Rendered] | DataError | TemplateError]) -> Used:
        if part.over is not None:
            raise part.over
        if isinstance(part.example, Dialog | Text):
            return self._bounded(part.example, content, _trained(found[0], part.example.key))
        return self._judged(part.example, content, [_trained(forms, part.example.key) for forms in found])

    def _judged(self, judged: Judged, content: str, found: list[list[Rendered]]) -> Used:
        """One side or both of a pair, which stand or fall together."""
        try:
            sides = [only(forms, judged) for forms in found]
            marked = mark(judged, sides, self._wanted)
        except DataError as error:
            raise _RefusalError("refused", Problem.of(error, judged.key)) from error
        limit = self._limits.max_length
        tokens = [side.tokens for side in marked]
        longest = max(map(len, tokens))
        if longest <= limit:
            return _used(content, marked, tokens)
        if self._limits.overlong != "cut_prompt":
            raise self._over(judged.key, f"{longest} tokens, over max_length = {limit}")
        cut = cut_front(tokens, first_trained(sides[0].tokens), limit, self._bos)
        if cut is None:
            raise self._answer_over(judged.key)
        return _used(content, marked, cut, "cut")

    def _bounded(self, example: Dialog | Text, content: str, rendered: list[Rendered]) -> Used:
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
        others = "cut_prompt or split" if self._wanted.kind == "dialogs" else "cut_prompt"
        return _RefusalError(fate, Problem(key, "over_length", message, f"raise tokens.max_length, or choose tokens.overlong: {others}"))

    def _answer_over(self, key: str) -> _RefusalError:
        message = f"from the first trained token on it is over max_length = {self._limits.max_length} tokens, and answers are never cut"
        return _RefusalError("dropped", Problem(key, "answer_over_length", message, "raise tokens.max_length"))

    def _cut(self, rendered: list[Rendered], key: str) -> list[Tokens]:
        limit = self._limits.max_length
        cut = [cut_prompt(item.tokens, limit, self._bos) for item in rendered]
        whole = [tokens for tokens in cut if tokens is not None]
        if len(whole) < len(cut):
            raise self._answer_over(key)
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


def _joined(used: list[Used]) -> Used:
    """The pairs of one ranked list as one row."""
    by_role: dict[str, tuple[int, int]] = {}
    for part in used:
        _add(by_role, part.by_role)
    return Used(
        used[0].content,
        [tokens for part in used for tokens in part.tokens],
        sum(part.before for part in used),
        max(part.longest for part in used),
        by_role,
        tuple(dict.fromkeys(note for part in used for note in part.notes)),
        "cut" if any(part.fate == "cut" for part in used) else "",
    )


def _add(counts: dict[str, tuple[int, int]], more: Mapping[str, tuple[int, int]]) -> None:
    for role, (yes, no) in more.items():
        old = counts.get(role, (0, 0))
        counts[role] = (old[0] + yes, old[1] + no)


def _used(
    content: str, rendered: list[Rendered], tokens: list[Tokens], fate: Literal["", "cut", "split"] = "", lost: tuple[str, ...] = ()
) -> Used:
    by_role: dict[str, tuple[int, int]] = {}
    for item in rendered:
        _add(by_role, item.by_role)
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
    if isinstance(example, Dialog):
        return content_hash([_turns(example.messages), list(example.tools)])
    rest: list[object]
    if isinstance(example, Pair):
        rest = [_turns(example.chosen), _turns(example.rejected), example.margin]
    elif isinstance(example, Labelled):
        rest = [_turns(example.answer), example.value]
    elif isinstance(example, Steps):
        rest = [example.separator, example.steps, example.values]
    else:
        rest = [list(map(_turns, example.answers)), example.scores]
    return content_hash([type(example).__name__, _turns(example.prompt), list(example.tools), rest])


def hash_of_prompt(example: Example) -> str:
    """64 hex digits of what judged answers are answers to; "" for a dialog or text."""
    return "" if isinstance(example, Dialog | Text) else content_hash([_turns(example.prompt), list(example.tools)])


def _turns(messages: Sequence[Message]) -> list[object]:
    return [_said(message) for message in messages]


def _said(message: Message) -> list[object]:
    calls = [[call.name, call.arguments] for call in message.tool_calls]
    return [message.role, message.content, message.thinking, calls]
