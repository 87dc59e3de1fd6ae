"""Keys and values as the cache keeps them, and attention of prompts over them, against plain sums in fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from processors import needs_compiler
from tunesmith.model import native
from tunesmith.model.attention import Form
from tunesmith.model.cached import Cache, pack, unpack
from tunesmith.model.feed import NextTokens, Prompts

CPU = torch.device("cpu")
LENGTHS = [1, 63, 64, 65, 200, 5, 130, 20, 21, 22]
WIDTHS = [
    (2, 2, 16),
    (6, 2, 32),
    (9, 3, 64),
    (4, 4, 96),
    (10, 2, 128),
    (2, 1, 256),
    (64, 1, 16),
    (70, 1, 16),
]  # query heads, key heads, width

compiled_too = pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])


def heads_of(tokens: int, heads: int, keys: int, width: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as a layer has them, columns of one product."""
    generator = torch.Generator().manual_seed(seed)
    joined = torch.randn(tokens, (heads + 2 * keys), width, generator=generator).to(dtype)
    return joined[:, :heads], joined[:, heads : heads + keys], joined[:, heads + keys :]


def plainly(query: Tensor, key: Tensor, value: Tensor, past: int, window: int) -> Tensor:
    """Attention [n, H, D] of the last n tokens of one row [past + n, K, D], in fp64, one query and one head at a time."""
    out = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    q, k, v = (t.double() for t in (query, key, value))
    for i in range(len(q)):
        low = max(0, past + i + 1 - window) if window else 0
        for h in range(q.shape[1]):
            seen = slice(low, past + i + 1)
            shares = torch.softmax(k[seen, h // group] @ q[i, h] * q.shape[2] ** -0.5, 0)
            out[i, h] = shares @ v[seen, h // group]
    return out


def read_in_parts(
    lengths: list[int], cuts: tuple[float, ...], heads: int, keys: int, width: int, dtype: torch.dtype, window: int, int8: bool
) -> None:
    """Rows read in parts, that many shares of each one at a time, and compared with `plainly`."""
    cache = Cache(int8=int8)
    whole = [heads_of(length, heads, keys, width, dtype, row) for row, length in enumerate(lengths)]
    for row, length in enumerate(lengths):
        cache.add(row, length)
    for begin, end in pairwise(cuts):
        spans = {row: (int(begin * length), int(end * length)) for row, length in enumerate(lengths)}
        spans = {row: span for row, span in spans.items() if span[1] > span[0]}
        feed = Prompts(cache, [(row, [1] * (b - a), a) for row, (a, b) in spans.items()], CPU)
        joined = torch.full((len(feed.ids), heads + 2 * keys, width), float("nan"), dtype=dtype)  # filler is read by nobody
        for row, (first, last) in zip(feed.rows, feed.layout.spans, strict=True):
            joined[first:last] = torch.cat([part[slice(*spans[row])] for part in whole[row]], 1)
        query, key, value = joined.split([heads, keys, keys], 1)
        out = feed.attend(3, query, key, value, Form(width**-0.5, window))
        for row, (first, last) in zip(feed.rows, feed.layout.spans, strict=True):
            (past, end_at), (q, k, v) = spans[row], whole[row]
            if int8:
                k, v = (unpack(pack(part), dtype) for part in (k, v))
            want = plainly(q[past:end_at], k[:end_at], v[:end_at], past, window)
            gap = (out[first:last].double() - want).abs()
            most, mean = (1e-5, 1e-6) if dtype == torch.float32 else (0.04, 0.004)  # of numbers up to 4, of which bf16 keeps 1 in 256
            assert float(gap.max()) < most, (row, past)
            assert float(gap.mean()) < mean, (row, past)


@compiled_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "keys", "width"), WIDTHS)
def test_prompts_look_at_what_stands_before_them(heads: int, keys: int, width: int, dtype: torch.dtype, compiled: bool) -> None:
    with native.switched(compiled):
        read_in_parts(LENGTHS, (0, 1), heads, keys, width, dtype, 0, int8=False)
        read_in_parts(LENGTHS, (0, 1), heads, keys, width, dtype, 7, int8=False)


@compiled_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 70])
def test_prompts_read_in_parts_are_the_prompts(dtype: torch.dtype, window: int, compiled: bool) -> None:
    with native.switched(compiled):
        read_in_parts(LENGTHS, (0, 0.3, 0.35, 1), 6, 2, 32, dtype, window, int8=False)


@compiled_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "keys", "width"), WIDTHS)
def test_prompts_in_8_bits_look_at_the_rounded_ones(heads: int, keys: int, width: int, dtype: torch.dtype, compiled: bool) -> None:
    with native.switched(compiled):
        read_in_parts(LENGTHS, (0, 0.4, 1), heads, keys, width, dtype, 0, int8=True)


@needs_compiler
def test_more_prompts_than_are_laid_out_at_once() -> None:
    """Of 64 keys and values of this width 0.13 MB: 35 rows take more than 8 MB."""
    read_in_parts([70 + row for row in range(35)], (0, 1), 2, 1, 256, torch.float32, 0, int8=False)


