"""A request and its answers in the making."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from tunesmith.core.errors import DataError, ModelError, TunesmithError
from tunesmith.core.ports import SampleSettings
from tunesmith.core.types import Completion
from tunesmith.infer.draw import Asked
from tunesmith.infer.text import Growing, continuation

WORTH = 32  # a shared front that is shorter than this, or than a quarter of the row, is read again


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to an answer: its number among the request's, text that is certain, tokens; at the end the whole completion."""

    index: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    done: Completion | None = None


@dataclass(eq=False)
class Request:
    """A prompt that is being answered, `settings.n` times: what has come so far, and the completions that are done (None: not yet).

    `where`: what errors call it. `error`: why it ended before its time; its completions are then cancelled ones.
    """

    prompt: tuple[int, ...]
    settings: SampleSettings
    completions: list[Completion | None]
    live: bool = False
    where: str = "prompt"
    error: TunesmithError | None = None
    pieces: deque[Piece] = field(default_factory=deque)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return all(one is not None for one in self.completions)


@dataclass(slots=True, eq=False)
class Row:
    """One answer in the making.

    `ids` are those of the virtual front, the prompt and the answer so far; the cache holds the first `past` of them.
    """

    number: int
    request: Request
    index: int
    ids: list[int]
    start: int
    room: int
    uniform: np.ndarray[Any, np.dtype[np.float64]]
    asked: Asked
    stops: frozenset[int]
    text: Growing | None
    past: int = 0
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.ids[self.start :]

    @property
    def adapter(self) -> str | None:
        return self.request.settings.adapter

    def end(self, reason: Literal["stop", "length", "cancelled"], tokenizer: Any, lead: str) -> None:
        """Put the completion, and of a live request the last piece, into the request."""
        answer, request = self.answer, self.request
        if self.text is not None:
            text = self.text.text
        else:
            said = answer[:-1] if answer and answer[-1] in self.stops else answer
            text = continuation(tokenizer, request.prompt, said).removeprefix(lead)
        done = Completion(text, tuple(answer), tuple(self.logprobs), reason, tuple(self.tops))
        request.completions[self.index] = done
        if request.live and self.text is not None:
            new = slice(len(answer), None) if reason == "cancelled" else slice(len(answer) - 1, None)
            request.pieces.append(Piece(self.index, self.text.ready(end=True), tuple(answer[new]), tuple(self.logprobs[new]), done))


@dataclass(frozen=True, slots=True, eq=False)
class Front:
    """Keys and values of a row that has ended, for requests that begin as it did."""

    ids: list[int]
    past: int
    adapter: str | None
    version: int
    kept: dict[int, tuple[Tensor, Tensor]]


def token_ids(prompt: Sequence[int], where: str) -> tuple[int, ...]:
    """The ids of a prompt, whatever whole numbers they are. Raises DataError `not_ids` for a text and for anything else."""
    try:
        return tuple(operator.index(token) for token in prompt)
    except TypeError as error:
        raise DataError(
            f"a prompt is a list of token ids, and this one is {str(prompt)[:40]!r}",
            where=where,
            remedy="give what the tokenizer makes of it, e.g. tokenizer.encode(text)",
            code="not_ids",
        ) from error


def room_for(
    ids: Sequence[int], wanted: int, limit: int | None, where: str, *, vocabulary: int | None = None, longest: int | None = None
) -> int:
    """How many tokens an answer to this prompt may have: those wanted, or what the context of `limit` tokens (None: not known) leaves.

    `longest`: where the positions begin to depend on the length of the text. Raises DataError `empty_prompt`, `bad_token`,
    `prompt_too_long`.
    """
    if not ids:
        raise DataError("the prompt has no tokens", where=where, remedy="give at least one token", code="empty_prompt")
    if vocabulary is not None and (odd := next((token for token in ids if not 0 <= token < vocabulary), None)) is not None:
        raise DataError(
            f"the token id {odd} lies outside the vocabulary of {vocabulary}",
            where=where,
            remedy="use the tokenizer that belongs to this model",
            code="bad_token",
        )
    room = wanted if limit is None else min(wanted, limit - len(ids))
    if room < 1:
        raise DataError(
            f"the prompt has {len(ids)} tokens and the model's context {limit}",
            where=where,
            remedy="shorten the prompt",
            code="prompt_too_long",
        )
    if longest is not None and len(ids) + room > longest:
        raise DataError(
            f"beyond {longest} tokens this model's positions depend on the length, which a cache cannot follow",
            where=where,
            remedy=f"shorten the prompt, or set max_new_tokens to at most {longest - len(ids)}",
            code="prompt_too_long",
        )
    return room


def not_finite(tokens: int, adapter: str | None, where: str) -> ModelError:
    """The error for NaN or infinity instead of a log-probability behind so many tokens of the request `where`."""
    return ModelError(
        f"what {'the model' if adapter is None else f'adapter {adapter}'} says after {tokens} tokens is not finite",
        where=where,
        remedy="check the weights, or sample in fp32",
        code="not_finite",
    )


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids both begin with."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(i for i in range(size) if left[i] != right[i])


def worth_copying(shared: int, row: Row) -> bool:
    """Whether taking over so many positions of another row beats reading them again together with the rest of the prompt."""
    most = len(row.ids) - 1
    return shared >= most or shared >= max(WORTH, most // 4)
