"""Products of a few rows with weights that stay: joined, laid out once for the kernel, in int8 where that is asked for.

N rows, I inputs, O outputs of all joined layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Way = Callable[[Tensor], Tensor]
FEW = 64  # rows that the layout of a packed weight is chosen for


def product(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype, *, int8: bool = False, packed: bool = True
) -> Way:
    """A function [N, I] -> [N, O] for layers on the same input: x W^T + bias with W [O, I] in `dtype`.

    In bf16 on a CPU the weights are copied into the blocked layout of oneDNN, which saves reordering them in every call; elsewhere, and
    with `packed` off, they are used where they are. `int8`: weights rounded to 8 bits by output, inputs by row (see `Int8`).
    """
    joined = _joined(biases, weights)
    if int8:
        return Int8(weights, joined)
    narrow = [weight.to(dtype) for weight in weights]
    if packed and dtype == torch.bfloat16 and narrow[0].device.type == "cpu" and _has_onednn():
        return Packed(torch.cat(narrow) if len(narrow) > 1 else narrow[0], None if joined is None else joined.to(dtype))
    return Plain(narrow, None if joined is None else joined.to(dtype))


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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


class Packed:
    """A bf16 weight in the layout of oneDNN's blocked product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), FEW)
        self.bias, self.outputs = bias, len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.weight, self.bias, "none", [], "")
        return out


class Int8:
    """x W^T with both rounded to 8 bits: y = s_x s_w (q_x q_w^T), s the largest magnitude of a row of x or of W over 127; result in fp32.

    Symmetric, per row of x (token) and per row of W (output), as LLM.int8() does without its outliers (Dettmers 2022, arXiv:2208.07339).
    """

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        whole = torch.cat([weight.detach().float() for weight in weights])
        self.scale = (whole.abs().amax(1) / 127).clamp_min_(1e-12)
        rounded = (whole / self.scale[:, None]).round_().to(torch.int8)
        self.bias = None if bias is None else bias.float()
        self.packed = rounded.device.type == "cpu" and hasattr(torch.ops.onednn, "qlinear_prepack")
        self._zeros = torch.zeros(len(whole), dtype=torch.int64)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, None) if self.packed else rounded.t()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        size = x.abs().amax(1, keepdim=True).div_(127).clamp_min_(1e-12)
        small = (x / size).round_().to(torch.int8)
        y: Tensor
        if self.packed:
            y = torch.ops.onednn.qlinear_pointwise(
                small, 1.0, 0, self.weight, self.scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )
        else:
            y = torch._int_mm(small, self.weight).float().mul_(self.scale)
        y.mul_(size)
        return y if self.bias is None else y.add_(self.bias)
