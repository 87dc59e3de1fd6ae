"""From logits to tokens: every row with its own settings and its own random numbers, whatever stands beside it.

B rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import RecipeError
from tunesmith.core.ports import SampleSettings
from tunesmith.model import native
from tunesmith.model.layout import send

BLOCKS = (256, 64)  # probabilities are summed by blocks of the vocabulary first
CANDIDATES = (64, 1024, 8192)  # of the likeliest tokens, that top_p is looked for in before the whole vocabulary is sorted
MOST_TOP_LOGPROBS = 1024
MOST_BIAS = 100  # no logit comes back from there


@dataclass(slots=True)
class Asked:
    """What the draw of a row depends on: its settings, and the tokens that penalties count (those of the prompt, and of the answer)."""

    settings: SampleSettings
    prompt: frozenset[int] = frozenset()
    counts: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens [B], the model's own log-probabilities of them [B], and of the likeliest tokens where a row asks for them."""

    tokens: list[int]
    logprobs: list[float]
    tops: list[tuple[tuple[int, float], ...]]


def draw(logits: Tensor, rows: Sequence[Asked], uniform: Sequence[float]) -> Drawn:
    """One token for each row of logits [B, V] in fp32, at the row's number in 0..1, by inversion of the cumulative distribution.

    The sum runs in vocabulary order, in float64 from block to block, so that neither the batch nor a near tie can reorder it. `logits`
    is left as it is.
    """
    numbers = send(np.array(uniform, np.float64), logits.device)
    kernels = native.kernels(torch.float32) if logits.device.type == "cpu" else None
    if kernels is None:
        tokens, log_total, rest = _by_operations(logits, rows, numbers)
    else:
        rest = [i for i, row in enumerate(rows) if _changes(row) or (row.settings.temperature != 0 and _narrows(row.settings))]
        left = set(rest)
        warmth = torch.tensor([0.0 if i in left else row.settings.temperature for i, row in enumerate(rows)])
        tokens, log_total = kernels.draw(logits, warmth, numbers)
    if rest:
        chosen = [rows[i] for i in rest]
        _fill(tokens, rest, _narrowed(_rows(logits, rest), chosen, _rows(numbers, rest)))
    logprobs = logits.gather(1, tokens[:, None])[:, 0].double() - log_total
    told, values = torch.stack([tokens.double(), logprobs]).tolist()  # a GPU is waited for once; ids are whole in fp64
    return Drawn([int(token) for token in told], values, _tops(logits, log_total, rows))


