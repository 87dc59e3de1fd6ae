"""Every hand-written backward function against autograd, in fp64."""

import itertools

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tunesmith.model import fused_layer
from tunesmith.model.layer_ops import Linear, gate, gate_backward, linears, linears_backward, rms_norm, rms_norm_backward, wide
from tunesmith.model.layout import Layout

RANKS = [(None, None, None), (3, 3, 3), (2, None, 5), (None, 4, None)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def near(a, b, limit=1e-12):
    torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("shape", [(7, 6), (4, 3, 6)])
@pytest.mark.parametrize("need_weight", [True, False])
def test_rms_norm(shape, need_weight):
    x, weight, dy, eps = draw(*shape), draw(6, seed=1), draw(*shape, seed=2).detach(), 0.1
    truth = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    dx, dw = torch.autograd.grad(truth, (x, weight), dy)
    kept = dy.clone()
    with torch.no_grad():
        y, unit, inverse = rms_norm(x, weight, eps)
        ours, ours_weight = rms_norm_backward(dy, unit, inverse, weight, need_weight)
    near(y, truth.detach())
    near(ours, dx)
    assert (ours_weight is not None) == need_weight
    if need_weight:
        near(ours_weight, dw)
    assert torch.equal(dy, kept)


def test_rms_norm_of_a_zero_row_is_finite():
    y, unit, inverse = rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6)
    assert not bool(y.any())
    assert bool(torch.isfinite(rms_norm_backward(torch.ones(2, 4), unit, inverse, torch.ones(4), True)[0]).all())


def test_norms_stay_wide_beside_narrow_products():
    x, weight = draw(5, 8, dtype=torch.float32).detach(), torch.ones(8, dtype=torch.bfloat16)
    y, unit, inverse = rms_norm(x, weight, 1e-6)
    assert (y.dtype, unit.dtype, inverse.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    dx, dw = rms_norm_backward(y, unit, inverse, weight, True)
    assert (dx.dtype, dw.dtype) == (torch.float32, torch.float32)
    assert [wide(d) for d in (torch.bfloat16, torch.float32, torch.float64)] == [torch.float32, torch.float32, torch.float64]


def test_gate():
    inner, up, dy = draw(5, 4), draw(5, 4, seed=1), draw(5, 4, seed=2).detach()
    truth = inner * torch.sigmoid(inner) * up
    d_inner, d_up = torch.autograd.grad(truth, (inner, up), dy)
    with torch.no_grad():
        near(gate(inner, up), truth.detach())
        again, ours_inner, ours_up = gate_backward(dy.clone(), inner, up)
    near(again, truth.detach())
    near(ours_inner, d_inner)
    near(ours_up, d_up)


def layer(number, rank, bias, scale, need_weight, need_bias):
    """A layer with outputs of its own width, and the leaves it is made of: weight, bias, a, b (unscaled)."""
    width = 4 + number
    weight, shift = draw(width, 6, seed=number), draw(width, seed=10 + number) if bias else None
    a, b = (draw(rank, 6, seed=20 + number), draw(width, rank, seed=30 + number)) if rank else (None, None)
    leaves = (weight, shift, a, b)
    weight, shift, a, b = (None if t is None else t.detach() for t in leaves)
    return Linear(weight, shift, a, None if b is None else b * scale, scale, need_weight, need_bias and bias), leaves


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("need_x", "need_weight", "need_bias"), list(itertools.product([True, False], repeat=3)))
def test_linears(ranks, bias, need_x, need_weight, need_bias):
    x, scale = draw(7, 6, seed=99), 1.7
    group, leaves = zip(*(layer(i, rank, bias, scale, need_weight, need_bias) for i, rank in enumerate(ranks)), strict=True)
    dys = [draw(7, len(one.weight), seed=40 + i).detach() for i, one in enumerate(group)]
    truth = [x @ w.t() + (0 if shift is None else shift) + (0 if a is None else scale * (x @ a.t()) @ b.t()) for w, shift, a, b in leaves]
    wanted = [x, *(t for four in leaves for t in four if t is not None)]
    dx, *rest = torch.autograd.grad(sum((y * dy).sum() for y, dy in zip(truth, dys, strict=True)), wanted)
    with torch.no_grad():
        outs, small = linears(x, group)
        ours, grads = linears_backward(dys, x, small, group, need_x)
    for out, y in zip(outs, truth, strict=True):
        near(out, y.detach())
    assert (ours is not None) == need_x
    if need_x:
        near(ours, dx)
    left = iter(rest)
    for grad, (_, shift, a, _) in zip(grads, leaves, strict=True):
        found = [(grad.weight, next(left), need_weight)]
        found += [] if shift is None else [(grad.bias, next(left), need_bias)]
        found += [] if a is None else [(grad.a, next(left), True), (grad.b, next(left), True)]
        for mine, theirs, needed in found:
            assert (mine is not None) == needed
            if needed:
                near(mine, theirs)
        assert shift is not None or grad.bias is None
        assert a is not None or (grad.a is None and grad.b is None)


@pytest.mark.parametrize(("keys", "group"), [(2, 1), (2, 3)])
def test_the_attention_turn_and_its_way_back(keys, group):
    """Padded and turned rows are transformers' rotation, scaled for queries; the way back is the transpose of the way there."""
    layout, width, scale = Layout([20, 7, 1], torch.device("cpu")), 8, 0.3
    angles = layout.positions[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.02], dtype=torch.float64)
    cos, sin = (f(torch.cat([angles, angles], 1))[None] for f in (torch.cos, torch.sin))
    query, key = (draw(layout.total, heads, width, seed=seed) for seed, heads in enumerate((keys * group, keys)))
    turned = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    tables = fused_layer.rotary_tables(cos, sin, layout, keys, group, scale, torch.float64)
    cases = (
        (query, turned[0] * scale, layout.queries(keys, group), tables.query, tables.query_back),
        (key, turned[1], layout.keys(keys), tables.key, tables.key_back),
    )
    for leaf, plain, index, there, back in cases:
        truth = plain[0].transpose(0, 1).reshape(-1, width)[index.to_padded]
        d = draw(len(truth), width, seed=5).detach()
        d[index.filler] = 0
        [truth_back] = torch.autograd.grad(truth, leaf, d)
        with torch.no_grad():
            padded = fused_layer._turn(leaf.view(-1, width), index.to_padded, index.swapped, there)
            returned = fused_layer._turn(torch.cat([d, d.new_zeros(1, width)]), index.back, index.swapped_back, back)
        near(padded, truth.detach())
        near(returned.view_as(leaf), truth_back)
        assert not bool(returned.view(layout.total, -1)[layout.real :].any())


def test_tables_are_made_once_for_layers_that_share_the_angles():
    layout = Layout([5], torch.device("cpu"))
    cos, sin = torch.rand(1, layout.total, 8), torch.rand(1, layout.total, 8)
    first = fused_layer.rotary_tables(cos, sin, layout, 2, 2, 0.3, torch.float32)
    assert fused_layer.rotary_tables(cos, sin, layout, 2, 2, 0.3, torch.float32) is first
    assert fused_layer.rotary_tables(cos * 2, sin, layout, 2, 2, 0.3, torch.float32) is not first
