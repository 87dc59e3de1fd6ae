"""The compiled functions against PyTorch's operations: the same numbers to rounding, and their absence costs nothing but time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from processors import blocks, needs_compiler
from tunesmith.model import native
from tunesmith.model.cached import Cache, pack
from tunesmith.model.cached_layer import Part, Ready, forward, spans_of
from tunesmith.model.feed import NextTokens, Prompts
from tunesmith.model.fused_layer import _turn
from tunesmith.model.head import HeadForm, token_logprobs
from tunesmith.model.layer_ops import gate, gate_backward, rms_norm, rms_norm_backward
from tunesmith.model.many_adapters import Factors, Stack
from tunesmith.model.products import Blocked, Int8, product
from tunesmith.model.whole_step import WholeStep

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 8), (3, 24), (37, 192), (130, 577)]  # the last is work for two threads

# Where there is a compiler, functions that it does not take are a failure.
pytestmark = needs_compiler


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(work: Callable[[], Any]) -> tuple[Any, Any]:
    """What `work` gives with the compiled functions, and with PyTorch's operations."""
    with native.switched(True):
        ours = work()
    with native.switched(False):
        assert native.kernels(torch.float32) is None
        return ours, work()


def near(ours: Any, theirs: Any) -> None:
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype
        # A unit in the last place of bf16, twice, where something was rounded the other way.
        rough = {"rtol": 2**-6, "atol": 1e-6} if ours.dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 1e-5}
        torch.testing.assert_close(ours, theirs, **rough)
        if ours.dtype == torch.bfloat16:
            assert (ours != theirs).float().mean() < 0.02
    elif ours is None:
        assert theirs is None
    else:
        for one, other in zip(ours, theirs, strict=True):
            near(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_and_gates_and_their_gradients_are_pytorchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(*shape) * 3, normal(shape[1], dtype=dtype, seed=1)
    near(*both(lambda: rms_norm(x, weight, 1e-5)))
    _, unit, inverse = rms_norm(x, weight, 1e-5)
    dy = normal(*shape, dtype=dtype, seed=2)
    for need in (True, False):
        near(*both(partial(rms_norm_backward, dy, unit, inverse, weight, need)))
        near(*both(partial(rms_norm_backward, dy, unit, inverse, weight, need, x)))
    inner, up = normal(*shape, dtype=dtype, seed=3) * 8, normal(*shape, dtype=dtype, seed=4)
    near(*both(lambda: gate(inner, up)))
    near(*both(lambda: gate_backward(dy.clone(), inner, up)))
    joined = torch.cat([inner, up], 1)
    near(*both(lambda: gate(joined[:, : shape[1]], joined[:, shape[1] :])))


def test_the_gate_holds_at_the_ends_of_its_range() -> None:
    ends = torch.tensor([[-1e30, -200.0, -88.0, -87.0, -0.0, 0.0, 1e-30, 87.0, 88.0, 200.0, 1e30, float("nan"), float("inf")]])
    ones = torch.ones_like(ends)
    ours, theirs = both(lambda: gate(ends, ones))
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-6, atol=1e-30)
    ours, theirs = both(lambda: gate_backward(ones[:, 1:].clone(), ends[:, :-1], ones[:, 1:]))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-6, atol=1e-30)


def test_what_is_not_finite_stays_so() -> None:
    for bad in (float("nan"), float("inf")):
        for dtype in DTYPES:
            x, weight = normal(4, 64), normal(64, dtype=dtype)
            x[2, 5] = bad
            out = rms_norm(x, weight, 1e-5)[0]
            assert torch.isfinite(out).all(1).tolist() == [True, True, False, True]
            y = product([normal(8, 64)], [None], dtype, int8=True)(x.to(dtype))
            assert torch.isfinite(y).all(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 16, 300, 3000])
def test_log_probabilities_and_their_gradients_are_pytorchs(dtype: torch.dtype, vocabulary: int) -> None:
    hidden, weight = normal(40, 24, seed=1) * 3, normal(vocabulary, 24, seed=2)
    targets = torch.randint(0, vocabulary, (40,), generator=torch.Generator().manual_seed(0))

    def work() -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.to(dtype).requires_grad_(), weight.clone().requires_grad_()
        logp = token_logprobs(h, w, None, targets, HeadForm(), dtype)
        (logp * torch.linspace(-1, 1, 40)).sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        return logp.detach(), h.grad, w.grad

    (ours, *grads), (theirs, *others) = both(work)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)
    for one, other in zip(grads, others, strict=True):
        size = float(other.abs().max())
        assert float((one - other).abs().max()) < (1e-5 if dtype == torch.float32 else 0.02) * size


