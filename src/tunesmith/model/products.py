"""Products of a few rows with weights that stay: joined, laid out once for the kernel, in int8 where that is asked for.

N rows, I inputs, O outputs of all joined layers together.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.log import logger
from tunesmith.model import huge_pages, native

Way = Callable[[Tensor], Tensor]
_LINEAR: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_QLINEAR: Any = getattr(getattr(torch.ops.onednn, "qlinear_pointwise", None), "default", None)
BLOCK = 64  # outputs of a block, as in cpp/blocks.h
FEW = 64  # rows that the layout of a packed weight is chosen for


def product(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    int8: bool = False,
    packed: bool = True,
    gated: bool = False,
) -> Way:
    """A function [N, I] -> [N, O] for layers on the same input: x W^T + bias with W [O, I] in `dtype`.

    On a CPU the weights are copied into blocks (`Blocked`), or in bf16 into the layout of oneDNN; elsewhere, and with `packed` off, they
    are used where they are. `int8`: weights rounded to 8 bits by output, inputs by row (see `Int8`). `gated`: two layers whose outputs
    are needed side by side.
    """
    joined = _joined(biases, weights)
    outputs, inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
    if packed and weights[0].is_cpu and Blocked.can(outputs, inputs, dtype, int8):
        return Blocked(
            weights, joined, dtype, int8=int8, gated=gated and len({len(weight) for weight in weights}) == 1 and outputs % BLOCK == 0
        )
    if int8:
        return Int8(weights, joined, dtype)
    narrow = [weight.to(dtype) for weight in weights]
    if packed and dtype == torch.bfloat16 and narrow[0].device.type == "cpu" and _has_onednn():
        return Packed(torch.cat(narrow) if len(narrow) > 1 else narrow[0], None if joined is None else joined.to(dtype))
    return Plain(narrow, None if joined is None else joined.to(dtype))


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and _LINEAR is not None and _packs()


@functools.cache
def _packs() -> bool:
    """Whether oneDNN lays out weights in bf16 for this processor; for one without AVX-512 it refuses."""
    try:
        Packed(torch.zeros(8, 8, dtype=torch.bfloat16), None)(torch.zeros(1, 8, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


def _joined(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat([w.new_zeros(len(w)) if b is None else b.to(w.dtype) for b, w in zip(biases, weights, strict=True)])


class Plain:
    """The weights as they are, one product each."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        self.weights, self.bias = list(weights), bias

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weights[0].dtype)
        parts = [x @ weight.t() for weight in self.weights]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if self.bias is None else y.add_(self.bias)


class BlockedProduct(ctypes.Structure):
    """What cpp/blocks.h calls a Product."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64), ("gated", ctypes.c_int64),
    )  # fmt: skip


class _Span(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p if name == "b" else ctypes.c_int64) for name in ("b", "first", "rank", "column", "columns"))


class RowAdapters(ctypes.Structure):
    """What cpp/blocks.h calls a Lora: the rows' adapters on one input."""

    _fields_ = (("a", ctypes.c_void_p), ("ranks", ctypes.c_int64), ("spans", ctypes.c_int64), ("span", _Span * 3))

    def fill(self, a: Tensor, seconds: Sequence[tuple[slice, Tensor, slice]]) -> None:
        """A [.., ranks, inputs]; for every layer on this input the ranks that it reads, B^T [.., rank, outputs], and its columns."""
        self.a, self.ranks, self.spans = a.data_ptr(), a.shape[-2], len(seconds)
        for number, (rank, b, span) in enumerate(seconds):
            self.span[number] = _Span(b.data_ptr(), rank.start, b.shape[-2], span.start, span.stop - span.start)


