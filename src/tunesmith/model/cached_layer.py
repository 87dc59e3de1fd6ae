"""A whole decoder layer over cached rows, without gradients: the sampling side of `fused_layer`, for the same families on a CPU.

The same arithmetic as the trainer's layer: products in `dtype`, norms and the residual stream in fp32. Query, key and value are one
product, gate and up another. N new tokens, E hidden size, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.model import native
from tunesmith.model.attention import Form
from tunesmith.model.feed import Feed, Prompts
from tunesmith.model.layer_ops import compiled, gate, rms_norm, wide
from tunesmith.model.products import Blocked, RowAdapters, Way

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True, slots=True)
class Part:
    """Projections on one input: their paths in the model, their product, where each one's outputs stand, and the layer's own adapter.

    Of the adapter A is joined; B^T [r, outputs] stands with its outputs and the part of the joined ranks that it reads.
    """

    spans: dict[str, slice]
    product: Way
    a: Tensor | None = None
    b: tuple[tuple[slice, slice, Tensor], ...] = ()

    def __call__(self, x: Tensor, feed: Feed) -> Tensor:
        if isinstance(self.product, Blocked) and (adapters := self._adapters(len(x), feed)) is not False:
            return self.product.run(x, adapters=adapters)
        y = self.product(x)
        if self.a is not None:
            small = x.to(self.a.dtype) @ self.a.t()
            for span, rank, b in self.b:
                y[:, span] += small[:, rank] @ b
        if feed.mix is not None:
            feed.mix.add(self.spans, x, y)
        return y

    def active(self, x: Tensor, feed: Feed) -> Tensor:
        """silu(first layer's) * second layer's outputs [N, O / 2] of two layers."""
        way = self.product
        if isinstance(way, Blocked) and way.gated and (adapters := self._adapters(len(x), feed)) is not False:
            return way.run(x, native.ACTIVE, adapters)
        inner = self(x, feed)
        half = inner.shape[1] // 2
        return gate(inner[:, :half], inner[:, half:])

    def onto(self, x: Tensor, rows: Tensor, feed: Feed) -> Tensor:
        """x [N, E], wide, plus what `rows` [N, I] give, in the place of x."""
        way, fit = self.product, x.dtype == torch.float32 and x.is_contiguous() and self.even
        if fit and isinstance(way, Blocked) and (adapters := self._adapters(len(rows), feed)) is not False:
            return way.run(rows, native.ONTO, adapters, x)
        return x.add_(self(rows, feed))

    def _adapters(self, rows: int, feed: Feed) -> tuple[RowAdapters, Tensor] | Literal[False] | None:
        """What our compiled product reads of the adapters; None where there are none, False where it cannot read them."""
        stack = None if feed.mix is None else feed.mix.stack(tuple(self.spans))
        first = stack.a if stack is not None else self.a
        if first is None:
            return None
        assert isinstance(self.product, Blocked)
        if (stack is not None and self.a is not None) or first.dtype != self.product.dtype or first.shape[-1] % 16 or not self.even:
            return False
        lora = RowAdapters()
        if stack is None:
            lora.fill(first, [(rank, b, span) for span, rank, b in self.b])
            return lora, torch.zeros(rows, dtype=torch.int64)
        lora.fill(first, [(rank, b, self.spans[path]) for path, (rank, b) in stack.b.items()])
        return lora, feed.mix.places

    @property
    def even(self) -> bool:
        """Whether every layer's outputs fill whole vectors of the compiled functions."""
        return all(span.start % 16 == span.stop % 16 == 0 for span in self.spans.values())


@dataclass(frozen=True, slots=True)
class Ready:
    """What a layer's sampling forward reads: norms in `dtype`, the four products, and the form of its attention."""

    number: int
    dtype: torch.dtype
    eps: float
    first_norm: Tensor
    second_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    attention: Part
    output: Part
    inner: Part
    down: Part
    heads: int
    keys: int
    scale: float

    @property
    def parts(self) -> tuple[Part, ...]:
        """The four products in their order."""
        return self.attention, self.output, self.inner, self.down


def forward(x: Tensor, ready: Ready, feed: Feed, rotary: tuple[Tensor, Tensor], window: int, *, read: bool = False) -> Tensor:
    """The layer's output [N, E] in the place of its input [N, E], both wide; keys and values go into the feed's cache.

    `read`: only of the tokens that a feed of prompts is asked about, [R, E]; no row of it may have an adapter of its own.
    """
    h, _, _ = rms_norm(x, ready.first_norm, ready.eps)
    attended = _attend(ready.attention(h, feed), ready, feed, rotary, window, read)
    if read and feed.read is not None:
        x = x.index_select(0, feed.read)
    x = ready.output.onto(x, attended, feed)
    h, _, _ = rms_norm(x, ready.second_norm, ready.eps)
    return ready.down.onto(x, ready.inner.active(h, feed), feed)


def _attend(joined: Tensor, ready: Ready, feed: Feed, rotary: tuple[Tensor, Tensor], window: int, read: bool) -> Tensor:
    """Attention [N, H D], or [R, H D] of what is read, from the product of query, key and value side by side."""
    turned, rows = ready.heads + ready.keys, len(joined)
    width = joined.shape[1] // (turned + ready.keys)
    fast = compiled(ready.dtype, joined) if width in native.HEAD_WIDTHS and rotary[0].shape[-1] == width else None
    if fast is not None:
        fast.turn_rows(joined, rotary, ready.head_norms, ready.eps, ready.heads, ready.keys)
    joined = joined.view(rows, -1, width)
    both = joined[:, :turned]
    if fast is None and ready.head_norms is not None:
        query, _, _ = rms_norm(both[:, : ready.heads].to(wide(ready.dtype)), ready.head_norms[0], ready.eps)
        key, _, _ = rms_norm(both[:, ready.heads :].to(wide(ready.dtype)), ready.head_norms[1], ready.eps)
        both = torch.cat([query, key], 1)
    if fast is None:
        both = turn(both, rotary)
    attend = feed.attend_read if read and isinstance(feed, Prompts) else feed.attend
    form = Form(ready.scale, window)
    return attend(ready.number, both[:, : ready.heads], both[:, ready.heads :], joined[:, turned:], form).flatten(1)


def turn(rows: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rows [N, heads, D] turned by their positions: a * cos + (a with its halves exchanged) * signed sin (Su 2021, arXiv:2104.09864)."""
    half = rows.shape[2] // 2
    exchanged = torch.cat([rows[..., half:], rows[..., :half]], -1)
    return (rows * rotary[0]).addcmul_(exchanged, rotary[1])


def rotary_of(cos: Tensor, sin: Tensor, feed: Feed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin [N, 1, D] in `dtype` from transformers' [1, N, D], worked out once for all layers that share them."""
    name = ("rotary", cos.data_ptr(), sin.data_ptr(), dtype)
    if name not in feed.kept:
        feed.kept[name] = (signed(cos, sin, dtype), (cos, sin))  # held, so that no other tensor takes their address while it is a name
    found: tuple[tuple[Tensor, Tensor], Any] = feed.kept[name]
    return found[0]


def signed(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin [N, 1, D] in `dtype` from transformers' [1, N, D]."""
    half = sin.shape[2] // 2
    negated = torch.cat([-sin[0, :, :half], sin[0, :, half:]], 1)
    return cos[0, :, None].to(dtype).contiguous(), negated[:, None].to(dtype)


def spans_of(names: Sequence[str], sizes: Sequence[int]) -> dict[str, slice]:
    """Where each name's columns stand when they lie side by side."""
    out, start = {}, 0
    for name, size in zip(names, sizes, strict=True):
        out[name] = slice(start, start + size)
        start += size
    return out
