"""LoRA layers in one fused function, in place of PEFT's forward (Hu 2021, arXiv:2106.09685).

y = x W^T + bias + s (x A^T) B^T. The base weight W is frozen; A and B stay in their own precision and are cast to that of x
inside. Saved for the backward pass: x and x A^T; PEFT's forward keeps two more full-size tensors and makes two more passes.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = x @ a.to(x.dtype).t()
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        y.addmm_(inner, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, a, b, inner = ctx.saved_tensors
        d_inner = (dy @ b.to(dy.dtype)).mul_(ctx.scale)
        da = (d_inner.t() @ x).to(a.dtype) if ctx.needs_input_grad[3] else None
        db = (dy.t() @ inner).mul_(ctx.scale).to(b.dtype) if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(d_inner, a.to(dy.dtype))
        return dx, None, None, da, db, None


_lora_linear: Callable[..., Tensor] = _LoraLinear.apply


def fuse(model: nn.Module) -> int:
    """Give every plain PEFT LoRA layer of the model the fused forward; returns how many."""
    layers = [m for m in model.modules() if _fits(m)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def unfuse(model: nn.Module) -> None:
    """Give every LoRA layer PEFT's own forward back."""
    from peft.tuners.lora.layer import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            module.__dict__.pop("forward", None)


def _fits(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import Linear

    return type(module) is Linear and type(module.base_layer) is nn.Linear and not module.base_layer.weight.requires_grad


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
    fused = (
        not (args or kwargs or self.disable_adapters or self.merged)
        and name in self.lora_A
        and name not in self.lora_variant
        and self.lora_A[name].bias is None
        and self.lora_B[name].bias is None
        and (isinstance(self.lora_dropout[name], nn.Identity) or not self.training)
        and x.dtype == self.base_layer.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )
    if not fused:
        out: Tensor = type(self).forward(self, x, *args, **kwargs)
        return out
    base = self.base_layer
    flat = x.reshape(-1, x.shape[-1])
    y = _lora_linear(flat, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
    return y.view(*x.shape[:-1], y.shape[-1])