def test_logits_that_are_infinite_or_far_apart() -> None:
    logits = torch.full((4, 20), float("-inf"))
    logits[0, 3], logits[1, :], logits[2, 18], logits[2, 2], logits[3, 4] = 1.0, -1e30, 1e4, -1e4, float("nan")
    targets, logp = torch.tensor([3, 7, 18, 4]), torch.empty(4)
    fast = native.kernels(torch.float32)
    assert fast is not None
    fast.soften(logits.clone(), targets, logp, False)
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_turning_and_bringing_rows_together_is_pytorchs(dtype: torch.dtype) -> None:
    rows, index = normal(30, 16, dtype=dtype), torch.randint(0, 30, (700,), generator=torch.Generator().manual_seed(0))
    swapped = torch.stack([2 * index + 1, 2 * index], 1).view(-1)
    tables = (normal(700, 16, dtype=dtype, seed=1), normal(700, 16, dtype=dtype, seed=2))
    near(*both(lambda: _turn(rows, index, swapped, tables)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_8_bits_are_the_same(dtype: torch.dtype, bias: bool) -> None:
    def way(x: Tensor) -> Tensor:
        return product([normal(48, 64, seed=1), normal(16, 64, seed=2)], [normal(48, seed=3) if bias else None, None], dtype, int8=True)(x)

    gaps = []
    for rows in (1, 16, 17, 32, 33, 40, 64, 65, 130, 600):
        x = normal(rows, 64, dtype=dtype)
        ours, theirs = both(lambda x=x: way(x))
        assert ours.dtype == theirs.dtype == dtype
        # A value that lies between two steps may go to either: one step of its row and of the weight.
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.2)
        gaps.append((ours.float() - theirs.float()).abs())
    assert torch.cat(gaps).mean() < 3e-3
    assert not way(torch.zeros(1, 64, dtype=dtype))[0, 48:].any()


HIDDEN, INNER = 64, 128


def layers(count: int, dtype: torch.dtype, heads: int, keys: int, width: int, *, head_norms: bool = False, bias: bool = False,
           int8: bool = False, lora: bool = False) -> list[Ready]:  # fmt: skip
    """Layers with random weights, the same ones whoever multiplies them."""
    joined = (heads + 2 * keys) * width
    names = [["q", "k", "v"], ["o"], ["g", "u"], ["d"]]
    sizes = [[heads * width, keys * width, keys * width], [HIDDEN], [INNER, INNER], [HIDDEN]]
    inputs = [HIDDEN, heads * width, HIDDEN, INNER]
    out = []
    for number in range(count):
        parts = []
        for i in range(4):
            at = 100 * number + 10 * i
            weights = [normal(size, inputs[i], seed=at + k) * inputs[i] ** -0.5 for k, size in enumerate(sizes[i])]
            biases = [normal(size, seed=at + 5 + k) if bias else None for k, size in enumerate(sizes[i])]
            spans = spans_of([f"{number}.{name}" for name in names[i]], sizes[i])
            a, b = None, []
            if lora:  # of rank 4 on every second projection
                chosen = list(spans.values())[::2]
                a = normal(4 * len(chosen), inputs[i], dtype=dtype, seed=at + 8) * 0.1
                b = [
                    (span, slice(4 * k, 4 * k + 4), normal(4, span.stop - span.start, dtype=dtype, seed=at + 9))
                    for k, span in enumerate(chosen)
                ]
            parts.append(Part(spans, product(weights, biases, dtype, int8=int8, gated=i == 2), a, tuple(b)))
        norms = [normal(size, seed=100 * number + 50 + size).mul(0.1).add(1).to(dtype) for size in (HIDDEN, HIDDEN + 1, width, width + 1)]
        out.append(
            Ready(
                number,
                dtype,
                1e-5,
                norms[0],
                norms[1][1:],
                (norms[2], norms[3][1:]) if head_norms else None,
                *parts,
                heads,
                keys,
                width**-0.5,
            )
        )
    assert sum(size.stop for size in list(out[0].attention.spans.values())[-1:]) == joined
    return out


class Rows:
    """The adapters of rows, as a Mix says them."""

    def __init__(self, places: list[int], stacks: dict[tuple[str, ...], Stack]) -> None:
        self.places, self.stacks = torch.tensor(places), stacks

    def stack(self, paths: tuple[str, ...]) -> Stack | None:
        return self.stacks.get(paths)

    def add(self, spans: dict[str, slice], x: Tensor, y: Tensor) -> None:
        stack = self.stack(tuple(spans))
        for row, place in enumerate(self.places.tolist()):
            if stack is not None and place >= 0:
                for path, (rank, b) in stack.b.items():
                    y[row, spans[path]] += (x[row].to(y.dtype) @ stack.a[place, rank].t()) @ b[place]


def filled() -> Cache:
    """Rows of LENGTHS with room for three tokens more."""
    cache = Cache()
    for row, length in enumerate(LENGTHS):
        cache.add(row, length + 3)
    return cache


def three_steps(
    some: list[Ready], lengths: list[int], windows: list[int], mix: Callable[[Any], Rows] | None = None, *, int8: bool = False
) -> list[Tensor]:
    """What comes out of the layers for prompts of these lengths, and for three tokens behind each; `int8` is the cache's."""
    cache, outs, dtype = Cache(int8=int8), [], some[0].dtype
    whole = WholeStep(some) if WholeStep.can(some) else None
    width = int(some[0].scale ** -2 + 0.5)
    for row, length in enumerate(lengths):
        cache.add(row, length + 3)
    for step in range(4):
        if step == 0:
            feed: Any = Prompts(cache, [(row, [1] * length, 0) for row, length in enumerate(lengths)], torch.device("cpu"))
        else:
            feed = NextTokens(cache, {row: (1, length + step - 1) for row, length in enumerate(lengths)}, torch.device("cpu"))
        feed.mix = mix(feed) if mix else None
        # In fp64: PyTorch's first cosine of a process may be off by 1e-4 in fp32 when several threads work on it.
        angle = feed.positions[:, None] / 10 ** torch.linspace(0, 2, width // 2, dtype=torch.float64)
        rotary = (torch.cat([angle.cos()] * 2, 1)[:, None].to(dtype), torch.cat([-angle.sin(), angle.sin()], 1)[:, None].to(dtype))
        x = normal(len(feed.ids), HIDDEN, seed=step)
        if step and whole is not None:
            assert whole.run(x, feed, rotary, windows)
        else:
            for layer, window in zip(some, windows, strict=True):
                x = forward(x, layer, feed, rotary, window)
        outs.append(x[: len(feed.last) if step else feed.layout.real])
    kinds = {torch.int8 if isinstance(part.product, Int8) else dtype for ready in some for part in ready.parts}
    assert native.kernels(dtype) is None or whole is not None or not all(map(blocks, kinds))
    return outs


def close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    """To 1e-5 of their size in fp32; in bf16, whose sums are rounded in other places, to its rounding on average."""
    for one, other in zip(ours, theirs, strict=True):
        if dtype == torch.float32:
            assert (one - other).abs().max() < 1e-5 * other.abs().max()
        else:
            assert (one - other).abs().mean() < 0.02 * other.abs().mean()


LENGTHS = [3, 63, 64, 65, 130, 5, 9, 80, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "keys", "width"), [(2, 2, 16), (6, 2, 32), (9, 3, 64), (4, 4, 96), (10, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize(("window", "head_norms", "bias"), [(0, False, False), (7, True, False), (0, True, True)])
def test_a_whole_step_is_the_plain_layers(
    dtype: torch.dtype, heads: int, keys: int, width: int, window: int, head_norms: bool, bias: bool
) -> None:
    """Two layers, only the second with a window, over rows of several lengths in slots of several widths."""
    close(*both(lambda: three_steps(layers(2, dtype, heads, keys, width, head_norms=head_norms, bias=bias), LENGTHS, [0, window])), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_are_multiplied_at_once(dtype: torch.dtype) -> None:
    close(*both(lambda: three_steps(layers(2, dtype, 4, 2, 32), [2 + n % 5 for n in range(150)], [0, 0])), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_step_in_8_bits_is_near_the_plain_layers(dtype: torch.dtype) -> None:
    def steps() -> list[Tensor]:
        return three_steps(layers(2, dtype, 4, 2, 32, bias=True, int8=True), LENGTHS, [0, 0], int8=True)

    for one, other in zip(*both(steps), strict=True):
        assert (one - other).abs().mean() < 0.03 * other.abs().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "keys", "width"), [(2, 2, 16), (6, 2, 32), (9, 3, 64), (4, 4, 96), (10, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize("window", [0, 7])
def test_a_whole_step_reads_keys_and_values_in_8_bits(dtype: torch.dtype, heads: int, keys: int, width: int, window: int) -> None:
    """With products that are not rounded, so that rounding here is all there is: between the two ways, and far less than to none."""
    lengths = [*LENGTHS, 1030]
    ours, theirs = both(lambda: three_steps(layers(2, dtype, heads, keys, width), lengths, [0, window], int8=True))
    exact = three_steps(layers(2, dtype, heads, keys, width), lengths, [0, window])
    for one, other, third in zip(ours, theirs, exact, strict=True):
        size = other.abs().mean()
        assert (one - other).abs().mean() < (2e-4 if dtype == torch.float32 else 0.02) * size
        if dtype == torch.float32:
            assert 1e-3 * size < (one - third).abs().mean() < 0.02 * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "keys", "width"), [(6, 2, 32), (2, 1, 256)])
def test_sums_over_long_rows_in_8_bits_hold(dtype: torch.dtype, heads: int, keys: int, width: int) -> None:
    """Equal weights and the largest numbers over 1,500 keys: sums of whole numbers that 32 bits would not hold at once."""

    def step() -> list[Tensor]:
        [layer] = layers(1, dtype, heads, keys, width)
        cache, cpu, lengths = Cache(int8=True), torch.device("cpu"), [1500, 513, 2]
        one = torch.ones(1, 1, width // 2, dtype=dtype)
        for row, length in enumerate(lengths):
            cache.add(row, length + 3)
            feed: Any = Prompts(cache, [(row, [1] * length, 0)], cpu)
            rotary = (one.repeat(len(feed.ids), 1, 2), one.repeat(len(feed.ids), 1, 2) * 0)
            forward(normal(len(feed.ids), HIDDEN), layer, feed, rotary, 0)
        for pool in cache.pools.values():
            pool.keys[0].copy_(pack(torch.zeros(*pool.keys[0].shape[:-1], width)))
            pool.values[0].copy_(pack(torch.full((*pool.values[0].shape[:-1], width), 5.0)))
        feed = NextTokens(cache, {row: (1, length) for row, length in enumerate(lengths)}, cpu)
        rotary = (one.repeat(len(feed.ids), 1, 2), one.repeat(len(feed.ids), 1, 2) * 0)
        x = normal(len(feed.ids), HIDDEN)
        if WholeStep.can([layer]):
            assert WholeStep([layer]).run(x, feed, rotary, [0])
        else:
            assert native.kernels(dtype) is None or not blocks(dtype)
            x = forward(x, layer, feed, rotary, 0)
        return [x[: len(lengths)]]

    [ours], [theirs] = both(step)
    assert (ours - theirs).abs().mean() < (1e-4 if dtype == torch.float32 else 0.02) * theirs.abs().mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_step_goes_through_the_policys_own_adapter(dtype: torch.dtype) -> None:
    ours, theirs = both(lambda: three_steps(layers(2, dtype, 4, 2, 32, lora=True), LENGTHS, [0, 0]))
    close(ours, theirs, dtype)
    bare = three_steps(layers(2, dtype, 4, 2, 32), LENGTHS, [0, 0])
    assert (bare[1] - ours[1]).abs().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_of_a_whole_step_goes_through_its_adapter(dtype: torch.dtype) -> None:
    """Three adapters of several ranks, one without some layers, and rows that have none."""

    def adapter(seed: int, rank: int, missing: str) -> Factors:
        found = {}
        for layer in layers(2, dtype, 4, 2, 32):
            for part in layer.parts:
                inputs = {"o": 128, "d": INNER}.get(next(iter(part.spans)).partition(".")[2], HIDDEN)
                for path, span in part.spans.items():
                    if path.partition(".")[2] not in missing:
                        at = seed + 37 * len(found)
                        a = normal(rank, inputs, dtype=dtype, seed=at) * 0.1
                        found[path] = (a, normal(span.stop - span.start, rank, dtype=dtype, seed=at + 1) * 0.2)
        return Factors("", 1, found)

    adapters = [adapter(1000, 4, ""), adapter(2000, 16, "qg"), adapter(3000, 20, "")]

    def mix(feed: Any) -> Rows:
        stacks = {}
        for layer in layers(2, dtype, 4, 2, 32):
            for part in layer.parts:
                inputs = {"o": 128, "d": INNER}.get(next(iter(part.spans)).partition(".")[2], HIDDEN)
                shapes = {path: (span.stop - span.start, inputs) for path, span in part.spans.items()}
                stacks[tuple(part.spans)] = Stack(list(part.spans), adapters, shapes, torch.zeros(0, dtype=dtype))
        spans = feed.layout.spans if isinstance(feed, Prompts) else [(i, i + 1) for i in range(len(feed.rows))]
        places = [row % 4 - 1 for row, (a, b) in zip(feed.rows, spans, strict=True) for _ in range(a, b)]
        return Rows([*places, *[-1] * (len(feed.ids) - len(places))], stacks)

    ours, theirs = both(lambda: three_steps(layers(2, dtype, 4, 2, 32), LENGTHS, [0, 0], mix))
    close(ours, theirs, dtype)
    bare = three_steps(layers(2, dtype, 4, 2, 32), LENGTHS, [0, 0])
    order = NextTokens(filled(), dict.fromkeys(range(len(LENGTHS)), (1, 2)), torch.device("cpu")).rows
    apart = (bare[1] - ours[1]).abs().mean(1) > 0.05
    assert [row for row, other in zip(order, apart.tolist(), strict=True) if not other] == [row for row in order if row % 4 == 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "offset", "width"), [(1, 0, 1), (16, 0, 16), (5, 3, 8), (40, 0, 40), (33, 64, 97), (64, 500, 564), (8, 2, 40)]
)
def test_rows_look_back_as_a_masked_softmax_does(dtype: torch.dtype, rows: int, offset: int, width: int) -> None:
    scores = 4 * normal(6, rows, width, seed=rows).to(dtype)
    hidden = torch.arange(width)[None] > torch.arange(rows)[:, None] + offset
    scores[:, hidden] = float("nan")  # nobody reads what nobody sees
    want = torch.softmax(scores.double().masked_fill(hidden, float("-inf")), -1)
    kernels = native.kernels(dtype)
    assert kernels is not None
    kernels.look_back(scores, offset)
    assert not scores[:, hidden].any()
    torch.testing.assert_close(scores.double(), want, rtol=2**-8 if dtype == torch.bfloat16 else 3e-6, atol=1e-30)
    odd = normal(1, 2, 20, seed=3).to(dtype)
    odd[0, 1, 0] = float("nan")
    kernels.look_back(odd, 18)
    assert odd.isnan().any(-1).tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "gated"), [([48, 16], False), ([64, 64], True), ([7], False), ([200], False)])
def test_blocked_products_are_pytorchs(dtype: torch.dtype, outputs: list[int], gated: bool) -> None:
    weights = [normal(size, 64, seed=i) for i, size in enumerate(outputs)]
    biases = [normal(size, seed=9 + i) if i == 0 else None for i, size in enumerate(outputs)]
    for rows in (1, 8, 16, 17, 32, 33, 40, 64, 65, 130, 200, 600):
        x = normal(rows, 64, dtype=dtype, seed=rows)
        way = product(weights, biases, dtype, gated=gated)
        if not blocks(dtype):
            pytest.skip("this processor has no product of blocks in this precision")
        assert isinstance(way, Blocked)
        assert way(x[:0]).shape == (0, sum(outputs))
        bias = torch.cat([torch.zeros(size) if b is None else b.to(dtype).float() for b, size in zip(biases, outputs, strict=True)])
        near(way(x), torch.nn.functional.linear(x.float(), torch.cat(weights).to(dtype).float(), bias).to(dtype))
        assert torch.equal(way.run(x, native.WIDE), way(x).float())
        if sum(outputs) % 16 == 0:
            before = normal(rows, sum(outputs), seed=rows + 1)
            assert torch.equal(way.run(x, native.ONTO, onto=before.clone()), before + way(x).float())
        if gated:
            inner, up = way(x).chunk(2, 1)
            near(way.run(x, native.ACTIVE), gate(inner.contiguous(), up.contiguous()))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 7), (192, 33), (64, 96), (576, 200), (1472, 65)])
