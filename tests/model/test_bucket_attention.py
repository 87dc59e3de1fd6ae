import pytest
import torch
import torch.nn.functional as F

from tunesmith.model import bucket_attention as kernel
from tunesmith.model.layout import Layout


def inputs(total, heads, keys, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, h, width, dtype=torch.float64, generator=generator, requires_grad=True) for h in (heads, keys, keys)]


def reference(q, k, v, lengths, scale, window):
    outs, start = [], 0
    for length in lengths:
        one = [t[start : start + length].transpose(0, 1)[None] for t in (q, k, v)]
        far = torch.arange(length)[:, None] - torch.arange(length)[None]
        mask = (far >= 0) & (far < window) if window else far >= 0
        outs.append(F.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
        start += length
    return torch.cat(outs)


LENGTHS = [list(range(70, 0, -3)), [16, 16, 16], [1], [70, 17, 16, 15, 2, 1, 1]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "keys"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("keep", [kernel.KEEP_BYTES, 0])
def test_kernel_is_attention_per_document(lengths, heads, keys, window, keep, monkeypatch):
    monkeypatch.setattr(kernel, "KEEP_BYTES", keep)
    q, k, v = inputs(sum(lengths), heads, keys)
    weight = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(9))
    layout = Layout(lengths, torch.device("cpu"))
    ours = kernel.bucket_attention(q, k, v, layout, 0.3, window)
    theirs = reference(q, k, v, lengths, 0.3, window)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)), torch.autograd.grad((theirs * weight).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_kernel_gradient_by_finite_differences():
    q, k, v = inputs(5 + 3, 4, 2, width=3)
    layout = Layout([5, 3], torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda *qkv: kernel.bucket_attention(*qkv, layout, 0.5, 0), (q, k, v))


def test_buckets_hold_every_token_once_and_waste_little():
    lengths = sorted(([3, 200, 60, 61, 100, 199, 1] * 9), reverse=True)
    layout = Layout(lengths, torch.device("cpu"))
    index = layout.index(2, 3)
    rows = index.to_padded[index.back]
    assert torch.equal(rows, torch.arange(sum(lengths) * 6))
    assert len(index.to_padded) == len(index.back) + len(index.filler)
    assert len(index.filler) < 0.25 * len(index.back)


def test_layout_wants_the_longest_first():
    with pytest.raises(ValueError, match="longest first"):
        Layout([3, 5], torch.device("cpu"))
