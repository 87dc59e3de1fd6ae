"""A whole decoder layer as one function with its own backward, for the Llama family on a CPU.

x + o(attention(norm(x))), then x + down(gate(norm(x))): what transformers' layer does, with one node in the graph in place of about forty,
nothing saved twice, and the residual stream in fp32. Saved a token: normalised inputs, query, key, value, attention output, gate and
up; or, for a layer that recomputes, its input alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.model import gradients, native
from tunesmith.model.bucket_attention import attend_padded, attend_padded_backward
from tunesmith.model.layer_ops import (
    Linear,
    LinearGrads,
    compiled,
    gate,
    gate_backward,
    input_gradient,
    linear_added,
    linears,
    linears_backward,
    own_products,
    rms_norm,
    rms_norm_backward,
    small_gradient,
    weight_gradients,
    wide,
)
from tunesmith.model.layout import Layout

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Rotary:
    """Pairs (cos, signed sin) of one forward pass: for query and key rows in padded order [R, D], and for the way back in token order.

    The sin goes with the exchanged halves; the query's tables carry the scale of the scores.
    """

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    query_back: tuple[Tensor, Tensor]
    key_back: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the layer is made of, apart from tensors that are trained: the same in every call while no weight moves."""

    dtype: torch.dtype
    keys: int
    group: int
    eps: float
    first_norm: Tensor
    second_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    linear: dict[str, Linear]
    train_norms: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call of the layer goes by."""

    of: Parts
    layout: Layout
    rotary: Rotary
    window: int
    recompute: bool
    fast: native.Kernels | None = None  # attention by documents in a function of ours: rows stay in the order of tokens
    read: Tensor | None = None  # with `fast`, in the last layer: the tokens whose output is read, in order; that of the others is 0


@dataclass(slots=True)
class Saved:
    """What the backward pass needs of the forward pass."""

    unit1: Tensor
    inverse1: Tensor
    small1: Tensor | None
    query_small: Tensor | None
    heads: list[tuple[Tensor, Tensor]]
    q: Tensor
    k: Tensor
    v: Tensor
    kept: list[Tensor]
    attended: Tensor
    small2: Tensor | None
    unit2: Tensor
    inverse2: Tensor
    small3: Tensor | None
    inner: Tensor
    up: Tensor
    small4: Tensor | None


def forward(x: Tensor, plan: Plan) -> tuple[Tensor, Saved]:
    """The layer's output [T, E] from its input [T, E], both wide."""
    layers = plan.of.linear
    h, unit1, inverse1 = rms_norm(x, plan.of.first_norm, plan.of.eps)
    tokens, query_small = len(x), None
    if plan.read is None:
        (query, key, value), small1 = linears(h, [layers["q_proj"], layers["k_proj"], layers["v_proj"]])
    else:
        (key, value), small1 = linears(h, [layers["k_proj"], layers["v_proj"]])
        (query,), query_small = linears(h.index_select(0, plan.read), [layers["q_proj"]])
        x = x.index_select(0, plan.read)
    q, k, v, heads = _turned(query, key, value, plan)
    if plan.fast is not None:
        attended, *kept = plan.fast.attend_documents(q, k, v, _documents(plan), plan.of.keys, plan.window)
    else:
        out, kept = attend_padded(q, k, v, plan.layout, plan.of.keys, plan.of.group, plan.window)
        attended = out.index_select(0, plan.layout.queries(plan.of.keys, plan.of.group).back).view(len(x), -1)
    x, small2 = linear_added(attended, layers["o_proj"], x, in_place=False)
    h, unit2, inverse2 = rms_norm(x, plan.of.second_norm, plan.of.eps)
    (inner, up), small3 = linears(h, [layers["gate_proj"], layers["up_proj"]])
    x, small4 = linear_added(gate(inner, up), layers["down_proj"], x, in_place=True)
    saved = Saved(unit1, inverse1, small1, query_small, heads, q, k, v, kept, attended, small2, unit2, inverse2, small3, inner, up, small4)
    return (x if plan.read is None else _spread(x, plan.read, tokens)), saved


