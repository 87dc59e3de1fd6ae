"""Attention per document, hung into transformers' AttentionInterface under the name `tunesmith`.

The layout of the batch travels as the forward argument `tunesmith_layout`. Without it (sampling), transformers' own
SDPA attention runs, so that `generate` works on the same model.
Shapes: query [1, H, N, D], key and value [1, K, N, D], result [1, N, H, D].
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.errors import BugError
from tunesmith.model.bucket_attention import bucket_attention
from tunesmith.model.layout import Layout
from tunesmith.model.virtual import prefix_of

if TYPE_CHECKING:
    from tunesmith.model.feed import Feed

NAME = "tunesmith"
_PACKED: ContextVar[bool] = ContextVar("tunesmith_packed", default=False)
_UNKNOWN_MASK = -1


class LayoutError(Exception):
    """The architecture asks for something that packed attention cannot give; the padded layout is used instead."""


@contextlib.contextmanager
def packed_masks() -> Iterator[None]:
    """While open, the models' mask makers ask us for the width of the window instead of building N x N masks."""
    token = _PACKED.set(True)
    try:
        yield
    finally:
        _PACKED.reset(token)


def register() -> None:
    """Make the name known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*, config: Any, use_vmap: bool = False, local_size: int | None = None, **rest: Any) -> Tensor | None:
    """In place of a mask: one number that says how wide this layer may look (0: everything before)."""
    if not _PACKED.get():
        from transformers.masking_utils import sdpa_mask

        mask: Tensor | None = sdpa_mask(config=config, use_vmap=use_vmap, local_size=local_size, **rest)
        return mask
    # A chunked mask arrives as a local size too, and a custom mask as use_vmap: neither is a window.
    chunked = getattr(config, "attention_chunk_size", None) is not None
    width = _UNKNOWN_MASK if use_vmap or (chunked and local_size) else (local_size or 0)
    # On the CPU whatever the default device is: every layer reads it, and must not wait for a GPU to do so.
    return torch.tensor([[[[width]]]], device="cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What a layer does besides softmax(scale * q k^T) v: a window (0: none), dropout, a soft cap, a sink score per head."""

    scale: float
    window: int = 0
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def simple(self) -> bool:
        """Whether the fast kernels can do it."""
        return not self.dropout and self.softcap is None and self.sinks is None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    tunesmith_layout: Layout | Feed | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of the layout, or over cached rows; the function transformers calls in every layer.

    Raises LayoutError for what cannot be done per document; the load-time probe then chooses the padded layout.
    """
    if tunesmith_layout is None:
        return _outside(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, position_bias, rest)
    if position_bias is not None:
        raise LayoutError("position bias")
    if torch.is_autocast_enabled(query.device.type):  # rotary angles in fp32 leave query and key wider than value
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not isinstance(tunesmith_layout, Layout):
        form = Form(scale, softcap=softcap, sinks=s_aux)
        return tunesmith_layout.of_module(module, query, key, value, attention_mask, sliding_window, form), None
    window = window_of(attention_mask, sliding_window, tunesmith_layout)
    if query.shape[0] != 1 or query.shape[2] != tunesmith_layout.total or key.shape[2] != query.shape[2]:
        raise LayoutError(f"query {tuple(query.shape)}, key {tuple(key.shape)}")
    if (prefix := prefix_of(module, tunesmith_layout)) is not None:
        key, value = prefix.put(int(module.layer_idx), key, value, tunesmith_layout)  # type: ignore[arg-type]
    form = Form(scale, window, dropout if module.training else 0.0, softcap, s_aux)
    return attend_documents(query, key, value, tunesmith_layout, form), None


def attend_documents(query: Tensor, key: Tensor, value: Tensor, layout: Layout, form: Form) -> Tensor:
    """Causal attention inside each document by the fastest way that can do it: [1, H, N, D] and [1, K, N, D] to [1, N, H, D]."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and form.simple and query.shape[-1] == value.shape[-1]:
        return _varlen(query, key, value, layout, form)
    return _documents(query, key, value, layout, form)