def test_a_row_in_8_bits_is_its_formula() -> None:
    numbers = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 40])[:, None]
    kept = pack(numbers)
    assert kept.shape == (5, 3, 36)
    step = numbers.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(kept[..., -4:].contiguous().view(torch.float32), step)
    assert ((unpack(kept, torch.float32) - numbers).abs() <= 0.5001 * step).all()
    assert torch.equal(unpack(pack(torch.zeros(2, 16)), torch.float32), torch.zeros(2, 16))
    for odd in (float("nan"), float("inf")):
        numbers[1, 1, 5] = odd
        lost = unpack(pack(numbers), torch.float32)
        assert not lost[1, 1].isfinite().any(), "what is not finite does not become a number"
        assert lost[0].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_compiled_function_keeps_the_same_numbers(dtype: torch.dtype) -> None:
    _, key, value = heads_of(sum(LENGTHS), 6, 2, 32, dtype, 0)
    key[7, 1, 3] = float("nan")
    found = []
    for compiled in (True, False):
        with native.switched(compiled):
            cache = Cache(int8=True)
            for row, length in enumerate(LENGTHS):
                cache.add(row, length)
            feed = Prompts(cache, [(row, [1] * length, 0) for row, length in enumerate(LENGTHS)], CPU)
            assert (feed._keep(0, key, value) is None) is not compiled
            found.append([cache.take(row, length)[0] for row, length in enumerate(LENGTHS)])
    for ours, theirs in zip(*found, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            same, wanted = unpack(one, torch.float32), unpack(other, torch.float32)
            bad = wanted.isnan().any(-1)
            assert torch.equal(same.isnan().any(-1), bad)
            assert torch.equal(one[..., -4:][~bad], other[..., -4:][~bad])
            assert (one[..., :-4].int() - other[..., :-4].int())[~bad].abs().max() <= 1, "between two steps either one is right"


@compiled_too
def test_rows_in_8_bits_move_as_others_do(compiled: bool) -> None:
    """Wider slots, shared fronts, what was taken and given back, and the gap that a row leaves."""
    with native.switched(compiled):
        cache = Cache(int8=True)
        _, key, value = heads_of(60, 4, 2, 32, torch.bfloat16, 1)
        for row in range(3):
            cache.add(row, 60)
        feed = Prompts(cache, [(row, [1] * 20, 0) for row in range(3)], CPU)
        feed._keep(0, torch.cat([key, key[:4]]), torch.cat([value, value[:4]]))
        before = {row: cache.take(row, 20) for row in range(3)}
        assert cache.widen(1, 200)
        cache.drop(0)
        cache.add(7, 90)
        cache.share(7, 1, 15)
        cache.add(8, 30)
        cache.give(8, before[2], 20)
        for row, of, count in ((1, 1, 20), (2, 2, 20), (7, 1, 15), (8, 2, 20)):
            for now, then in zip(cache.take(row, count)[0], before[of][0], strict=True):
                assert now.dtype == torch.int8
                assert torch.equal(now, then[:, :count])
        assert cache.bytes() == sum(2 * pool.slots * 2 * pool.width * 36 for pool in cache.pools.values())


def test_the_plain_way_of_next_tokens_reads_8_bits() -> None:
    with native.switched(False):
        cache = Cache(int8=True)
        lengths = [3, 70, 12]
        whole = [heads_of(length + 1, 6, 2, 32, torch.float32, row) for row, length in enumerate(lengths)]
        for row, length in enumerate(lengths):
            cache.add(row, length + 1)
            _, key, value = (part[:length] for part in whole[row])
            padded = [torch.cat([part, part.new_zeros(-length % 64, *part.shape[1:])]) for part in (key, value)]
            Prompts(cache, [(row, [1] * length, 0)], CPU)._keep(0, *padded)
        feed = NextTokens(cache, {row: (1, length) for row, length in enumerate(lengths)}, CPU)
        filler = heads_of(len(feed.ids) - 3, 6, 2, 32, torch.float32, 9)
        new = [torch.cat([*(whole[row][part][-1:] for row in feed.rows), filler[part]]) for part in range(3)]
        out = feed.attend(0, *new, Form(32**-0.5))
        for place, row in enumerate(feed.rows):
            query, key, value = whole[row]
            want = plainly(query[-1:], *(unpack(pack(part), torch.float32) for part in (key, value)), lengths[row], 0)
            assert (out[place : place + 1].double() - want).abs().max() < 1e-5


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 96])
def test_rows_at_the_ends_of_their_range_in_8_bits(dtype: torch.dtype, width: int) -> None:
    """Ties go to the even number, the largest magnitude may stand in any lane, and what is not finite shows wherever it stands."""
    halves = torch.arange(width) - 40.5
    rows = [torch.cat([halves[:-1], torch.tensor([127.0])]), torch.cat([torch.tensor([-127.0]), halves[1:]])]
    rows += [torch.zeros(width), torch.full((width,), 1e-40), torch.full((width,), -torch.finfo(dtype).max)]
    odd = [float("inf"), -float("inf"), float("nan"), -float("nan")]
    for place in range(width):
        rows += [torch.ones(width).index_fill(0, torch.tensor([place]), value) for value in (*odd, -254.0)]
    numbers = torch.stack(rows).to(dtype)[:, None]
    cache = Cache(int8=True)
    cache.add(0, len(numbers))
    Prompts(cache, [(0, [1] * len(numbers), 0)], CPU)._keep(0, numbers, numbers)
    for kept in cache.take(0, len(numbers))[0]:
        steps = kept[0, :, -4:].contiguous().view(torch.float32)[:, 0]
        finite = numbers[:, 0].isfinite().all(1)
        assert torch.equal(steps.isnan(), ~finite)
        held = numbers[finite, 0].float()
        assert torch.equal(steps[finite], (held.abs().amax(1) / 127).clamp_min(1e-30))
        assert torch.equal(kept[0, finite, :-4].float(), (held / steps[finite, None]).round())
