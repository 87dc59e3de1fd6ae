"""The CPU kernel: short documents in padded buckets, one chain of batched products a bucket, with its own backward.

Grouped-query heads are folded into the rows: the scores of a bucket are [documents * K, G * L, L]. Filler rows copy the
last real row of their document: causality hides them from real queries, and their output gradient is set to zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.layout import Bucket, Layout

KEEP_BYTES = 64 << 20  # attention weights of one layer above this size are computed again in the backward pass


def bucket_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int) -> Tensor:
    """Causal attention [n, H, D] x [n, K, D] -> [n, H, D] of the layout's n short tokens; `window` 0 looks back without limit."""
    with torch.autocast(query.device.type, enabled=False):
        return _bucket_attention(query, key, value, layout, scale, window)


class _BucketAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int) -> Tensor:
        n, heads, width = query.shape
        keys = key.shape[1]
        group = heads // keys
        rows, key_rows = layout.index(keys, group), layout.index(keys, 1)
        q = query.reshape(n * heads, width).index_select(0, rows.to_padded).mul_(scale)
        k = key.reshape(n * keys, width).index_select(0, key_rows.to_padded)
        v = value.reshape(n * keys, width).index_select(0, key_rows.to_padded)
        out = torch.empty_like(q)
        size = sum(b.documents * heads * b.width * b.width for b in layout.buckets) * q.element_size()
        kept = []
        for bucket in layout.buckets:
            qb, kb, vb = (_cut(t, bucket, keys, g) for t, g in ((q, group), (k, 1), (v, 1)))
            weights = _weights(qb, kb, window)
            torch.bmm(weights, vb, out=_cut(out, bucket, keys, group))
            if size <= KEEP_BYTES:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.layout, ctx.scale, ctx.window, ctx.shape = layout, scale, window, (n, heads, keys, width)
        return out.index_select(0, rows.back).view(n, heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        n, heads, keys, width = ctx.shape
        group = heads // keys
        rows, key_rows = ctx.layout.index(keys, group), ctx.layout.index(keys, 1)
        do = grads[0].reshape(n * heads, width).index_select(0, rows.to_padded).index_fill_(0, rows.filler, 0.0)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for i, bucket in enumerate(ctx.layout.buckets):
            qb, kb, vb = (_cut(t, bucket, keys, g) for t, g in ((q, group), (k, 1), (v, 1)))
            dob = _cut(do, bucket, keys, group)
            weights = kept[i] if kept else _weights(qb, kb, ctx.window)
            torch.bmm(weights.transpose(1, 2), dob, out=_cut(dv, bucket, keys, 1))
            ds = torch.bmm(dob, vb.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(ds, weights, -1, weights.dtype)
            torch.bmm(ds, kb, out=_cut(dq, bucket, keys, group))
            torch.bmm(ds.transpose(1, 2), qb, out=_cut(dk, bucket, keys, 1))
        dq = dq.index_select(0, rows.back).mul_(ctx.scale).view(n, heads, width)
        dk, dv = (t.index_select(0, key_rows.back).view(n, keys, width) for t in (dk, dv))
        return dq, dk, dv, None, None, None


_bucket_attention: Callable[..., Tensor] = _BucketAttention.apply


def _cut(flat: Tensor, bucket: Bucket, keys: int, group: int) -> Tensor:
    """The bucket's part of the padded rows as a view [documents * K, G * L, D]."""
    start = bucket.start * keys * group
    stop = start + bucket.documents * keys * group * bucket.width
    return flat[start:stop].view(bucket.documents * keys, group * bucket.width, flat.shape[1])


def _weights(q: Tensor, k: Tensor, window: int) -> Tensor:
    """softmax(q k^T) over what each row may see, [documents * K, G * L, L]; q is scaled already."""
    width = k.shape[1]
    scores = torch.bmm(q, k.transpose(1, 2))
    scores.view(-1, width, width).add_(_bias(width, window, q.dtype))
    return torch.softmax(scores, -1)


@functools.lru_cache(maxsize=64)
def _bias(width: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, minus infinity elsewhere: [L, L]."""
    i = torch.arange(width)
    far = i[:, None] - i[None, :]
    hidden = (far < 0) | (far >= window) if window else far < 0
    return torch.zeros(width, width, dtype=dtype).masked_fill_(hidden, float("-inf"))
