"""The parts of a decoder layer as plain functions with backward functions of their own; `fused_layer` puts them together.

T tokens, E hidden size, I inner width, r rank. `wide` is fp32, or fp64 where the products run in fp64: norms and the residual stream are
kept in it. Every backward function here is compared with autograd in fp64 by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.model import eight as eights
from tunesmith.model import gradients, native
from tunesmith.model.eight import Eight


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

    weight [out, in], a [r, in], b [out, r]. The flags say whose gradients are wanted. `held`: the weight, or what gives it each time it is
    asked for (unpacks a quantised one, copies one that is trained in fp32). `own`: the module's weight, where it is not quantised.
    `eight`: the frozen weight in 8 bits, where products are to run in them.
    """

    held: Tensor | Callable[[], Tensor]
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float
    need_weight: bool
    need_bias: bool
    own: Tensor | None = None
    eight: Eight | None = None

    @property
    def weight(self) -> Tensor:
        return self.held if isinstance(self.held, Tensor) else self.held()

    @property
    def factor(self) -> Tensor:
        """The weight for `Kernels.dense`, which rounds one in fp32 itself."""
        return self.weight if self.own is None or self.own.dtype != torch.float32 else self.own.detach()


@dataclass(slots=True)
class LinearGrads:
    """Gradients of one linear layer; None for what is frozen or absent, or stands in the `.grad` already (see gradients.py)."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def linears(x: Tensor, group: Sequence[Linear]) -> tuple[list[Tensor], Tensor | None]:
    """Several layers on the same input; their small products x A^T are one, returned [T, sum of ranks] for the backward pass."""
    adapted = [layer.a for layer in group if layer.a is not None]
    fast = pairs(group, x)
    small, outs, at = None, [], 0
    if adapted:
        joined = _joined(adapted)
        small = x @ joined.t() if fast is None else fast.dense([(x, joined, False, True)], x.new_empty(len(x), len(joined)), native.NARROW)
    rows = fast.round_rows([x]) if fast is not None and group[0].eight is not None else None
    for layer in group:
        part = None
        if layer.a is not None and small is not None:
            part = small[:, at : at + len(layer.a)]
            at += len(layer.a)
        if fast is not None:
            term, steps, outputs = _first(x, rows, layer)
            terms = [term]
            if part is not None and layer.b is not None:
                terms.append((part, layer.b, False, True))
            outs.append(fast.dense(terms, x.new_empty(len(x), outputs), native.NARROW, bias=layer.bias, steps=steps))
            continue
        if layer.eight is not None:
            y = eights.plain_forward(x, layer.eight).to(x.dtype)
            y = y if layer.bias is None else y.add_(layer.bias)
        else:
            y = x @ layer.weight.t() if layer.bias is None else torch.addmm(layer.bias, x, layer.weight.t())
        if part is not None and layer.b is not None:
            y.addmm_(part, layer.b.t())
        outs.append(y)
    return outs, small


Steps = tuple[Tensor, Tensor | None, Tensor]


def _first(x: Tensor, rows: tuple[Tensor, Tensor] | None, layer: Linear) -> tuple[native.Term, Steps | None, int]:
    """x W^T as a term of `Kernels.dense`, in 8 bits where `rows` are x in them; what its numbers count; and the number of outputs."""
    if rows is None or layer.eight is None:
        weight = layer.factor
        return (x, weight, False, True), None, len(weight)
    return (rows[0], layer.eight.values, False, True), (rows[1], layer.eight.steps, layer.eight.shift), len(layer.eight.values)


def linear_added(x: Tensor, layer: Linear, add: Tensor, in_place: bool) -> tuple[Tensor, Tensor | None]:
    """`add` (wide) plus the layer's output, and the small product x A^T; in one pass where products are ours."""
    if (fast := pairs([layer], x)) is None or add.dtype != torch.float32 or not add.is_contiguous():
        (y,), small = linears(x, [layer])
        return (add.add_(y) if in_place else add + y), small
    term, steps, _ = _first(x, fast.round_rows([x]) if layer.eight is not None else None, layer)
    terms, small = [term], None
    if layer.a is not None and layer.b is not None:
        small = fast.dense([(x, layer.a, False, True)], x.new_empty(len(x), len(layer.a)), native.NARROW)
        terms.append((small, layer.b, False, True))
    out = add if in_place else torch.empty_like(add)
    return fast.dense(terms, out, native.ADDED, bias=layer.bias, before=add, steps=steps), small


def linears_backward(
    dys: Sequence[Tensor], x: Tensor, small: Tensor | None, group: Sequence[Linear], need_x: bool
) -> tuple[Tensor | None, list[LinearGrads]]:
    """Gradients with respect to x and to each layer's weights.

    dA = (dy B)^T x, dB = s dy^T (x A^T), dx = sum of dy W + (dy B) A (Hu 2021, arXiv:2106.09685).
    """
    d_small = small_gradient(dys, group)
    grads = weight_gradients(dys, x, small, d_small, group)
    return input_gradient(dys, d_small, group) if need_x else None, grads