def test_sums_of_whole_numbers_are_exact(dtype: torch.dtype, int8: bool, inputs: int, outputs: int) -> None:
    """Every number of rows that a tile, a vector's rows or a part may have too many or too few; each sum is held by fp32."""
    if not blocks(torch.int8 if int8 else dtype):
        pytest.skip("this processor has no product of blocks in this precision")
    generator, most = torch.Generator().manual_seed(inputs), 127 if int8 else 15
    weight, x = (torch.randint(-most, most + 1, (size, inputs), generator=generator).float() for size in (outputs, 600))
    weight[:, 5] = x[:, 3] = most  # so that a step of 8 bits is 1
    way, want = product([weight], [None], dtype, int8=int8), x.double() @ weight.double().t()
    assert isinstance(way, Blocked)
    for rows in (*range(1, 42), 47, 56, 63, 64, 65, 127, 128, 129, 137, 512, 513, 600):
        assert torch.equal(way.run(x[:rows].to(dtype), native.WIDE), want[:rows].to(dtype).float()), f"{rows} rows"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_products_in_8_bits(dtype: torch.dtype) -> None:
    """Both halves of a gated block, with biases, for numbers of rows that each way of multiplying takes."""
    if not blocks(torch.int8):
        pytest.skip("this processor has no product of blocks in this precision")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randint(-127, 128, (96, 64), generator=generator).float() / 1024 for _ in range(2)]
    biases = [normal(96, seed=9), normal(96, seed=10)]
    x = torch.randint(-127, 128, (600, 64), generator=generator).float()
    for weight in weights:
        weight[:, 5] = 127 / 1024  # so that rounding to 8 bits changes nothing
    x[:, 3] = 127
    way = product(weights, biases, dtype, int8=True, gated=True)
    assert isinstance(way, Blocked)
    bias = torch.cat(biases).to(dtype).double()
    want = (x.double() @ torch.cat(weights).double().t() + bias).float()
    for rows in (1, 7, 8, 31, 32, 63, 64, 65, 128, 130, 600):
        some = x[:rows].to(dtype)
        near(way(some), want[:rows].to(dtype))
        inner, up = way(some).chunk(2, 1)
        near(way.run(some, native.ACTIVE), gate(inner.contiguous(), up.contiguous()))


