"""Frozen weights in 8 bits for the products of training: x W^T and dy W with both sides rounded, by token and by output.

The weight is held once: q [O, I] in whole numbers and the step s [O] that those of an output count. Forward y = s_x s (q_x q^T); on the
way back the steps go into the gradient before it is rounded, dx = s_g (q_g q) with g = dy s, so that both ways see the same rounded weight.
The gradient of a rounding is taken to be 1. Rounding is symmetric by row, as LLM.int8() does it, without its outliers (Dettmers 2022,
arXiv:2208.07339).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.errors import ModelError
from tunesmith.model import native
from tunesmith.model.products import rounded

SIDES = 16  # inputs and outputs come in multiples of this


@dataclass(frozen=True, slots=True)
class Eight:
    """A weight [O, I] as `values` (int8) times `steps` [O] (fp32).

    Our products store rows with 128 added: `shift` [O] and `shift_back` [I] (int32) are what that adds to the sums over I and over O.
    """

    values: Tensor
    steps: Tensor
    shift: Tensor
    shift_back: Tensor

    @staticmethod
    def of(weight: Tensor) -> Eight:
        """That weight, rounded to the nearest."""
        values, steps = rounded(weight.detach())
        return Eight(values, steps, *(128 * values.sum(axis, dtype=torch.int32) for axis in (1, 0)))


def fits(weight: Tensor) -> bool:
    """Whether a weight has sides that our products in 8 bits take."""
    return all(side % SIDES == 0 for side in weight.shape)


def demand_products(device: torch.device) -> None:
    """Raises ModelError `no_int8` where training has no products in 8 bits: they are our own, see cpp/dense.cpp."""
    fast = native.kernels(torch.bfloat16) if device.type == "cpu" else None
    if fast is None or not fast.pairs:
        raise ModelError(
            "products of training in 8 bits need a CPU with AVX512-BF16 and VNNI and without a matrix unit (AMX), and a C++ compiler (g++)",
            where="model.fast.int8",
            remedy="set model.fast.int8: false",
            code="no_int8",
        )


def plain_forward(x: Tensor, weight: Eight) -> Tensor:
    """x W^T [T, O] in fp32 by PyTorch's operations: the plain twin."""
    values, steps = rounded(x)
    return (values.float() @ weight.values.float().t()).mul_(steps[:, None]).mul_(weight.steps)


def plain_backward(dys: Sequence[Tensor], weights: Sequence[Eight]) -> Tensor:
    """The sum of dy W over layers on the same input [T, I] in fp32; the gradients of a token are rounded together."""
    values, steps = rounded(torch.cat([dy.float() * weight.steps for dy, weight in zip(dys, weights, strict=True)], 1))
    return (values.float() @ torch.cat([weight.values for weight in weights]).float()).mul_(steps[:, None])
