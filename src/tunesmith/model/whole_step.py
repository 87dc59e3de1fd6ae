"""One token more for every cached row, through all decoder layers in one compiled function: the fastest way of `cached_layer.forward`.

Between the products of a few rows most of the time goes into starting things: operations, threads, Python. Here the threads start once a
step, weights stream through large pages, and what is done to a product's outputs is done while they are in the processor's cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.model import native
from tunesmith.model.cached_layer import Part, Ready, signed
from tunesmith.model.feed import NextTokens
from tunesmith.model.positions import alone_from
from tunesmith.model.products import Blocked, BlockedProduct, RowAdapters

LEAST_ANGLES = 256  # places of the first table
MOST_GROUPED = 64  # query heads on one key head, as in cpp/attention.h

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Layer(ctypes.Structure):
    _fields_ = (
        ("product", BlockedProduct * 4), ("lora", RowAdapters * 4), ("first_norm", _P), ("second_norm", _P), ("query_norm", _P),
        ("key_norm", _P), ("cos", _P), ("sin", _P), ("window", _N), ("eps", _F), ("scale", _F),
    )  # fmt: skip


class _Pool(ctypes.Structure):
    _fields_ = (("rows", _N), ("slot", _N), ("past", _P))


class _Step(ctypes.Structure):
    _fields_ = (
        ("multiply", _P), ("release", _P), ("layers", _P), ("pools", _P), ("keys", _P), ("values", _P), ("places", _P), ("x", _P),
        ("depth", _N), ("pool_count", _N), ("rows", _N), ("hidden", _N), ("key_heads", _N), ("group", _N), ("width", _N), ("longest", _N),
        ("small", _N), ("threads", _N),
    )  # fmt: skip


class WholeStep:
    """The layers as the compiled function reads them; `layers` must be those that `can` takes."""

    def __init__(self, layers: Sequence[Ready]) -> None:
        self.layers = list(layers)
        self._numbers = [ready.number for ready in layers]
        self._layers = (_Layer * len(layers))()
        self._stacks: list[Any] = []
        self._by_length: bool | None = None  # whether the angles change with the longest row
        self._angles: tuple[Tensor, Tensor] | None = None
        self._own = any(part.a is not None for ready in layers for part in ready.parts)
        for ready, layer in zip(layers, self._layers, strict=True):
            layer.first_norm, layer.second_norm = ready.first_norm.data_ptr(), ready.second_norm.data_ptr()
            layer.query_norm, layer.key_norm = (native.at(norm) for norm in ready.head_norms or (None, None))
            layer.eps, layer.scale = ready.eps, ready.scale
            for place, part in enumerate(ready.parts):
                layer.product[place] = _blocked(part).structure
                if part.a is not None:
                    layer.lora[place].fill(part.a, [(rank, b, span) for span, rank, b in part.b])

    @staticmethod
    def can(layers: Sequence[Ready]) -> bool:
        """Whether the compiled function can stand for these layers on this machine."""
        return native.kernels(layers[0].dtype) is not None and all(
            ready.dtype == layers[0].dtype
            and all(
                isinstance(part.product, Blocked) and part.product.inputs % 16 == part.product.outputs % 16 == 0 for part in ready.parts
            )
            and all(part.even and (part.a is None or part.a.dtype == ready.dtype) for part in ready.parts)
            and isinstance(ready.inner.product, Blocked)
            and ready.inner.product.gated
            and _width(ready) in native.HEAD_WIDTHS
            and ready.heads // ready.keys <= MOST_GROUPED
            for ready in layers
        )

    def angles(self, decoder: Any, x: Tensor, feed: NextTokens) -> tuple[Tensor, Tensor]:
        """cos and signed sin [N, 1, D] of the new tokens; where they depend on the place alone, from a table of all places so far."""
        dtype = self.layers[0].dtype
        if self._by_length is None:
            self._by_length = alone_from(decoder.config) is not None
        if self._by_length:
            cos, sin = decoder.rotary_emb(x, feed.positions[None])
            return signed(cos, sin, dtype)
        if self._angles is None or len(self._angles[0]) < feed.longest:
            places = torch.arange(max(LEAST_ANGLES, 1 << (feed.longest - 1).bit_length()), device=x.device)
            cos, sin = decoder.rotary_emb(x, places[None])
            self._angles = signed(cos, sin, dtype)
        cos, sin = self._angles
        return cos.index_select(0, feed.positions), sin.index_select(0, feed.positions)

    def run(self, x: Tensor, feed: NextTokens, rotary: tuple[Tensor, Tensor], windows: Sequence[int]) -> bool:
        """Put x [N, hidden] in fp32 through all layers, in place; False where rotary or these rows' adapters are of another kind."""
        first = self.layers[0]
        kernels, multiply = native.kernels(first.dtype), _blocked(first.inner).multiply
        if kernels is None or rotary[0].shape[-1] != _width(first) or not self._take_adapters(feed):
            return False
        like = x.new_empty(0, first.keys, _width(first), dtype=first.dtype)
        pools = (_Pool * len(feed.parts))()
        held = np.empty((2, len(self.layers), len(pools)), np.int64)
        for number, (pool, part, _) in enumerate(feed.parts):
            pools[number] = _Pool(part.stop - part.start, pool.width, feed.past(number).data_ptr())
            held[:, :, number] = pool.addresses(self._numbers, like)
        for layer, window in zip(self._layers, windows, strict=True):
            layer.cos, layer.sin, layer.window = rotary[0].data_ptr(), rotary[1].data_ptr(), window
        places = x.new_zeros(len(x), dtype=torch.int64) if feed.mix is None else feed.mix.places
        kernels.step(
            _Step(
                *multiply, ctypes.addressof(self._layers), ctypes.addressof(pools), held[0].ctypes.data, held[1].ctypes.data,
                places.data_ptr(), x.data_ptr(), len(self.layers), len(pools), len(x), x.shape[1], first.keys, first.heads // first.keys,
                _width(first), feed.longest, feed.cache.int8, torch.get_num_threads(),
            )
        )  # fmt: skip
        return True

    def _take_adapters(self, feed: NextTokens) -> bool:
        """Let the layers read the stacks of the rows' adapters."""
        if self._own:
            return feed.mix is None
        stacks = [] if feed.mix is None else [feed.mix.stack(tuple(part.spans)) for ready in self.layers for part in ready.parts]
        if any(stack is not None and stack.a.dtype != self.layers[0].dtype for stack in stacks):
            return False
        if len(stacks) != len(self._stacks) or any(one is not other for one, other in zip(stacks, self._stacks, strict=True)):
            self._stacks = stacks
            for i, (ready, layer) in enumerate(zip(self.layers, self._layers, strict=True)):
                for place, part in enumerate(ready.parts):
                    stack = stacks[len(ready.parts) * i + place] if stacks else None
                    if stack is None:
                        layer.lora[place].a = None
                    else:
                        layer.lora[place].fill(stack.a, [(rank, b, part.spans[path]) for path, (rank, b) in stack.b.items()])
        return True


def _blocked(part: Part) -> Blocked:
    assert isinstance(part.product, Blocked)  # `can` has said so
    return part.product


def _width(ready: Ready) -> int:
    return _blocked(ready.attention).outputs // (ready.heads + 2 * ready.keys)