def _by_operations(logits: Tensor, rows: Sequence[Asked], numbers: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """What the compiled function does, in PyTorch's: tokens [B], the log of the sum of e^logit [B], and the rows that have no token yet."""
    blocks = _by_block(logits)
    most = blocks.amax(-1).amax(-1)
    weights = (blocks - most[:, None, None]).exp_()
    sums = weights.sum(-1).double()
    tokens = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
    greedy = [i for i, row in enumerate(rows) if row.settings.temperature == 0 and not _changes(row)]
    plain = [i for i, row in enumerate(rows) if row.settings.temperature == 1 and not _changes(row) and not _narrows(row.settings)]
    if greedy:
        _fill(tokens, greedy, _argmax(_rows(blocks, greedy)))
    if plain:
        _fill(tokens, plain, _invert(_rows(weights, plain), _rows(sums, plain), _rows(numbers, plain)))
    return tokens, most.double() + sums.sum(-1).log(), sorted(set(range(len(rows))) - set(greedy) - set(plain))


def check_settings(settings: SampleSettings, vocabulary: int | None = None) -> None:
    """Raises RecipeError `bad_setting` with the name of a setting that no sampler can do."""
    s, near = settings, "a number between -2 and 2"
    of = f" of {vocabulary}" if vocabulary else ""

    def known(token: object) -> bool:
        return _whole(token) and 0 <= token < (vocabulary or token + 1)

    # Each looks at the kind first: a comparison with what is no number would end in an error that names no setting.
    rules = (
        ("max_new_tokens", _whole(s.max_new_tokens) and s.max_new_tokens >= 1, "a whole number of at least 1"),
        ("temperature", _number(s.temperature) and 0 <= s.temperature < float("inf"), "0 (greedy) or more"),
        ("top_p", _number(s.top_p) and 0 < s.top_p <= 1, "a number above 0 and at most 1 (off)"),
        ("top_k", _whole(s.top_k) and s.top_k >= 0, "a whole number, 0 (off) or more"),
        ("n", _whole(s.n) and s.n >= 1, "a whole number of at least 1"),
        ("seed", _whole(s.seed), "a whole number"),
        ("min_p", _number(s.min_p) and 0 <= s.min_p <= 1, "a number between 0 (off) and 1"),
        ("repetition_penalty", _number(s.repetition_penalty) and 0 < s.repetition_penalty < float("inf"), "a number above 0; 1 is off"),
        ("frequency_penalty", _number(s.frequency_penalty) and -2 <= s.frequency_penalty <= 2, near),
        ("presence_penalty", _number(s.presence_penalty) and -2 <= s.presence_penalty <= 2, near),
        ("stop", _listed(s.stop) and all(isinstance(text, str) and text for text in s.stop), "texts that are not empty"),
        ("stop_ids", _listed(s.stop_ids) and all(known(token) for token in s.stop_ids), f"ids of the vocabulary{of}"),
        (
            "top_logprobs",
            _whole(s.top_logprobs) and 0 <= s.top_logprobs <= MOST_TOP_LOGPROBS,
            f"a whole number between 0 and {MOST_TOP_LOGPROBS}",
        ),
        (
            "logit_bias",
            isinstance(s.logit_bias, Mapping)
            and all(known(token) and _number(bias) and abs(bias) <= MOST_BIAS for token, bias in s.logit_bias.items()),
            f"ids of the vocabulary{of} with numbers between -{MOST_BIAS} and {MOST_BIAS}",
        ),
        ("adapter", s.adapter is None or isinstance(s.adapter, str), "the name of a loaded adapter, or None for the base"),
    )
    for name, fine, wanted in rules:
        if not fine:
            value = getattr(settings, name)
            raise RecipeError(f"{name} is {value!r}, which no sampler can do", where=name, remedy=f"use {wanted}", code="bad_setting")


def _whole(value: object) -> TypeGuard[int]:
    """An integer of Python's or NumPy's; True is one to Python, and yet a mistake here."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _changes(row: Asked) -> bool:
    """Whether the row's logits differ from the model's."""
    s = row.settings
    return bool(s.logit_bias) or s.repetition_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0


def _narrows(settings: SampleSettings) -> bool:
    return settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0


def _by_block(logits: Tensor) -> Tensor:
    """[B, blocks, size], filled up with minus infinity."""
    size = next((size for size in BLOCKS if logits.shape[1] % size == 0), BLOCKS[-1])
    tail = -logits.shape[1] % size
    whole = torch.nn.functional.pad(logits, (0, tail), value=float("-inf")) if tail else logits
    return whole.view(len(logits), -1, size)


def _rows(tensor: Tensor, places: list[int]) -> Tensor:
    return tensor if len(places) == len(tensor) else tensor[send(np.array(places, np.int64), tensor.device)]


def _fill(tokens: Tensor, places: list[int], found: Tensor) -> None:
    if len(places) == len(tokens):
        tokens.copy_(found)
    else:
        tokens[send(np.array(places, np.int64), tokens.device)] = found


def _argmax(blocks: Tensor) -> Tensor:
    """The first place of the largest entry; by blocks, which is several times faster than torch.argmax over the whole."""
    block = blocks.amax(-1).argmax(-1)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, blocks.shape[2]))[:, 0].argmax(-1)
    return block * blocks.shape[2] + inside


def _invert(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform [B] times the total; weights [B, blocks, size], sums [B, blocks]."""
    upto = sums.cumsum(-1)
    target = uniform * upto[:, -1]
    block = torch.searchsorted(upto, target[:, None], right=True)[:, 0]
    # Rounding may reach the very end of the line: the last block, and in it the last token, that has any weight.
    block = block.minimum((upto >= upto[:, -1:]).int().argmax(-1))
    before = (upto - sums).gather(1, block[:, None])[:, 0]
    inside = weights.gather(1, block[:, None, None].expand(-1, 1, weights.shape[2]))[:, 0].double().cumsum(-1)
    place = torch.searchsorted(inside, (target - before).clamp_min(0)[:, None], right=True)[:, 0]
    place = place.minimum((inside >= inside[:, -1:]).int().argmax(-1))
    return block * weights.shape[2] + place


def _narrowed(logits: Tensor, rows: Sequence[Asked], uniform: Tensor) -> Tensor:
    """Tokens of rows whose logits are changed, warmed or narrowed."""
    warm = logits.clone()
    for logit, row in zip(warm, rows, strict=True):
        if _changes(row):
            _change(logit, row)
    settings = [row.settings for row in rows]
    tokens = _argmax(_by_block(warm))
    warm.div_(torch.tensor([s.temperature or 1.0 for s in settings], dtype=warm.dtype, device=warm.device)[:, None])
    open_rows = [i for i, s in enumerate(settings) if s.temperature != 0 and not _narrows(s)]
    if open_rows:
        blocks = _by_block(_rows(warm, open_rows))
        weights = (blocks - blocks.amax((1, 2), keepdim=True)).exp_()
        _fill(tokens, open_rows, _invert(weights, weights.sum(-1).double(), _rows(uniform, open_rows)))
    narrow = [i for i, s in enumerate(settings) if s.temperature != 0 and _narrows(s)]
    # So many candidates whatever the batch asks for: which of equal logits are among them must not depend on the neighbours.
    for many in (*CANDIDATES, warm.shape[1]):
        if not narrow:
            break
        values, ids = _rows(warm, narrow), None
        total = _log_total(values)
        if many < warm.shape[1]:
            ids = values.topk(many, -1, sorted=False).indices.sort(-1).values
            values = values.gather(1, ids)
        cut = _Cut([settings[i] for i in narrow], values.double(), total)
        sure = cut.sure if ids is not None else [True] * len(narrow)
        drawn = _invert_rows(values.masked_fill(~cut.keep, float("-inf")), _rows(uniform, narrow))
        found = drawn if ids is None else ids.gather(1, drawn[:, None])[:, 0]
        done = [k for k, fine in enumerate(sure) if fine]
        if done:
            _fill(tokens, [narrow[k] for k in done], _rows(found, done))
        narrow = [place for place, fine in zip(narrow, sure, strict=True) if not fine]
    return tokens


class _Cut:
    """What top_k, then top_p, then min_p keep of candidates [R, C] in vocabulary order.

    Of equal logits the first in the vocabulary stay. `sure`: whether the candidates are enough to say so, by row.
    """

    def __init__(self, settings: Sequence[SampleSettings], values: Tensor, total: Tensor) -> None:
        device, size = values.device, values.shape[1]

        def column(numbers: list[float]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]

        order = values.argsort(dim=-1, descending=True, stable=True)
        ranked = values.gather(1, order)
        top_k = column([s.top_k or float("inf") for s in settings])
        place = torch.arange(size, device=device)[None]
        inside = place < top_k
        whole = torch.where(top_k[:, 0] < float("inf"), ranked.masked_fill(~inside, float("-inf")).logsumexp(-1), total)
        chance = (ranked - whole[:, None]).exp().masked_fill(~inside, 0.0)
        top_p, min_p = column([s.top_p for s in settings]), column([s.min_p for s in settings])
        upto = chance.cumsum(-1)
        # A token is out when those before it already reach top_p; the first one never is.
        keep = inside & ((upto - chance < top_p) | (top_p >= 1)) & (chance >= min_p * chance[:, :1])
        keep[:, 0] = True
        self.keep = torch.zeros_like(keep).scatter(1, order, keep)
        by_count = top_k[:, 0] <= size
        by_mass = (top_p < 1)[:, 0] & (upto[:, -1] >= top_p[:, 0]) & (top_k[:, 0] == float("inf"))
        by_size = ((min_p > 0) & (chance[:, -1:] < min_p * chance[:, :1]))[:, 0] & (top_k[:, 0] == float("inf"))
        # Where the least that is kept equals the least candidate, its equals outside may stand first in the vocabulary.
        tied = ranked.masked_fill(~keep, float("inf")).amin(-1) == ranked[:, -1]
        self.sure: list[bool] = ((by_count | by_mass | by_size) & ~tied).tolist()


def _log_total(values: Tensor) -> Tensor:
    most = values.amax(-1)
    return most.double() + (values - most[:, None]).exp_().sum(-1, dtype=torch.float64).log()


def _invert_rows(values: Tensor, uniform: Tensor) -> Tensor:
    weights = (values - values.amax(-1, keepdim=True)).exp_()[:, None]
    return _invert(weights, weights.sum(-1, dtype=torch.float64), uniform)


def _change(logits: Tensor, row: Asked) -> None:
    """Bias and penalties on one row [V], in place."""
    settings, device = row.settings, logits.device
    if settings.logit_bias:
        ids = torch.tensor(list(settings.logit_bias), device=device)
        logits[ids] += torch.tensor(list(settings.logit_bias.values()), dtype=logits.dtype, device=device)
    if settings.repetition_penalty != 1 and (seen := row.prompt | row.counts.keys()):
        ids = torch.tensor(sorted(seen), device=device)
        old = logits[ids]
        logits[ids] = torch.where(old > 0, old / settings.repetition_penalty, old * settings.repetition_penalty)
    if (settings.frequency_penalty or settings.presence_penalty) and row.counts:
        ids = torch.tensor(list(row.counts), device=device)
        counts = torch.tensor(list(row.counts.values()), dtype=logits.dtype, device=device)
        logits[ids] -= settings.frequency_penalty * counts + settings.presence_penalty


def _tops(logits: Tensor, log_total: Tensor, rows: Sequence[Asked]) -> list[tuple[tuple[int, float], ...]]:
    most = max((row.settings.top_logprobs for row in rows), default=0)
    if not most:
        return [()] * len(rows)
    found = logits.topk(min(most, logits.shape[1]), -1)
    values = (found.values.double() - log_total[:, None]).tolist()
    return [
        tuple(zip(ids[: row.settings.top_logprobs], logps[: row.settings.top_logprobs], strict=True))
        for ids, logps, row in zip(found.indices.tolist(), values, rows, strict=True)
    ]
