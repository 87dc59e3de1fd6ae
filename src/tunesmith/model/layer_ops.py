"""The parts of a decoder layer as plain functions with backward functions of their own; `fused_layer` puts them together.

T tokens, E hidden size, I inner width, r rank. `wide` is fp32, or fp64 where the products run in fp64: norms and the residual stream are
kept in it. Every backward function here is compared with autograd in fp64 by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.model import native


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of norms and residuals beside products in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compiled(dtype: torch.dtype, *tensors: Tensor) -> native.Kernels | None:
    """Our compiled functions for this dtype if there are any, and if they can read these tensors."""
    # First the tensors: nothing is compiled where they are on a GPU.
    return native.kernels(dtype) if all(t.is_cpu and t.is_contiguous() for t in tensors) else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x / rms(x) * weight over the last axis (Zhang 2019, arXiv:1910.07467); also x / rms(x) in the weight's dtype, 1 / rms(x) [.., 1]."""
    if (fast := compiled(weight.dtype, x)) is not None and x.dtype == torch.float32:
        return fast.norm(x, weight, eps)
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    unit = (x * inverse).to(weight.dtype)
    return unit * weight, unit, inverse


def rms_norm_backward(
    dy: Tensor, unit: Tensor, inverse: Tensor, weight: Tensor, need_weight: bool, add: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to x (wide) and weight (wide, or None): dx = (dy w - unit mean(dy w unit)) / rms, plus `add` (wide)."""
    others = () if add is None else (add,)
    if (
        (fast := compiled(weight.dtype, dy, unit, *others)) is not None
        and dy.dtype == weight.dtype
        and (add is None or add.dtype == torch.float32)
    ):
        return fast.norm_backward(dy, unit, inverse, weight, need_weight, add)
    dx, unit = dy.to(inverse.dtype, copy=True), unit.to(inverse.dtype)
    dw = (dx * unit).sum(tuple(range(dx.dim() - 1))) if need_weight else None
    dx.mul_(weight)
    share = (dx * unit).sum(-1, keepdim=True).div_(unit.shape[-1])
    dx.addcmul_(unit, share, value=-1).mul_(inverse)
    return dx if add is None else dx.add_(add), dw


def gate(inner: Tensor, up: Tensor) -> Tensor:
    """silu(inner) * up (Shazeer 2020, arXiv:2002.05202); [N, I], both of one layout."""
    if inner.is_cpu and inner.stride() == up.stride() and inner.stride(1) == 1 and (fast := native.kernels(inner.dtype)) is not None:
        return fast.gate(inner, up)
    return torch.nn.functional.silu(inner).mul_(up)


def gate_backward(d: Tensor, inner: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gate's output once more, and the gradients with respect to `inner` and `up`; `d` is used up."""
    if (fast := compiled(inner.dtype, d, inner, up)) is not None:
        return fast.gate_backward(d, inner, up)
    active = torch.nn.functional.silu(inner)
    out = active * up
    d_up = active.mul_(d)
    return out, torch.ops.aten.silu_backward(d.mul_(up), inner), d_up


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + bias + (x A^T) B^T with everything in the dtype of the products; B carries the adapter's scale already.

    weight [out, in], a [r, in], b [out, r]. The flags say whose gradients are wanted. `held`: the weight, or what unpacks a quantised one
    each time it is asked for.
    """

    held: Tensor | Callable[[], Tensor]
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float
    need_weight: bool
    need_bias: bool

    @property
    def weight(self) -> Tensor:
        return self.held if isinstance(self.held, Tensor) else self.held()


@dataclass(slots=True)
class LinearGrads:
    """Gradients of one linear layer; None for what is frozen or absent."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def linears(x: Tensor, group: Sequence[Linear]) -> tuple[list[Tensor], Tensor | None]:
    """Several layers on the same input; their small products x A^T are one, returned [T, sum of ranks] for the backward pass."""
    adapted = [layer.a for layer in group if layer.a is not None]
    small = x @ _joined(adapted).t() if adapted else None
    outs, at = [], 0
    for layer in group:
        y = x @ layer.weight.t() if layer.bias is None else torch.addmm(layer.bias, x, layer.weight.t())
        if layer.a is not None and layer.b is not None and small is not None:
            y.addmm_(small[:, at : at + len(layer.a)], layer.b.t())
            at += len(layer.a)
        outs.append(y)
    return outs, small


def linears_backward(
    dys: Sequence[Tensor], x: Tensor, small: Tensor | None, group: Sequence[Linear], need_x: bool
) -> tuple[Tensor | None, list[LinearGrads]]:
    """Gradients with respect to x and to each layer's weights, in the dtype of the products.

    dA = (dy B)^T x, dB = s dy^T (x A^T), dx = sum of dy W + (dy B) A (Hu 2021, arXiv:2106.09685).
    """
    grads = [LinearGrads() for _ in group]
    adapted = [layer.a for layer in group if layer.a is not None]
    d_small = torch.empty_like(small) if small is not None else None
    at = 0
    for dy, layer, grad in zip(dys, group, grads, strict=True):
        if layer.a is not None and layer.b is not None and small is not None and d_small is not None:
            part = slice(at, at + len(layer.a))
            torch.mm(dy, layer.b, out=d_small[:, part])
            grad.b = (small[:, part].t() @ dy).t().mul(layer.scale)
            at += len(layer.a)
        if layer.need_weight:
            grad.weight = dy.t() @ x
        if layer.need_bias:
            grad.bias = dy.sum(0)
    if d_small is not None:
        at, joined = 0, d_small.t() @ x
        for layer, grad in zip(group, grads, strict=True):
            if layer.a is not None:
                grad.a = joined[at : at + len(layer.a)]
                at += len(layer.a)
    if not need_x:
        return None, grads
    dx = dys[0] @ group[0].weight
    for dy, layer in zip(dys[1:], group[1:], strict=True):
        dx.addmm_(dy, layer.weight)
    if d_small is not None:
        dx.addmm_(d_small, _joined(adapted))
    return dx, grads


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
