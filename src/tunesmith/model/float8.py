"""Products with the frozen base in float8 (e4m3): an opt-in for Hopper GPUs, with LoRA and everything else in the model's precision.

Row-wise scales: every token of the left side and every output of the right side has its own, so that its largest value is 448, the
largest that e4m3 holds (Micikevicius 2022, arXiv:2209.05433). The weight is quantised once, a second time for the backward pass,
which sums over the other axis. Written without a GPU at hand: the arithmetic is tested on a CPU, its speed was not measured.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import ModelError
from tunesmith.model import lora

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
SIDES = 16  # the kernel wants inner and output sizes that are multiples of this
CAPABILITY = (9, 0)


@dataclass(frozen=True, slots=True)
class Quantised:
    """`values` [rows, inner] float8 times `scale` [rows, 1] fp32 is the matrix."""

    values: Tensor
    scale: Tensor


def quantise(matrix: Tensor) -> Quantised:
    """Row by row to float8, rounded to nearest; a row of zeros keeps scale 1."""
    wide = matrix.float()
    top = wide.abs().amax(1, keepdim=True)
    scale = torch.where(top > 0, top / LARGEST, 1.0)
    return Quantised((wide / scale).clamp(-LARGEST, LARGEST).to(DTYPE), scale)


def product(left: Tensor, right: Quantised) -> Tensor:
    """left [T, inner] x right [out, inner]^T as [T, out] in bf16, summed in fp32 by the matrix units; `left` is quantised here."""
    rows = quantise(left)
    return torch._scaled_mm(
        rows.values, right.values.t(), scale_a=rows.scale, scale_b=right.scale.t(), out_dtype=torch.bfloat16, use_fast_accum=False
    )


class _FrozenProduct(torch.autograd.Function):
    """x W^T with a constant W: nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Quantised, back: Quantised) -> Tensor:
        ctx.back = back
        return product(x, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return product(grads[0].contiguous(), ctx.back), None, None


frozen_product: Callable[..., Tensor] = _FrozenProduct.apply


def demand_device(device: torch.device) -> None:
    """Raises ModelError `no_float8` where the products cannot run."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    raise ModelError(
        f"float8 products need a Hopper GPU or later, this is {name}",
        where="model.fast.float8",
        remedy="set model.fast.float8: false",
        code="no_float8",
    )


def convert(model: nn.Module) -> int:
    """Let every frozen LoRA layer whose sides are multiples of 16 take its base product in float8; returns how many."""
    layers: list[Any] = [m for m in model.modules() if _fits(m)]
    for layer in layers:
        weight = layer.base_layer.weight.detach()
        layer.float8 = quantise(weight), quantise(weight.t())
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def revert(model: nn.Module) -> None:
    """Take the float8 products off; the layers have PEFT's own forward then."""
    for module in model.modules():
        if "float8" in module.__dict__:
            del module.float8, module.forward


def _fits(module: Any) -> bool:
    if not lora.fits(module) or module.base_layer.weight.requires_grad:
        return False
    weight = module.base_layer.weight
    return weight.dtype == torch.bfloat16 and all(side % SIDES == 0 for side in weight.shape)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or x.dtype != torch.bfloat16 or not lora.usable(self) or self.merged:
        out: Tensor = type(self).forward(self, x, *args, **kwargs)
        return out
    flat, bias, found = x.reshape(-1, x.shape[-1]), self.base_layer.bias, lora.factors(self)
    y = frozen_product(flat, *self.float8)
    if bias is not None:
        y = y + bias
    if found is not None:
        y = torch.addmm(y, flat @ found.a.to(x.dtype).t(), found.b.to(x.dtype).t(), alpha=found.scale)
    return y.view(*x.shape[:-1], y.shape[-1])
