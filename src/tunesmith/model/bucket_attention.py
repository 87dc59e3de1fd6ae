"""The CPU kernel: documents of similar length in padded buckets, one chain of batched products a block of query rows.

Grouped-query heads are folded into the rows: the scores of a block are [documents * K, G * rows, keys up to the block's end].
Filler rows copy the last real row of their document: causality hides them from real queries, and their output gradient is
set to zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.model import native
from tunesmith.model.layout import STEP, Block, Layout

KEEP_BYTES = 64 << 20  # attention weights of one layer above this size are computed again in the backward pass


def bucket_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int) -> Tensor:
    """Causal attention [N, H, D] x [N, K, D] -> [N, H, D] inside each document; `window` 0 looks back without limit."""
    with torch.autocast(query.device.type, enabled=False):
        return _bucket_attention(query, key, value, layout, scale, window)


class _BucketAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int) -> Tensor:
        n, heads, width = query.shape
        keys = key.shape[1]
        rows, key_rows = layout.queries(keys, heads // keys), layout.keys(keys)
        q = query.reshape(n * heads, width).index_select(0, rows.to_padded).mul_(scale)
        k = key.reshape(n * keys, width).index_select(0, key_rows.to_padded)
        v = value.reshape(n * keys, width).index_select(0, key_rows.to_padded)
        out, kept = attend_padded(q, k, v, layout, keys, heads // keys, window)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.layout, ctx.scale, ctx.window, ctx.shape = layout, scale, window, (n, heads, keys, width)
        return out.index_select(0, rows.back).view(n, heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        n, heads, keys, width = ctx.shape
        rows, key_rows = ctx.layout.queries(keys, heads // keys), ctx.layout.keys(keys)
        do = grads[0].reshape(n * heads, width).index_select(0, rows.to_padded).index_fill_(0, rows.filler, 0.0)
        dq, dk, dv = attend_padded_backward(do, q, k, v, kept, ctx.layout, keys, heads // keys, ctx.window)
        dq = dq.index_select(0, rows.back).mul_(ctx.scale).view(n, heads, width)
        dk, dv = (t.index_select(0, key_rows.back).view(n, keys, width) for t in (dk, dv))
        return dq, dk, dv, None, None, None


_bucket_attention: Callable[..., Tensor] = _BucketAttention.apply


def attend_padded(q: Tensor, k: Tensor, v: Tensor, layout: Layout, keys: int, group: int, window: int) -> tuple[Tensor, list[Tensor]]:
    """Attention of rows in padded order, q scaled already; with the attention weights when they are few enough to keep.

    The result, as the gradients below, has a row of zeros behind the last one.
    """
    out, kept = _room(q), []
    size = sum(b.documents * b.rows * (b.high - _lowest(b, window)) for b in layout.blocks) * keys * group
    keep = size * q.element_size() <= KEEP_BYTES
    for block in layout.blocks:
        low = _lowest(block, window)
        at, shape = _rows(block, keys, group, q.shape[1])
        weights = _weights(q[at].view(shape), _keys(k, block, keys, low), block, low, window)
        torch.bmm(weights, _keys(v, block, keys, low), out=out[at].view(shape))
        if keep:
            kept.append(weights)
    return out, kept


def attend_padded_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], layout: Layout, keys: int, group: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_padded` with respect to the scaled q, k and v, in padded order; `do` is zero on filler rows."""
    dq, dk, dv = _room(q), _room(k).zero_(), _room(v).zero_()
    for i, block in enumerate(layout.blocks):
        low = _lowest(block, window)
        at, shape = _rows(block, keys, group, q.shape[1])
        qb, dob = q[at].view(shape), do[at].view(shape)
        kb, vb, dkb, dvb = (_keys(t, block, keys, low) for t in (k, v, dk, dv))
        weights = kept[i] if kept else _weights(qb, kb, block, low, window)
        ds = torch.bmm(dob, vb.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(ds, weights, -1, weights.dtype)
        torch.bmm(ds, kb, out=dq[at].view(shape))
        dvb.baddbmm_(weights.transpose(1, 2), dob)
        dkb.baddbmm_(ds.transpose(1, 2), qb)
    return dq, dk, dv


def _room(rows: Tensor) -> Tensor:
    room = rows.new_empty(len(rows) + 1, rows.shape[1])
    room[-1].zero_()
    return room


def _lowest(block: Block, window: int) -> int:
    """The first key that any row of the block sees, rounded down to where shapes repeat."""
    return max(0, block.low - window + 1) // STEP * STEP if window else 0


def _rows(block: Block, keys: int, group: int, width: int) -> tuple[slice, tuple[int, int, int]]:
    """Where the block's query rows stand, and their shape [documents * K, G * rows, D]."""
    heads, rows = keys * group, block.documents * block.rows
    return slice(block.start * heads, (block.start + rows) * heads), (block.documents * keys, group * block.rows, width)


def _keys(flat: Tensor, block: Block, keys: int, low: int) -> Tensor:
    """The keys in the block's sight as a view [documents * K, keys from low on, D]."""
    bucket = block.bucket
    whole = flat[bucket.start * keys : (bucket.start + bucket.documents * bucket.width) * keys]
    return whole.view(-1, bucket.width, flat.shape[1])[block.first * keys : block.last * keys, low : block.high]


def _weights(q: Tensor, k: Tensor, block: Block, low: int, window: int) -> Tensor:
    """softmax(q k^T) over what each row may see: [documents * K, G * rows, keys]."""
    scores = torch.bmm(q, k.transpose(1, 2))
    seen, offset = scores.view(-1, block.rows, k.shape[1]), block.low - low
    fast = native.kernels(scores.dtype) if scores.is_cpu and not window and not block.hidden else None
    if fast is not None:
        fast.look_back(seen, offset)
        return scores
    if window:
        seen.add_(_bias(block.rows, k.shape[1], offset, window, q.dtype))
    else:
        seen[:, :, offset:].add_(_bias(block.rows, block.rows, 0, 0, q.dtype))
    heads = len(seen) // block.documents
    for one in block.hidden:  # trees come without a window, so that `low` is 0
        seen[one.document * heads : (one.document + 1) * heads, one.top : one.bottom, one.left : one.right] = float("-inf")
    return torch.softmax(scores, -1)


@functools.lru_cache(maxsize=256)
def _bias(rows: int, width: int, offset: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, minus infinity elsewhere: [rows, keys]; query i stands at key i + offset."""
    far = torch.arange(rows)[:, None] + offset - torch.arange(width)[None, :]
    hidden = (far < 0) | (far >= window) if window else far < 0
    return torch.zeros(rows, width, dtype=dtype).masked_fill_(hidden, float("-inf"))
