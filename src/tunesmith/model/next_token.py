"""What a policy says next: logits behind new tokens of cached rows, through the modules and weights that are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import RecipeError
from tunesmith.core.log import logger
from tunesmith.model import attention, fuse, native, reward
from tunesmith.model.arena import Arena
from tunesmith.model.arena_feed import ArenaPrompts, ArenaTokens
from tunesmith.model.cached import STEP_BYTES, Cache
from tunesmith.model.feed import Feed, NextTokens, Prompts
from tunesmith.model.graphs import Graphs
from tunesmith.model.memory import free_bytes
from tunesmith.model.policy import Policy
from tunesmith.model.probe import FAILURES, probe_batch
from tunesmith.model.products import Blocked, Way, product

CACHE_SHARE = 0.5  # of the memory that is free when an engine is made, for keys and values


class NextToken:
    """The sampling side of a policy. What it makes ready of frozen weights is kept from one `ready` to the next.

    `int8`: the fused layers and the head multiply in 8 bits, and keys and values are kept in 8 bits. `spans`: these lie in an arena, and
    steps are recorded (None: as the policy says).
    Raises ModelError `no_language_head` for a reward model, RecipeError `no_int8` where no layer is fused.
    """

    def __init__(self, policy: Policy, *, int8: bool = False, spans: bool | None = None) -> None:
        if policy.scalar:
            raise reward.no_language_head()
        if int8 and policy.layers != "fused":
            raise RecipeError(
                "products in 8 bits are for layers that run as one function: models of the Llama family on a CPU",
                where="int8",
                remedy="leave it out",
                code="no_int8",
            )
        self.policy, self.int8 = policy, int8
        self.spans = policy.spans if spans is None else spans
        # Virtual tokens are looked for among the ids, for which a GPU is waited for.
        self._graphs = Graphs(lambda feed: self._logits(feed, None), off=policy.virtual is not None)
        self._head: Way | None = None

    def cache(self, most: int | None = None) -> Cache | Arena:
        """Room for keys and values, `most` positions at most; the one before it is not used any more."""
        self._graphs.clear()
        return Arena(most) if self.spans else Cache(most, int8=self.int8)

    def prompts(self, cache: Cache | Arena, parts: Sequence[tuple[int, Sequence[int], int]]) -> Prompts:
        """A feed of several new tokens each: (row, ids, positions that the cache holds already)."""
        policy, virtual = self.policy, len(self.policy.front)
        if isinstance(cache, Arena):
            return ArenaPrompts(cache, parts, policy.device, virtual)
        return Prompts(cache, parts, policy.device, virtual)

    def tokens(self, cache: Cache | Arena, tokens: dict[int, tuple[int, int]]) -> NextTokens | ArenaTokens:
        """A feed of one new token for every row of the cache: (token, positions that the cache holds already)."""
        if isinstance(cache, Arena):
            return ArenaTokens(cache, tokens, self.policy.device)
        return NextTokens(cache, tokens, self.policy.device)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode, no gradients, and a promise that no weight moves while it is open."""
        policy = self.policy
        modes = [module for module in policy.model.modules() if module.training]
        fuse.make_ready(policy.model, int8=self.int8)
        policy.model.eval()
        try:
            with torch.no_grad(), policy.steady():
                yield
        finally:
            if policy.parameters_by_name():
                self.forget()
            for module in modes:
                module.training = True

    def unrecord(self) -> None:
        """Give the memory of recorded steps back."""
        self._graphs.clear()

    def forget(self) -> None:
        """Drop the copies of weights that sampling made for itself."""
        self._head = None
        self._graphs.clear()
        fuse.forget_ready(self.policy.model)

    def logits(self, feed: Feed, rows: Tensor) -> Tensor:
        """Logits [R, V] in fp32 behind the new tokens `rows` [R] of a feed, whose keys and values are in its cache afterwards.

        Open `ready` around it.
        """
        if isinstance(feed, ArenaTokens):
            return self._graphs.logits(feed).narrow(0, 0, len(feed.rows)).index_select(0, rows)
        return self._logits(feed, rows)

    def _logits(self, feed: Feed, rows: Tensor | None) -> Tensor:
        """Behind the tokens `rows` of a feed (None: all of them)."""
        policy = self.policy
        feed.read = rows if policy.head != "plain" else None  # transformers' own head hands on all that it gets
        arguments = {"input_ids": feed.ids[None], "position_ids": feed.positions[None], "tunesmith_layout": feed, "use_cache": False}
        with attention.packed_masks(), torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.autocast):
            if policy.head == "plain":
                plain: Tensor = policy.causal(**arguments).logits[0]
                return (plain if rows is None else plain.index_select(0, rows)).float()
            states = fuse.states(policy.decoder(), feed) if isinstance(feed, NextTokens) else None
            if states is None:
                states = policy.decoder()(**arguments).last_hidden_state[0]
            if rows is not None and fuse.READ not in feed.kept:
                states = states.index_select(0, rows)
        with torch.autocast(policy.device.type, enabled=False):
            head = self._head_of(states.dtype)
            logits = head.run(states, native.WIDE) if isinstance(head, Blocked) else head(states).float()
        if policy.head_form.scale != 1.0:
            logits.mul_(policy.head_form.scale)
        if policy.head_form.cap is not None:
            logits.div_(policy.head_form.cap).tanh_().mul_(policy.head_form.cap)
        return logits

    def gaps(self) -> list[float]:
        """How far cached rows are from `Policy.score`, in log-probabilities of the tokens of a few random documents.

        The first half of every document is read at once, then two tokens behind it, the rest one at a time.
        """
        policy = self.policy
        batch = probe_batch(policy.causal, policy.vocabulary)
        front = policy.front
        ids = [[*front, *batch.ids[s.start : s.stop].tolist()] for s in batch.segments]
        read = [(len(front) + len(row)) // 2 for row in ids]
        found: dict[tuple[int, int], float] = {}
        cache = self.cache()

        def note(feed: Feed) -> None:
            logps = torch.log_softmax(self.logits(feed, feed.last), -1)
            for place, row in enumerate(feed.rows):
                if read[row] < len(ids[row]):
                    found[row, read[row] - len(front)] = float(logps[place, ids[row][read[row]]])

        with self.ready():
            with fuse.exact(policy.model):  # rounding in training is no matter of sampling
                truth = policy.score(batch).logp.tolist()
            for row in range(len(ids)):
                cache.add(row, len(ids[row]))
            note(self.prompts(cache, [(row, ids[row][: read[row]], 0) for row in range(len(ids))]))
            parts = [(row, ids[row][read[row] : read[row] + 2], read[row]) for row in range(len(ids))]
            for row, part, _ in parts:
                read[row] += len(part)
            note(self.prompts(cache, parts))
            while left := [row for row in range(len(ids)) if read[row] < len(ids[row])]:
                for row in range(len(ids)):
                    if row not in left and row in cache:
                        cache.drop(row)
                feed = self.tokens(cache, {row: (ids[row][read[row]], read[row]) for row in left})
                for row in left:
                    read[row] += 1
                note(feed)
        self.unrecord()
        places = [(row, place) for row, s in enumerate(batch.segments) for place in range(1, s.stop - s.start)]
        return [abs(found[where] - logp) for where, logp in zip(places, truth, strict=True) if where in found]

    def _head_of(self, dtype: torch.dtype) -> Way:
        if self._head is None:
            policy, fused = self.policy, self.policy.layers == "fused"
            output = policy.causal.get_output_embeddings()
            dtype = policy.dtype if policy.autocast or fused else dtype
            bias = None if output.bias is None else output.bias.detach()
            self._head = product([policy.copies.of(output.weight, dtype)], [bias], dtype, int8=self.int8 and fused)
        return self._head


def positions_that_fit(policy: Policy, *, int8: bool = False) -> int:
    """How many positions of keys and values take the engine's share of the memory that is free now, by the model's configuration."""
    config = policy.causal.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * (width + STEP_BYTES if int8 else width * policy.dtype.itemsize)
    return max(1024, int(CACHE_SHARE * free_bytes(policy.device) / each))


def unfit(policy: Policy) -> str:
    """Why the engine cannot run a model ("" if it can): its attention is not ours, or reading token by token changes its numbers.

    The second is tried once for a policy, on a few short documents. On a GPU in bf16 they are read once more with keys and values in an
    arena, which is used where that gives the same.
    """
    if policy.layout != "packed":
        return "its attention does not go through ours"
    if policy.cached is None:
        policy.cached = _changes(policy, spans=False)
        if not policy.cached and policy.device.type == "cuda" and policy.dtype == torch.bfloat16:
            why = _changes(policy, spans=True)
            policy.spans = not why
            if why:
                logger.info("keys and values lie in slots, and steps of sampling are not recorded: with an arena %s", why)
    return policy.cached


def _changes(policy: Policy, *, spans: bool) -> str:
    """What reading token by token does to the numbers of a model, or where it fails; "" where all is well."""
    try:
        gaps = NextToken(policy, spans=spans).gaps()
    except FAILURES as error:
        return f"reading token by token fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    gap = sum(gaps) / len(gaps) if policy.dtype == torch.bfloat16 else max(gaps)
    # Written so that NaN is refused.
    fine = gap <= (0.05 if policy.dtype == torch.bfloat16 else 1e-3)
    return "" if fine else f"reading token by token changes its log-probabilities by {gap:.1e}"
