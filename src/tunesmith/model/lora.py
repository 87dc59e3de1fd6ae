"""LoRA layers in one fused function, in place of PEFT's forward (Hu 2021, arXiv:2106.09685).

y = x W^T + bias + s (x A^T) B^T. The base weight W is frozen; A and B stay in their own precision and are cast to that of x
inside. Saved for the backward pass: x and x A^T; PEFT's forward keeps two more full-size tensors and makes two more passes.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model import quant
from tunesmith.model.lora_start import TWIN


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = x @ a.to(x.dtype).t()
        weight = quant.weight_of(base)
        y = x @ weight.t() if base.bias is None else torch.addmm(base.bias, x, weight.t())
        y.addmm_(inner, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, a, b, inner)
        ctx.base, ctx.scale = base, scale  # a quantised weight is unpacked once more in the backward pass
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, a, b, inner = ctx.saved_tensors
        d_inner = (dy @ b.to(dy.dtype)).mul_(ctx.scale)
        da = (d_inner.t() @ x).to(a.dtype) if ctx.needs_input_grad[2] else None
        db = (dy.t() @ inner).mul_(ctx.scale).to(b.dtype) if ctx.needs_input_grad[3] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ quant.weight_of(ctx.base)).addmm_(d_inner, a.to(dy.dtype))
        return dx, None, da, db, None


_lora_linear: Callable[..., Tensor] = _LoraLinear.apply


@dataclass(frozen=True, slots=True)
class Factors:
    """The two factors of the active adapter (with its twin, see lora_start), and its scale."""

    a: Tensor
    b: Tensor
    scale: float


def fuse(model: nn.Module) -> int:
    """Give every plain PEFT LoRA layer of the model the fused forward; returns how many."""
    layers = [m for m in model.modules() if fits(m) and not m.base_layer.weight.requires_grad]  # type: ignore[union-attr]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def unfuse(model: nn.Module) -> None:
    """Give every LoRA layer PEFT's own forward back."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.lora.layer import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)


def fits(module: nn.Module) -> bool:
    """Whether this is PEFT's plain LoRA layer (no variant such as DoRA) on a plain or quantised linear one."""
    if "peft" not in sys.modules:  # then nothing is; importing it takes a second and 60 MB
        return False
    from peft.tuners.lora.layer import Linear, LoraLayer

    if not isinstance(module, LoraLayer) or module.lora_variant:
        return False
    if quant.kind_of(module.base_layer) is not None:
        return type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    return type(module) is Linear and type(module.base_layer) is nn.Linear


def usable(layer: Any) -> bool:
    """Whether `factors` says all that this layer does now: no dropout at work, no variant, not several adapters."""
    if layer.disable_adapters or layer.merged:
        return not (layer.merged and layer.disable_adapters)  # PEFT would unmerge first
    names = layer.active_adapters
    return (
        (len(names) == 1 or names == ["default", TWIN])
        and all(name in layer.lora_A and name not in layer.lora_variant for name in names)
        and all(factor[name].bias is None for factor in (layer.lora_A, layer.lora_B) for name in names)
        and all(isinstance(layer.lora_dropout[name], nn.Identity) or not layer.training for name in names)
    )


def factors(layer: Any) -> Factors | None:
    """What the layer adds to its base now; None when the adapter is switched off or merged in."""
    if layer.disable_adapters or layer.merged:
        return None
    first, *rest = layer.active_adapters
    a, b = layer.lora_A[first].weight, layer.lora_B[first].weight
    if rest:  # side by side they are one adapter
        a, b = torch.cat([a, layer.lora_A[TWIN].weight]), torch.cat([b, layer.lora_B[TWIN].weight], 1)
    return Factors(a, b, layer.scaling[first])


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    plain = args or kwargs or x.dtype != quant.dtype_of(self.base_layer) or torch.is_autocast_enabled(x.device.type)
    found = factors(self) if not plain and usable(self) else None
    if found is None:
        out: Tensor = type(self).forward(self, x, *args, **kwargs)
        return out
    base = self.base_layer
    flat = x.reshape(-1, x.shape[-1])
    y = _lora_linear(flat, base, found.a, found.b, found.scale)
    return y.view(*x.shape[:-1], y.shape[-1])
