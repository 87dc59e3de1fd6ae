"""Is it learning? Checks that catch a run which trains nothing, the wrong thing, or into NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import ModelError
from tunesmith.core.log import logger

WINDOW = 50


def fingerprint(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """One number for each tensor that changes when any of its values does (with overwhelming likelihood)."""
    out = {}
    for name, tensor in parameters.items():
        flat = tensor.detach().reshape(-1).double()
        out[name] = float((flat * torch.linspace(1.0, 2.0, flat.numel(), dtype=torch.float64, device=flat.device)).sum())
    return out


def after_first_step(parameters: Mapping[str, Tensor], before: Mapping[str, float], no_gradient: Sequence[str], lr: float) -> None:
    """Demand that the first step moved something. Raises ModelError (nothing_moved); tensors without a gradient are named in the log."""
    if no_gradient:
        logger.warning(
            "%d trainable tensors got no gradient in the first step, e.g. %s (normal only for unused experts)",
            len(no_gradient),
            ", ".join(no_gradient[:3]),
        )
    after = fingerprint(parameters)
    if lr > 0 and all(after[name] == before[name] for name in before):
        raise ModelError(
            f"the first step changed none of the {len(before)} trainable tensors",
            where="optimizer",
            remedy="raise optim.lr; in bf16 tiny updates vanish, so keep trained weights in fp32",
            code="nothing_moved",
        )


def is_spike(recent: Sequence[float], loss: float) -> bool:
    """Whether a loss stands far above the last ones: more than six deviations and 20 % over their mean."""
    if len(recent) < 10:
        return False
    mean = sum(recent) / len(recent)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in recent) / len(recent))
    return loss > mean + 6 * deviation and loss > 1.2 * mean