def alone(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    return run.stdout + run.stderr


GUARDED = """
import ctypes, mmap, torch
from tunesmith.model.products import product
page, size = mmap.PAGESIZE, 40 * mmap.PAGESIZE
held = mmap.mmap(-1, size + page)
at = ctypes.addressof(ctypes.c_char.from_buffer(held))
assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(at + size), page, 0) == 0
for rows in (*range(1, 20), 33, 40, 65, 130, 160):
    for dtype in (torch.bfloat16, torch.float32):
        bytes_ = rows * 64 * dtype.itemsize
        x = torch.frombuffer(held, dtype=dtype, count=rows * 64, offset=size - bytes_).view(rows, 64).fill_(1)
        for int8 in (False, True):
            assert product([torch.ones(64, 64)], [None], dtype, int8=int8)(x).eq(64).all()
print("fine")
"""


def test_no_product_reads_beyond_its_rows() -> None:
    assert alone(GUARDED).strip().endswith("fine")


ASK = (
    "import logging; logging.basicConfig(level=20, format='%(message)s'); import torch; from tunesmith.model import native; "
    "print(native.kernels(torch.float32) is None)"
)


def test_without_a_compiler_pytorch_does_the_work(tmp_path: Any) -> None:
    assert alone(ASK, PATH=str(tmp_path), CXX="").split("\n")[0:2] in (
        ["True", "no C++ compiler (g++) is found: elementwise passes go through PyTorch's operations, which is slower"],
        ["no C++ compiler (g++) is found: elementwise passes go through PyTorch's operations, which is slower", "True"],
    )
    assert alone(ASK, TUNESMITH_NATIVE="0") == "True\n"


def test_a_compiler_that_fails_is_told_of_and_leaves_nothing(tmp_path: Any) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such header" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    out = alone(ASK, CXX=str(compiler), TUNESMITH_CACHE=str(tmp_path))
    assert "cannot be used" in out
    assert "no such header" in out
    assert "True" in out
    assert list((tmp_path / "native").iterdir()) == []


def test_it_is_compiled_once(tmp_path: Any) -> None:
    cache = {"TUNESMITH_CACHE": str(tmp_path)}
    assert alone(ASK, **cache) == "False\n"
    (made,) = (tmp_path / "native").iterdir()
    before = made.stat().st_mtime_ns
    assert alone(ASK, **cache) == "False\n"
    assert made.stat().st_mtime_ns == before
