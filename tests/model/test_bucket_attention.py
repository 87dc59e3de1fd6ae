"""The CPU kernel against PyTorch's attention, one document at a time, in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tunesmith.model import bucket_attention as kernel
from tunesmith.model.layout import BLOCK, TAIL, Layout

CPU = torch.device("cpu")
LENGTHS = {
    "many": list(range(70, 0, -3)),
    "alike": [16, 16, 16],
    "one token": [1],
    "single tokens": [70, 17, 16, 15, 2, 1, 1, 1],
    "several blocks": [3 * BLOCK - 7, 2 * BLOCK + 60, 2 * BLOCK, BLOCK + 1, 33, 5],
    "no filler": [TAIL, TAIL],
}


def inputs(total, heads, keys, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, h, width, dtype=torch.float64, generator=generator, requires_grad=True) for h in (heads, keys, keys)]


def reference(q, k, v, layout, scale, window):
    outs = []
    for start, stop in layout.spans:
        one = [t[start:stop].transpose(0, 1)[None] for t in (q, k, v)]
        far = torch.arange(stop - start)[:, None] - torch.arange(stop - start)[None]
        mask = (far >= 0) & (far < window) if window else far >= 0
        outs.append(F.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat([*outs, torch.zeros(layout.total - layout.real, *q.shape[1:], dtype=q.dtype)])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "keys"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [0, 5, 40, BLOCK + 3])
@pytest.mark.parametrize("keep", [kernel.KEEP_BYTES, 0], ids=["kept", "recomputed"])
def test_kernel_is_attention_per_document(lengths, heads, keys, window, keep, monkeypatch):
    monkeypatch.setattr(kernel, "KEEP_BYTES", keep)
    layout = Layout(lengths, CPU)
    q, k, v = inputs(layout.total, heads, keys)
    weight = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(9))
    ours, theirs = kernel.bucket_attention(q, k, v, layout, 0.3, window), reference(q, k, v, layout, 0.3, window)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    mine, truth = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs))
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert not bool(a[layout.real :].any())
    assert not bool(ours[layout.real :].any())


def test_kept_and_recomputed_weights_give_the_same_bits(monkeypatch):
    layout = Layout(LENGTHS["several blocks"], CPU)
    found = []
    for keep in (kernel.KEEP_BYTES, 0):
        monkeypatch.setattr(kernel, "KEEP_BYTES", keep)
        q, k, v = (t.detach().float().requires_grad_() for t in inputs(layout.total, 4, 2))
        kernel.bucket_attention(q, k, v, layout, 0.3, 0).square().sum().backward()
        found.append((q.grad, k.grad, v.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_filler_tokens_may_hold_anything():
    layout = Layout([40, 3, 1], CPU)
    q, k, v = (t.detach() for t in inputs(layout.total, 4, 2))
    before = kernel.bucket_attention(q, k, v, layout, 0.3, 0)
    for t in (q, k, v):
        t[layout.real :] = float("nan")
    assert torch.equal(kernel.bucket_attention(q, k, v, layout, 0.3, 0), before)


def test_kernel_gradient_by_finite_differences():
    layout = Layout([5, 3], CPU)
    q, k, v = inputs(layout.total, 4, 2, width=3)
    assert torch.autograd.gradcheck(lambda *qkv: kernel.bucket_attention(*qkv, layout, 0.5, 0), (q, k, v))


@pytest.mark.parametrize(("heads", "waste"), [(None, 0.5), ((2, 3), 0.2)], ids=["keys", "queries"])
def test_buckets_hold_every_token_once_and_waste_little(heads, waste):
    layout = Layout(sorted(([3, 200, 60, 61, 100, 199, 1, 300] * 9), reverse=True), CPU)
    index = layout.keys(2) if heads is None else layout.queries(*heads)
    real, padded = layout.real * index.heads, len(index.to_padded)
    assert torch.equal(index.to_padded[index.back[:real]], torch.arange(real))
    assert set(index.back[real:].tolist()) <= {padded}
    assert padded == real + len(index.filler)
    assert len(index.filler) < waste * real


def test_blocks_cover_the_rows_of_every_document_once():
    layout = Layout(LENGTHS["several blocks"], CPU)
    seen = [set() for _ in layout.lengths]
    for block in layout.blocks:
        for number in range(block.bucket.first + block.first, block.bucket.first + block.last):
            rows = set(range(block.low, min(block.high, layout.lengths[number])))
            assert not rows & seen[number]
            seen[number] |= rows
            assert block.high <= block.bucket.width
    assert seen == [set(range(length)) for length in layout.lengths]


def test_the_number_of_tokens_is_rounded_up_on_a_cpu_and_positions_restart():
    layout = Layout([40, 3, 1], CPU)
    assert (layout.real, layout.total) == (44, 64)
    assert layout.positions.tolist() == [*range(40), *range(3), 0, *[0] * 20]
    assert layout.runs.ends.tolist() == layout.runs.key_ends.tolist() == [0, 40, 43, 44]
    assert layout.runs.keys is None


TREES = {
    "pairs": ([300, 60, 33], {0: (100, (220,)), 2: (8, (20,))}),
    "many tails": ([400, 300, 290, 20], {0: (BLOCK, (200, 260, 261, 390)), 1: (1, (150,)), 3: (19, (19,))}),
    "tails across blocks": ([3 * BLOCK], {0: (BLOCK - 3, (BLOCK + 5, 2 * BLOCK - 1))}),
}


@pytest.mark.parametrize(("lengths", "trees"), TREES.values(), ids=TREES)
@pytest.mark.parametrize(("heads", "keys"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("keep", [kernel.KEEP_BYTES, 0], ids=["kept", "recomputed"])
def test_every_tail_sees_its_front_and_itself(lengths, trees, heads, keys, keep, monkeypatch):
    monkeypatch.setattr(kernel, "KEEP_BYTES", keep)
    layout = Layout(lengths, CPU, trees)
    q, k, v = inputs(layout.total, heads, keys)
    weight = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(9))
    ours = kernel.bucket_attention(q, k, v, layout, 0.3, 0)
    outs, places = [], []
    for number, (start, stop) in enumerate(layout.spans):
        front, tails = trees.get(number, (0, ()))
        ends = [0, *tails, stop - start]
        for begin, end in itertools.pairwise(ends):
            shared = range(front) if begin else ()
            rows = [start + i for i in (*shared, *range(begin, end))]
            one = [t[rows].transpose(0, 1)[None] for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*one, is_causal=True, scale=0.3, enable_gqa=True)
            outs.append(out[0].transpose(0, 1)[len(shared) :])
            places += range(len(shared), len(rows))
    theirs = torch.cat([*outs, torch.zeros(layout.total - layout.real, *q.shape[1:], dtype=q.dtype)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    mine, truth = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs))
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert layout.positions[: layout.real].tolist() == places


def test_layout_wants_the_longest_first():
    with pytest.raises(ValueError, match="longest first"):
        Layout([3, 5], CPU)