def _outside(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float,
    softcap: float | None, s_aux: Tensor | None, position_bias: Tensor | None, rest: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    """A call that did not come from `Policy.score`: transformers' SDPA, with the mask it made."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is not None or s_aux is not None:
        raise BugError("this model cannot sample through SDPA", remedy="sample inside `with policy.sampling():`")
    extra = {} if position_bias is None else {"position_bias": position_bias}
    out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **extra, **rest)
    return out, None


def window_of(marker: Tensor | None, sliding_window: int | None, layout: Layout | Feed) -> int:
    """The layer's window, 0 where no document is longer; raises LayoutError for any other mask than a causal one with a window."""
    if marker is None or marker.numel() != 1 or marker.is_floating_point():
        raise LayoutError("the mask did not come through AttentionMaskInterface")
    window = int(marker)
    if window == _UNKNOWN_MASK:
        raise LayoutError("a mask that is neither causal nor a sliding window")
    if window and sliding_window is not None and window != sliding_window:
        raise LayoutError(f"the mask says window {window}, the layer {sliding_window}")
    if window and layout.trees and window < layout.longest:
        raise BugError(f"rows that share their front reach over the window of {window}")
    return window if window < layout.longest else 0


@functools.cache
def _grouped() -> bool:
    """Whether the variable-length kernel takes fewer key heads than query heads (since torch 2.12)."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, form: Form) -> Tensor:
    """Half precision on CUDA: PyTorch's variable-length flash attention; boundaries and longest length are the layout's, not read back.

    Written without a GPU at hand and not yet run on one: the load-time probe decides whether it is used.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    runs = layout.runs
    if runs.keys is not None:
        k, v = k.index_select(0, runs.keys), v.index_select(0, runs.keys)
    window = (form.window - 1, 0) if form.window else (-1, 0)
    group = q.shape[1] // k.shape[1]
    if group > 1 and not _grouped():
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    extra: dict[str, Any] = {"enable_gqa": True} if group > 1 and _grouped() else {}
    # With fewer queries than keys the last query sees the last key: a tail behind its front.
    out = varlen_attn(q, k, v, runs.ends, runs.key_ends, runs.longest, runs.longest_keys, scale=form.scale, window_size=window, **extra)
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    return out.unsqueeze(0)


def _documents(query: Tensor, key: Tensor, value: Tensor, layout: Layout, form: Form) -> Tensor:
    """The bucket kernel where it can, else the documents one by one."""
    if not query.is_cuda and form.simple and value.shape[-1] == query.shape[-1]:
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
        return bucket_attention(q, k, v, layout, form.scale, form.window)[None]
    outs = [one_document(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], form, layout, i) for i, (a, b) in enumerate(layout.spans)]
    return torch.cat([*outs, outs[0].new_zeros(1, layout.total - layout.real, *outs[0].shape[2:])], 1)


def one_document(query: Tensor, key: Tensor, value: Tensor, form: Form, layout: Layout, number: int) -> Tensor:
    """Causal attention of the document with this number by plain differentiable operations: [1, H, L, D] -> [1, L, H, D]."""
    length = query.shape[2]
    windowed = bool(form.window) and form.window < length
    if form.softcap is None and form.sinks is None:
        mask = layout.sight(number, form.window) if windowed or number in layout.trees else None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=form.scale, dropout_p=form.dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2)
    return attend_plainly(query, key, value, form, layout.sight(number, form.window)).transpose(1, 2)


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, form: Form, sight: Tensor) -> Tensor:
    """Attention of any form by plain differentiable operations; `sight`, true where a query may look, broadcasts to [B, H, N, M].

    query [B, H, N, D], key and value [B, K, M, D], result [B, H, N, D].
    """
    if form.softcap is None and form.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=sight, scale=form.scale, dropout_p=form.dropout, enable_gqa=query.shape[1] != key.shape[1]
        )
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * form.scale
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.masked_fill(~sight, float("-inf"))
    if form.sinks is not None:  # a learned score per head that takes part in the softmax and carries no value
        sinks = form.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    weights = F.dropout(weights.to(query.dtype), form.dropout)
    return weights @ value.repeat_interleave(group, 1)