def backward(dy: Tensor, plan: Plan, saved: Saved, need_x: bool) -> tuple[Tensor | None, dict[str, LinearGrads], list[Tensor | None]]:
    """Gradients with respect to the input (wide), the linear layers, and the norms (first, second, query's, key's)."""
    layers, grads = plan.of.linear, {}
    if plan.read is not None:
        dy = dy.index_select(0, plan.read)
    narrow = dy.to(plan.of.dtype)
    d_inner, d_up, grads["down_proj"] = _down_backward(narrow, saved, plan)
    h = saved.unit2 * plan.of.second_norm
    dh, (grads["gate_proj"], grads["up_proj"]) = linears_backward(
        [d_inner, d_up], h, saved.small3, [layers["gate_proj"], layers["up_proj"]], True
    )
    assert dh is not None
    dx, d_norm2 = rms_norm_backward(dh, saved.unit2, saved.inverse2, plan.of.second_norm, plan.of.train_norms, dy)
    narrow = dx.to(plan.of.dtype)
    d_attended, (grads["o_proj"],) = linears_backward([narrow], saved.attended, saved.small2, [layers["o_proj"]], True)
    assert d_attended is not None
    d_query, d_key, d_value, d_heads = _attention_backward(d_attended, plan, saved)
    h, need_h = saved.unit1 * plan.of.first_norm, need_x or plan.of.train_norms
    if plan.read is None:
        dh, (grads["q_proj"], grads["k_proj"], grads["v_proj"]) = linears_backward(
            [d_query, d_key, d_value], h, saved.small1, [layers["q_proj"], layers["k_proj"], layers["v_proj"]], need_h
        )
    else:
        dh, (grads["k_proj"], grads["v_proj"]) = linears_backward(
            [d_key, d_value], h, saved.small1, [layers["k_proj"], layers["v_proj"]], need_h
        )
        some, (grads["q_proj"],) = linears_backward([d_query], h.index_select(0, plan.read), saved.query_small, [layers["q_proj"]], need_h)
        if dh is not None and some is not None:
            dh, dx = dh.index_add_(0, plan.read, some), _spread(dx, plan.read, len(dh))
    if dh is None:
        return None, grads, [None, d_norm2, *d_heads]
    dx1, d_norm1 = rms_norm_backward(dh, saved.unit1, saved.inverse1, plan.of.first_norm, plan.of.train_norms, dx)
    return dx1, grads, [d_norm1, d_norm2, *d_heads]


def _documents(plan: Plan) -> tuple[Any, Any]:
    return plan.layout.documents if plan.read is None else plan.layout.read_documents