class Blocked:
    """Weights in blocks of 64 outputs, or in strips of 32 (`native.in_strips`), as our compiled functions read them.

    With `int8` both sides are rounded as in `Int8`.
    `gated`: each block holds 32 outputs of the first layer and the same 32 of the second.
    """

    def __init__(
        self, weights: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype, *, int8: bool = False, gated: bool = False
    ) -> None:
        self.dtype, self.int8, self.gated = dtype, int8, gated
        self.outputs, self.inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
        multiply = native.multiplier(torch.int8 if int8 else dtype)
        assert multiply is not None
        self.multiply = multiply
        blocks = -(-self.outputs // BLOCK)
        padded = blocks * BLOCK
        self._scale = self._shift = None
        parts = [weight.detach() for weight in weights]
        if int8:
            small = [rounded(part) for part in parts]
            parts = [part for part, _ in small]
            self._scale = _padded(torch.cat([scale for _, scale in small]), padded)
            self._shift = _padded(torch.cat([128 * part.sum(1, dtype=torch.int32) for part in parts]), padded)
        self._bias = None if bias is None else _padded(bias.detach().to(dtype).float(), padded)
        kind = torch.int8 if int8 else dtype
        together = 4 // kind.itemsize  # inputs that stand side by side
        strips = 2 if native.in_strips(kind) else 1  # of a block
        each = BLOCK // strips
        self._weight = huge_pages.WEIGHTS.empty((strips * blocks, self.inputs // together, each, together), kind)
        if gated:
            halves = [part.view(blocks, BLOCK // 2, self.inputs) for part in parts]
            rows = torch.cat(halves, 1)
        else:
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            rows = torch.cat([whole, whole.new_zeros(padded - self.outputs, self.inputs)]) if padded > self.outputs else whole
        self._weight.copy_(rows.reshape(strips * blocks, each, self.inputs // together, together).transpose(1, 2))
        at = native.at
        self.structure = BlockedProduct(
            at(self._weight), at(self._scale), at(self._shift), at(self._bias), self.outputs, self.inputs, int(gated)
        )

    @staticmethod
    def can(outputs: int, inputs: int, dtype: torch.dtype, int8: bool) -> bool:
        """Whether our functions multiply such weights on this machine."""
        step = 64 if int8 else 64 // dtype.itemsize
        return (
            inputs % step == 0 and outputs > 0 and native.kernels(dtype) is not None
            and native.multiplier(torch.int8 if int8 else dtype) is not None
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)

    def run(
        self, x: Tensor, kind: int = native.NARROW, adapters: tuple[RowAdapters, Tensor] | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """NARROW; WIDE: the same values in fp32; ACTIVE: of a gated product silu(first layer's) * second layer's outputs [N, O / 2].

        ONTO: the same values added to `onto` [N, O] in fp32, in its place; O is a multiple of 16. `adapters`: what the rows' adapters
        add, and the place [N] of each row's among them (-1: none).
        """
        kernels, dtype = native.kernels(self.dtype), torch.float32 if kind == native.WIDE else self.dtype
        assert kernels is not None
        assert self.gated or kind != native.ACTIVE
        assert (kind == native.ONTO) == (onto is not None)
        out = torch.empty(len(x), self.outputs // 2 if kind == native.ACTIVE else self.outputs, dtype=dtype) if onto is None else onto
        kernels.product(self.structure, x.to(self.dtype).contiguous(), out, self.multiply, kind, *(adapters or (None, None)))
        return out


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [O, I] in 8 bits, and the steps [O] that its values count: the largest magnitude of an output over 127."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / 127).clamp_min_(1e-30)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values))])


class Packed:
    """A bf16 weight in the layout of oneDNN's blocked product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), FEW)
        self.bias, self.outputs = bias, len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = _LINEAR(x.to(torch.bfloat16), self.weight, self.bias, "none", [], "")
        return out


class Int8:
    """x W^T with both rounded to 8 bits: y = s_x s_w (q_x q_w^T), s the largest magnitude of a row of x or of W over 127; y in `dtype`.

    Symmetric, per row of x (token) and per row of W (output), as LLM.int8() does without its outliers (Dettmers 2022, arXiv:2208.07339).
    """

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        small, scale = rounded(torch.cat([weight.detach() for weight in weights]))
        self.bias = None if bias is None else bias.float()
        self.kind = _exact_kind(small.device.type)
        self._times = _KINDS[self.kind](small, scale)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        size = x.abs().amax(1, keepdim=True).div_(127).clamp_min_(1e-30)
        y = self._times((x / size).round_().to(torch.int8)).mul_(size)
        return (y if self.bias is None else y.add_(self.bias)).to(self.dtype)


def _onednns(weight: Tensor, scale: Tensor) -> Way:
    held, zeros = torch.ops.onednn.qlinear_prepack(weight, None), torch.zeros(len(weight), dtype=torch.int64)
    return lambda x: _QLINEAR(x, 1.0, 0, held, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")


def _pytorchs(weight: Tensor, scale: Tensor) -> Way:
    turned = weight.t()
    return lambda x: torch._int_mm(x, turned).float().mul_(scale)


def _in_fp32(weight: Tensor, scale: Tensor) -> Way:
    turned = weight.float().t()
    return lambda x: (x.float() @ turned).mul_(scale)


# Whole numbers in 8 bits times the weights' [O, I] and their steps [O], in fp32.
_KINDS: dict[str, Callable[[Tensor, Tensor], Way]] = {"onednn": _onednns, "pytorch": _pytorchs, "fp32": _in_fp32}


@functools.cache
def _exact_kind(device: str) -> str:
    """The first kind that multiplies exactly here: processors without VNNI add two products in 16 bits, which large ones overflow."""
    for kind in ("onednn", "pytorch") if device == "cpu" else ("pytorch",):
        try:
            most = torch.full((64, 64), 127, dtype=torch.int8, device=device)
            if bool((_KINDS[kind](most, torch.ones(64, device=device))(most) == 64 * 127**2).all()):
                return kind
        except (RuntimeError, AttributeError):
            continue
    logger.warning("this processor does not multiply 8 bits exactly: int8 rounds and multiplies in fp32, which saves no time")
    return "fp32"
