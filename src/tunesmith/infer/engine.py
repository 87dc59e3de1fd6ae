"""The sampling engine: continuous batching over cached rows, on the very modules and weights that are trained.

Requests wait in line; whoever fits into the batch and the cache is let in, its prompt goes through the model once (copies of a prompt, and
fronts that another row has in the cache, not even that), and from then on every step gives each row in the batch one more token. A row
that ends makes room at once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections import Counter, deque
from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch

from tunesmith.core.errors import RecipeError
from tunesmith.core.log import logger
from tunesmith.core.ports import SampleSettings
from tunesmith.core.seed import stream
from tunesmith.core.types import Completion, content_hash
from tunesmith.infer.draw import Asked, check_settings, draw
from tunesmith.infer.request import WORTH, Front, Piece, Request, Row, common, not_finite, room_for, token_ids, worth_copying
from tunesmith.infer.sampler import context_limit
from tunesmith.infer.text import Growing
from tunesmith.model.feed import Feed
from tunesmith.model.many_adapters import ManyAdapters
from tunesmith.model.next_token import NextToken, positions_that_fit, unfit
from tunesmith.model.policy import Policy

MAX_ROWS = 64  # sampled at a time
PROMPT_TOKENS = 2048  # new tokens of prompts that go through the model at once
HEADROOM = 64  # positions that a new row gets beyond its prompt, so that it need not move at once


class Engine:
    """Samples from a policy, many requests at a time; the `Sampler` of evaluation, chat, reinforcement and serving.

    `sample` answers a list of prompts; `submit`, `step` and `cancel`, or `stream`, answer requests that come and go. What a request
    draws depends on its seed, prompt and number alone, not on what else is in the batch, up to rounding: products of matrices round
    differently for different numbers of rows, so that where two tokens are almost equally likely (in fp32 within about 1e-6 of a logit, in
    bf16 within about 1e-2) another one may come. Log-probabilities are the model's own, at temperature 1.

    `stop_ids` end every answer, `lead` (what a template writes between prompt and answer) is left out of its text. `max_rows` rows are
    sampled at a time; `cache_tokens` positions of keys and values are kept at most (None: what half of the free memory holds).
    `int8`: products, keys and values in 8 bits, faster and coarser (fused layers on a CPU only). `keep_fronts`: so many finished rows
    keep their keys and values, so that a request that goes on from one of them (the next turn of a chat, a shared system prompt) need not
    repeat it; only for weights that do not move.
    Raises ModelError `no_language_head` for a reward model; RecipeError `no_engine` for an architecture that needs the plain sampler,
    `no_int8` where no layer is fused.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int] = (),
        lead: str = "",
        max_rows: int = MAX_ROWS,
        cache_tokens: int | None = None,
        int8: bool = False,
        keep_fronts: int = 0,
    ) -> None:
        if reason := unfit(policy):
            raise RecipeError(
                f"the engine cannot run this model: {reason}", where="model", remedy="use TransformersSampler", code="no_engine"
            )
        for name, value in (("max_rows", max_rows), ("cache_tokens", 1 if cache_tokens is None else cache_tokens)):
            if value < 1:
                raise RecipeError(f"{name} is {value}", where=name, remedy="use at least 1", code="bad_setting")
        self.policy, self.tokenizer, self.lead = policy, tokenizer, lead
        self._next = NextToken(policy, int8=int8)
        if int8:
            gaps = self._next.gaps()
            said = "int8: log-probabilities of %d random tokens differ from those of %s by %.3f on average"
            logger.info(said, len(gaps), str(policy.dtype).removeprefix("torch."), sum(gaps) / len(gaps))
        self.stop_ids = tuple(dict.fromkeys(int(token) for token in stop_ids))
        if keep_fronts and policy.parameters_by_name():
            why = "fronts are kept for weights that do not move, and these are trained"
            raise RecipeError(why, where="keep_fronts", remedy="use 0", code="bad_setting")
        self.max_rows, self.keep_fronts = max_rows, keep_fronts
        self.cache_tokens = cache_tokens or positions_that_fit(policy, int8=int8)
        self.adapters = ManyAdapters(policy, self._wanted)
        self._cache = self._next.cache(self.cache_tokens)
        self._waiting: deque[Row] = deque()
        self._active: dict[int, Row] = {}
        self._fronts: deque[Front] = deque(maxlen=keep_fronts)
        self._numbers = itertools.count()

    def sample(self, prompts: Sequence[Sequence[int]], settings: SampleSettings | Sequence[SampleSettings]) -> list[list[Completion]]:
        """For every prompt (token ids, not empty), `settings.n` completions, in the order given; one setting for all, or one for each.

        Equal prompts draw their own numbers. Nothing is kept from earlier calls, so that weights may have moved in between.
        Raises DataError for an empty prompt or one that fills the context; RecipeError for impossible settings; ModelError
        `not_finite` when the model says NaN or infinity.
        """
        requests = self._line_up(prompts, settings)
        try:
            with self._next.ready():
                return [self._answer(request) for request in requests]
        finally:
            self.forget()

    def answers(
        self, prompts: Sequence[Sequence[int]], settings: SampleSettings | Sequence[SampleSettings], places: Sequence[str] = ()
    ) -> Generator[list[Completion], None, None]:
        """What `sample` gives, a prompt's completions as soon as they and those before them are done; leaving early drops the rest.

        `places`: what errors call the prompts.
        """
        requests = self._line_up(prompts, settings, places)
        try:
            for request in requests:
                with contextlib.nullcontext() if request.done else self._next.ready():
                    done = self._answer(request)
                yield done
        finally:
            self.forget()

    def _line_up(
        self, prompts: Sequence[Sequence[int]], settings: SampleSettings | Sequence[SampleSettings], places: Sequence[str] = ()
    ) -> list[Request]:
        """The requests of a list of prompts, in line."""
        each = [settings] * len(prompts) if isinstance(settings, SampleSettings) else list(settings)
        if len(each) != len(prompts):
            why = f"{len(each)} settings for {len(prompts)} prompts"
            raise RecipeError(why, where="settings", remedy="give one for each, or one for all")
        if self._waiting or self._active:
            why = "other requests are open in this engine, which a list of prompts would end"
            remedy = "let them end, use submit for these too, or make another engine"
            raise RecipeError(why, where="sample", remedy=remedy, code="engine_busy")
        self.forget()
        seen: Counter[tuple[int, ...]] = Counter()
        requests = []
        for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            where = places[number] if places else f"prompt {number}"
            ids = token_ids(prompt, where)
            requests.append(self._request(ids, own, where=where, twin=seen[ids], live=False))
            seen[ids] += 1
        self._waiting.extend(row for rows in requests for row in rows)
        return [rows[0].request for rows in requests]

    def _answer(self, request: Request) -> list[Completion]:
        """Sample until a request is done. Raises its error."""
        while not request.done:
            self._step()
        if request.error is not None:
            raise request.error
        return [one for one in request.completions if one is not None]

    def submit(self, prompt: Sequence[int], settings: SampleSettings) -> Request:
        """Put a request in line. Raises DataError and RecipeError as `sample`."""
        rows = self._request(token_ids(prompt, "prompt"), settings, where="prompt", twin=0, live=True)
        self._waiting.extend(rows)
        return rows[0].request

    def step(self) -> bool:
        """Let in who fits and give every row one more token; False when there is nothing to do."""
        if not (self._waiting or self._active):
            return False
        with self._next.ready():
            self._step()
        return True

    def cancel(self, request: Request) -> None:
        """End a request now; its completions keep what they have, with the reason "cancelled"."""
        for row in [row for row in (*self._active.values(), *self._waiting) if row.request is request]:
            self._finish(row, "cancelled")
        self._waiting = deque(row for row in self._waiting if row.request is not request)

    def stream(self, prompt: Sequence[int], settings: SampleSettings) -> Generator[Piece, None, None]:
        """The pieces of an answer as they come; leaving the loop early cancels the rest. Raises as `sample`."""
        request = self.submit(prompt, settings)
        try:
            while not request.done or request.pieces:
                while request.pieces:
                    yield request.pieces.popleft()
                if not request.done:
                    self.step()
            if request.error is not None:
                raise request.error
        finally:
            if not sys.is_finalizing():  # a stream that was left open when Python ends finds half of it gone
                self.cancel(request)

    def forget(self) -> None:
        """Drop all rows, requests in line and kept fronts, and give the cache's memory back."""
        for request in {row.request for row in (*self._active.values(), *self._waiting)}:
            self.cancel(request)
        self._fronts.clear()
        self._cache = self._next.cache(self.cache_tokens)

    @property
    def limit(self) -> int | None:
        """The tokens that prompt and answer may have together; None when the model does not say."""
        limit = context_limit(self.policy.model)
        return None if limit is None else limit - len(self.policy.front)

    @property
    def load(self) -> dict[str, int]:
        """How many rows are sampled and wait, positions spoken for, bytes of the cache, and kept fronts."""
        return {
            "active": len(self._active), "waiting": len(self._waiting), "cached": self._cache.held(), "cache_bytes": self._cache.bytes(),
            "fronts": len(self._fronts),
        }  # fmt: skip

    def _request(self, ids: tuple[int, ...], settings: SampleSettings, *, where: str, twin: int, live: bool) -> list[Row]:
        """The rows of a request, checked; a live one is told piece by piece."""
        check_settings(settings, self.policy.vocabulary)
        room = room_for(ids, settings.max_new_tokens, self.limit, where, vocabulary=self.policy.vocabulary, longest=self.policy.alone_from)
        if settings.adapter is not None:
            self.adapters.demand(settings.adapter)
        request = Request(ids, settings, [None] * settings.n, live, where)
        name, stops = content_hash(ids), frozenset((*self.stop_ids, *settings.stop_ids))
        rows = []
        for index in range(settings.n):
            numbers = stream(settings.seed, "sample", name, twin, index).random(room)
            text = Growing(self.tokenizer, ids, stops=settings.stop, lead=self.lead) if live or settings.stop else None
            asked = Asked(settings, frozenset(ids) if settings.repetition_penalty != 1 else frozenset())
            whole = [*self.policy.front, *ids]
            rows.append(Row(next(self._numbers), request, index, whole, len(whole), room, numbers, asked, stops, text))
        return rows

    def _step(self) -> None:
        self._admit()
        try:
            prompts = [row for row in self._active.values() if len(row.ids) - row.past > 1]
            while prompts:
                prompts = self._read_prompts(prompts)
            if self._active:
                self._next_tokens()
        except torch.OutOfMemoryError:
            if len(self._active) == 1:
                raise
            self._shed()

    def _shed(self) -> None:
        """Go on with half of the rows; the younger half goes back to the line."""
        self.max_rows = len(self._active) // 2
        logger.info("out of memory while sampling %d rows at once: going on with %d", len(self._active), self.max_rows)
        for row in sorted(self._active.values(), key=lambda row: -row.number)[: len(self._active) - self.max_rows]:
            self._put_back(row)
        self._next.unrecord()
        torch.cuda.empty_cache()

    def _admit(self) -> None:
        """Let rows in, in the order in which they came, while there is room in the batch and in the cache."""
        while self._waiting and len(self._active) < self.max_rows:
            row = self._waiting[0]
            length = len(row.ids) + min(HEADROOM, row.room - len(row.logprobs))
            try:
                if not self._cache.fits(length) or not self.adapters.make_active(row.adapter, self._names()):
                    return
                self._cache.add(row.number, length)
            except torch.OutOfMemoryError:
                if not self._active:
                    raise
                self.max_rows = len(self._active)
                logger.info("out of memory for one more row: going on with %d", self.max_rows)
                return
            self._waiting.popleft()
            row.past = 0
            self._active[row.number] = row

    def _wanted(self) -> set[str]:
        return self._names() | {row.adapter for row in self._waiting if row.adapter is not None}

    def _names(self) -> set[str]:
        return {row.adapter for row in self._active.values() if row.adapter is not None}

    def _read_prompts(self, rows: list[Row]) -> list[Row]:
        """Send the next part of these rows' prompts through the model, as many as go at once; returns those that are not through."""
        later: list[Row] = []
        begun: list[Row] = []
        parts: list[tuple[Row, int]] = []
        taken = 0
        for row in sorted(rows, key=lambda row: row.number):
            donor = self._like(row, begun) if row.past == 0 else None
            if donor is not None:
                later.append(row)  # once the other is through, its keys and values are copied
                continue
            if row.past == 0:
                self._copy_front(row)
            missing = len(row.ids) - row.past
            if missing == 1:
                continue  # goes with the next tokens
            # Only what is too long for a pass is cut, and virtual tokens go through in one piece.
            count = min(missing, max(PROMPT_TOKENS, len(self.policy.front) + 1 - row.past))
            # Whole prompts have a faster way than those behind something, and virtual tokens are put in front of whole ones only.
            another = bool(parts) and (row.past == 0) != (parts[0][0].past == 0)
            if parts and (another or PROMPT_TOKENS - taken < count):
                later.append(row)
                continue
            begun.append(row)
            parts.append((row, count))
            taken += count
        if not parts:
            return later
        feed = self._next.prompts(self._cache, [(row.number, row.ids[row.past : row.past + count], row.past) for row, count in parts])
        by_number = {row.number: (row, count) for row, count in parts}
        through = []
        for place, number in enumerate(feed.rows):
            row, count = by_number[number]
            if row.past + count == len(row.ids):
                through.append((place, row))
            else:
                later.append(row)
        self._advance(feed, through, {row.number: count for row, count in parts})
        return [row for row in later if row.number in self._active]

    def _like(self, row: Row, others: Sequence[Row]) -> Row | None:
        """A row whose prompt goes through the model now and begins as this one does, so that waiting for it saves reading that again."""
        for other in others:
            shared = common(other.ids, row.ids) if other.adapter == row.adapter else 0
            if shared - other.past >= min(WORTH, len(row.ids) - 1) and worth_copying(shared, row):
                return other
        return None

    def _copy_front(self, row: Row) -> None:
        """Take over the longest front of the row's ids that another row, or a kept front, has in the cache; one token stays to be read."""
        best = 0
        source: Row | Front | None = None
        fronts = [front for front in self._fronts if front.version == self.adapters.version(row.adapter)]
        others: list[Row | Front] = [*fronts, *self._active.values()]
        for other in others:
            if other is not row and other.adapter == row.adapter:
                shared = min(common(other.ids[: other.past], row.ids), len(row.ids) - 1)
                if shared > best and worth_copying(shared, row):
                    best, source = shared, other
        if isinstance(source, Row):
            self._cache.share(row.number, source.number, best)
        elif source is not None:
            self._cache.give(row.number, source.kept, best)
        row.past = best

    def _next_tokens(self) -> None:
        """One more token for every row; rows whose slot cannot grow go back to the line."""
        for row in sorted(self._active.values(), key=lambda row: row.number):
            while row.number in self._active and not self._cache.widen(row.number, len(row.ids)):
                self._put_back(max(self._active.values(), key=lambda other: other.number))
        tokens = {row.number: (row.ids[-1], row.past) for row in self._active.values()}
        feed = self._next.tokens(self._cache, tokens)
        self._advance(feed, [(place, self._active[number]) for place, number in enumerate(feed.rows)], dict.fromkeys(tokens, 1))

    def _put_back(self, row: Row) -> None:
        """Take a row out of the batch; it will read its prompt and what it has said once more when there is room again."""
        self._cache.drop(row.number)
        del self._active[row.number]
        self._waiting.appendleft(row)

    def _advance(self, feed: Feed, rows: Sequence[tuple[int, Row]], counts: dict[int, int]) -> None:
        """The forward pass of a feed with so many tokens of each row, and a token drawn for the rows at these places of it."""
        feed.mix = self.adapters.mix(feed, [self._active[number].adapter for number in feed.rows])
        with self.adapters.at_work(feed.mix):
            last = feed.last if len(rows) == len(feed.rows) else feed.last[torch.tensor([p for p, _ in rows], dtype=torch.long)]
            logits = self._next.logits(feed, last)
        # Not before: an interrupted pass leaves keys half written. A row that gets a token goes on when it gets it.
        drawing = {row.number for _, row in rows}
        for number in counts.keys() - drawing:
            self._active[number].past += counts[number]
        if not rows:
            return
        numbers = [float(row.uniform[len(row.logprobs)]) for _, row in rows]
        drawn = draw(logits, [row.asked for _, row in rows], numbers)
        for (_, row), token, logprob, top in zip(rows, drawn.tokens, drawn.logprobs, drawn.tops, strict=True):
            if row.number in self._active:  # not ended together with another answer to its prompt
                row.past += counts[row.number]
                self._take(row, token, logprob, top)

    def _take(self, row: Row, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> None:
        """Give a row its token, and end the row where it ends."""
        if not math.isfinite(logprob):
            row.request.error = not_finite(len(row.ids), row.adapter, row.request.where)
            self.cancel(row.request)
            return
        row.ids.append(token)
        row.logprobs.append(logprob)
        if row.request.settings.top_logprobs:
            row.tops.append(top)
        row.asked.counts[token] += 1
        if token in row.stops or (row.text is not None and row.text.add(token)):
            self._finish(row, "stop")
        elif len(row.logprobs) == row.room:
            self._finish(row, "length")
        elif row.text is not None and row.request.live:
            row.request.pieces.append(Piece(row.index, row.text.ready(), (token,), (logprob,)))

    def _finish(self, row: Row, reason: Literal["stop", "length", "cancelled"]) -> None:
        """The row's completion; its slot is free at once."""
        row.end(reason, self.tokenizer, self.lead)
        if row.number in self._active:
            if self.keep_fronts and row.past >= WORTH and row.request.error is None:
                kept = self._cache.take(row.number, row.past)
                self._fronts.append(Front(row.ids[: row.past], row.past, row.adapter, self.adapters.version(row.adapter), kept))
            self._cache.drop(row.number, clean=row.request.error is not None)
            del self._active[row.number]