def _spread(rows: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Those rows at their places, zeros elsewhere: [tokens, E]."""
    return rows.new_zeros(tokens, rows.shape[1]).index_copy_(0, places, rows)


def _down_backward(dy: Tensor, saved: Saved, plan: Plan) -> tuple[Tensor, Tensor, LinearGrads]:
    """The down product needs the gate's output, which is worked out once more between its two halves."""
    group = [plan.of.linear["down_proj"]]
    d_small = small_gradient([dy], group)
    gated, d_inner, d_up = gate_backward(input_gradient([dy], d_small, group), saved.inner, saved.up)
    (grads,) = weight_gradients([dy], gated, saved.small4, d_small, group)
    return d_inner, d_up, grads


def _turned(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Query, key and value [T, heads * D] turned by their positions: as padded rows [R, D], or as they were, for attention by documents."""
    width = query.shape[1] // (plan.of.keys * plan.of.group)
    rows, key_rows = plan.layout.queries(plan.of.keys, plan.of.group), plan.layout.keys(plan.of.keys)
    query, key, value = (t.view(-1, width) for t in (query, key, value))
    heads = []
    if plan.of.head_norms is not None:
        query, *first = rms_norm(query.to(wide(plan.of.dtype)), plan.of.head_norms[0], plan.of.eps)
        key, *second = rms_norm(key.to(wide(plan.of.dtype)), plan.of.head_norms[1], plan.of.eps)
        heads = [(first[0], first[1]), (second[0], second[1])]
    if plan.fast is not None:
        q = _turn_straight(plan.fast, query, plan.layout, plan.of.keys * plan.of.group, plan.rotary.query)
        k = _turn_straight(plan.fast, key, plan.layout, plan.of.keys, plan.rotary.key)
        return q, k, value.view(len(k), -1), heads
    q = _turn(query, rows.to_padded, rows.swapped, plan.rotary.query)
    k = _turn(key, key_rows.to_padded, key_rows.swapped, plan.rotary.key)
    return q, k, value.index_select(0, key_rows.to_padded), heads


def _turn_straight(fast: native.Kernels, rows: Tensor, layout: Layout, heads: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rows of heads turned where they are: [N, heads * D]."""
    flat = rows.view(-1, tables[0].shape[1])
    return fast.turn(flat, layout.straight(heads)[: len(flat)], tables).view(-1, heads * flat.shape[1])


def _turn(rows: Tensor, index: Tensor, swapped: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rows moved by `index` and rotated (Su 2021, arXiv:2104.09864): a * cos + (a with its halves exchanged) * signed sin."""
    if tables[0].shape[1] == rows.shape[1] and (fast := compiled(rows.dtype, rows)) is not None:
        return fast.turn(rows, index, tables)
    width = rows.shape[1]
    half = rows.view(-1, width // 2).index_select(0, swapped).view(-1, width)
    return rows.index_select(0, index).mul_(tables[0]).addcmul_(half, tables[1])


def _attention_backward(d: Tensor, plan: Plan, saved: Saved) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    if plan.fast is not None:
        return _documents_backward(d, plan, saved, plan.fast)
    rows, key_rows = plan.layout.queries(plan.of.keys, plan.of.group), plan.layout.keys(plan.of.keys)
    width = saved.q.shape[1]
    do = d.view(-1, width).index_select(0, rows.to_padded).index_fill_(0, rows.filler, 0.0)
    dq, dk, dv = attend_padded_backward(do, saved.q, saved.k, saved.v, saved.kept, plan.layout, plan.of.keys, plan.of.group, plan.window)
    dq = _turn(dq, rows.back, rows.swapped_back, plan.rotary.query_back)
    dk = _turn(dk, key_rows.back, key_rows.swapped_back, plan.rotary.key_back)
    dv = dv.index_select(0, key_rows.back)
    dq, dk, d_heads = _head_norms_backward(dq, dk, plan, saved)
    tokens = len(d)
    return dq.view(tokens, -1), dk.view(tokens, -1), dv.view(tokens, -1), d_heads


def _documents_backward(d: Tensor, plan: Plan, saved: Saved, fast: native.Kernels) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    back = (d, saved.attended, saved.kept[0])
    dq, dk, dv = fast.attend_documents(saved.q, saved.k, saved.v, _documents(plan), plan.of.keys, plan.window, back)
    dq = _turn_straight(fast, dq, plan.layout, plan.of.keys * plan.of.group, plan.rotary.query_back)
    dk = _turn_straight(fast, dk, plan.layout, plan.of.keys, plan.rotary.key_back)
    width = dv.shape[1] // plan.of.keys
    dq, dk, d_heads = _head_norms_backward(dq.view(-1, width), dk.view(-1, width), plan, saved)
    return dq.view(len(d), -1), dk.view(len(dv), -1), dv, d_heads


def _head_norms_backward(dq: Tensor, dk: Tensor, plan: Plan, saved: Saved) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Through the norms of query's and key's heads, where there are any."""
    if plan.of.head_norms is None:
        return dq, dk, [None, None]
    (unit, inverse), (key_unit, key_inverse) = saved.heads
    wide_q, d_query = rms_norm_backward(dq, unit, inverse, plan.of.head_norms[0], plan.of.train_norms)
    wide_k, d_key = rms_norm_backward(dk, key_unit, key_inverse, plan.of.head_norms[1], plan.of.train_norms)
    return wide_q.to(plan.of.dtype), wide_k.to(plan.of.dtype), [d_query, d_key]


def by_documents(dtype: torch.dtype, width: int) -> native.Kernels | None:
    """The compiled functions where attention goes by documents: heads of a multiple of 32 numbers in bf16, on processors that have it."""
    return own_products(dtype) if width % 32 == 0 else None


def rotary_tables(
    cos: Tensor, sin: Tensor, layout: Layout, keys: int, group: int, scale: float, dtype: torch.dtype, straight: bool = False,
    read: Tensor | None = None,
) -> Rotary:  # fmt: skip
    """The tables for this layout from transformers' cos and sin [1, T, D], worked out once for all layers that share them.

    `straight`: for rows in the order of tokens instead of the padded one; then queries may be those of the tokens of `read` alone.
    """
    name = ("rotary", cos.data_ptr(), sin.data_ptr(), keys, group, scale, dtype, straight, read is not None)
    if name not in layout.kept:
        held = (cos, sin)  # kept, so that no other tensor takes their address while it is a name
        rows, key_rows = layout.queries(keys, group), layout.keys(keys)
        cos, sin = cos[0].to(wide(dtype)), sin[0].to(wide(dtype))
        signed = torch.cat([-sin[:, : sin.shape[1] // 2], sin[:, sin.shape[1] // 2 :]], 1)
        tokens = torch.arange(layout.total, device=cos.device)
        asked = (tokens if read is None else read).repeat_interleave(rows.heads)

        def pair(index: Tensor, sign: float, factor: float) -> tuple[Tensor, Tensor]:
            return (cos.index_select(0, index) * factor).to(dtype), (signed.index_select(0, index) * (sign * factor)).to(dtype)

        layout.kept[name] = (
            Rotary(
                pair(asked if straight else rows.to_padded // rows.heads, 1, scale),
                pair(tokens.repeat_interleave(keys) if straight else key_rows.to_padded // keys, 1, 1.0),
                pair(asked, -1, scale),
                pair(tokens.repeat_interleave(keys), -1, 1.0),
            ),
            held,
        )
    found: tuple[Rotary, tuple[Tensor, Tensor]] = layout.kept[name]
    return found[0]


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *parameters: Tensor | None) -> Tensor:
        out, saved = forward(x, plan)
        ctx.plan, ctx.parameters = plan, parameters
        ctx.saved = None if plan.recompute else saved
        if plan.recompute:
            ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        if ctx.saved is None and not plan.recompute:
            raise RuntimeError("a second backward pass through the same layer")
        saved, ctx.saved = ctx.saved, None
        with torch.autocast(grads[0].device.type, enabled=False):
            if saved is None:
                saved = forward(ctx.saved_tensors[0], plan)[1]
            dx, layers, norms = backward(grads[0], plan, saved, ctx.needs_input_grad[0])
        flat: list[Tensor | None] = list(norms)
        for name in PROJECTIONS:
            one = layers[name]
            flat += [one.weight, one.bias, one.a, one.b]
        for i, (parameter, gradient) in enumerate(zip(ctx.parameters, flat, strict=True)):
            if not ctx.needs_input_grad[2 + i]:
                flat[i] = None
            elif gradient is not None and gradient.dtype != parameter.dtype and gradients.is_direct(parameter):
                # In the parameter's own dtype autograd takes the tensor as it is, and nothing would be saved.
                gradients.add(parameter, gradient)
                flat[i] = None
        return dx, None, *flat


fused_layer: Callable[..., Tensor] = _FusedLayer.apply