def small_gradient(dys: Sequence[Tensor], group: Sequence[Linear]) -> Tensor | None:
    """dy B of all layers, [T, sum of ranks]; None where no layer has an adapter."""
    adapted = [(dy, layer.b) for dy, layer in zip(dys, group, strict=True) if layer.b is not None]
    if not adapted:
        return None
    fast, at = pairs(group, *dys), 0
    d_small = dys[0].new_empty(len(dys[0]), sum(b.shape[1] for _, b in adapted))
    for dy, b in adapted:
        part = d_small[:, at : at + b.shape[1]]
        at += b.shape[1]
        if fast is not None:
            fast.dense([(dy, b, False, False)], part, native.NARROW)
        else:
            torch.mm(dy, b, out=part)
    return d_small


def input_gradient(dys: Sequence[Tensor], d_small: Tensor | None, group: Sequence[Linear]) -> Tensor:
    """The gradient with respect to what all layers of the group read, [T, in]."""
    joined = _joined([layer.a for layer in group if layer.a is not None]) if d_small is not None else None
    weights, steps = [layer.eight for layer in group if layer.eight is not None], None
    if (fast := pairs(group, *dys)) is not None:
        if weights:
            rows, counts = fast.round_rows(dys, [weight.steps for weight in weights])
            parts = torch.split(rows, [dy.shape[1] for dy in dys], 1)
            terms = [(part, weight.values, False, False) for part, weight in zip(parts, weights, strict=True)]
            steps = counts, None, sum((weight.shift_back for weight in weights[1:]), weights[0].shift_back)
        else:
            terms = [(dy, layer.factor, False, False) for dy, layer in zip(dys, group, strict=True)]
        if d_small is not None and joined is not None:
            terms.append((d_small, joined, False, False))
        return fast.dense(terms, dys[0].new_empty(len(dys[0]), terms[0][1].shape[1]), native.NARROW, steps=steps)
    if weights:
        dx = eights.plain_backward(dys, weights).to(dys[0].dtype)
    else:
        dx = dys[0] @ group[0].weight
        for dy, layer in zip(dys[1:], group[1:], strict=True):
            dx.addmm_(dy, layer.weight)
    return dx if d_small is None or joined is None else dx.addmm_(d_small, joined)


def weight_gradients(
    dys: Sequence[Tensor], x: Tensor, small: Tensor | None, d_small: Tensor | None, group: Sequence[Linear]
) -> list[LinearGrads]:
    """Gradients of each layer's weight, bias and factors: in fp32 from our own products, else in the dtype of the products."""
    grads, fast, at = [LinearGrads() for _ in group], pairs(group, x, *dys), 0
    for dy, layer, grad in zip(dys, group, grads, strict=True):
        if layer.b is not None and small is not None:
            part = small[:, at : at + layer.b.shape[1]]
            at += layer.b.shape[1]
            if fast is not None:
                grad.b = fast.dense([(dy, part, True, False)], torch.empty(layer.b.shape), native.WIDE, layer.scale)
            else:
                grad.b = (part.t() @ dy).t().mul(layer.scale)
        if layer.need_weight:
            grad.weight = dy.t() @ x if fast is None else _weight_gradient(fast, dy, x, layer)
        if layer.need_bias:
            grad.bias = dy.sum(0)
    if d_small is not None:
        if fast is None:
            joined = d_small.t() @ x
        else:
            joined = fast.dense([(d_small, x, True, False)], torch.empty(d_small.shape[1], x.shape[1]), native.WIDE)
        at = 0
        for layer, grad in zip(group, grads, strict=True):
            if layer.a is not None:
                grad.a = joined[at : at + len(layer.a)]
                at += len(layer.a)
    return grads


def _weight_gradient(fast: native.Kernels, dy: Tensor, x: Tensor, layer: Linear) -> Tensor | None:
    """dy^T x in fp32; None where it has been added to the `.grad` of the weight."""
    terms, own = [(dy, x, True, False)], layer.own
    if own is None or own.dtype != torch.float32 or not own.is_contiguous() or not gradients.is_direct(own):
        return fast.dense(terms, torch.empty(dy.shape[1], x.shape[1]), native.WIDE)
    if own.grad is None:
        own.grad = fast.dense(terms, torch.empty_like(own), native.WIDE)
    else:
        fast.dense(terms, own.grad, native.ADDED)
    return None


def own_products(dtype: torch.dtype) -> native.Kernels | None:
    """The compiled functions where products of training on a CPU are ours, `Kernels.dense`; else None."""
    fast = native.kernels(dtype) if dtype == torch.bfloat16 else None
    return fast if fast is not None and fast.pairs else None


def pairs(group: Sequence[Linear], *rows: Tensor) -> native.Kernels | None:
    """The compiled functions where their product can take these rows and the factors of the group, else None."""
    fast = own_products(rows[0].dtype) if rows[0].is_cpu else None
    fit = fast is not None and all(t.stride(1) == 1 and t.shape[1] % 2 == 0 for t in rows)
    return fast if fit and all(layer.a is None or len(layer.a) % 2 == 0 for layer in group) else None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
