"""How the log-probabilities of a pair are taken before a loss compares them: by length, and by the divergence that is held small."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.objective.rows import Pairs

Lengths = Literal["sum", "mean", "desensitised"]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
LARGEST = 80.0  # exponents above it are cut (float32 ends at 88), so that one hopeless answer does not make a loss infinite


def diverge(pairs: Pairs, divergence: Divergence, alpha: float) -> Pairs:
    """The pairs with f'(t), t = pi / reference, in place of their log-ratios: the rewards over beta of f-DPO.

    reverse KL: log t; forward KL: 1 - 1/t; Jensen-Shannon: log 2t/(t + 1); alpha: (t^(alpha - 1) - 1) / (alpha - 1), which is the forward
    KL at 0 and the reverse at 1. Wang 2023, arXiv:2309.16240, equations 7 and 8 and table 1, up to constants, which cancel in a pair.
    """
    if divergence == "reverse_kl":
        return pairs
    chosen, rejected = (_slope(ratio, divergence, alpha) for ratio in (pairs.chosen_ratio, pairs.rejected_ratio))
    zero = torch.zeros_like(pairs.chosen_reference)
    return replace(pairs, chosen=chosen, rejected=rejected, chosen_reference=zero, rejected_reference=zero)


def _slope(ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    if divergence == "js":
        return math.log(2) + F.logsigmoid(ratio)
    power = -1.0 if divergence == "forward_kl" else alpha - 1
    if abs(power) < 1e-6:
        return ratio
    return torch.expm1((power * ratio).clamp_max(LARGEST)) / power


def average(pairs: Pairs) -> Pairs:
    """The pairs with log-probabilities a token in place of sums over tokens."""
    chosen, rejected = (weight.clamp_min(torch.finfo(weight.dtype).tiny) for weight in (pairs.chosen_weight, pairs.rejected_weight))
    return replace(
        pairs,
        chosen=pairs.chosen / chosen,
        rejected=pairs.rejected / rejected,
        chosen_reference=pairs.chosen_reference / chosen,
        rejected_reference=pairs.rejected_reference / rejected,
    )
