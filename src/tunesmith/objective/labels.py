"""Losses over answers with a label of their own, good or bad; both need all rows of the optimizer step at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import BugError
from tunesmith.objective.rows import Rows

MISMATCHED = "mismatched"


def kto(
    rows: Rows, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """Kahneman-Tversky optimisation: weight_D (1 - sigma(beta ratio - z)) and weight_U (1 - sigma(z - beta ratio)).

    z = beta max(0, mean ratio of mismatched answers) estimates beta KL(pi || reference) over the whole step, without gradient.
    Ethayarajh 2024, arXiv:2402.01306, equations 7 and 8. Raises BugError without mismatched rows.
    """
    others = rows.of(MISMATCHED)
    if not len(others):
        raise BugError("KTO came without mismatched answers to estimate the KL divergence from", where="objective.kto")
    divergence = (others.logp - others.reference).detach().mean().clamp_min(0)
    good, bad = rows.of("desirable"), rows.of("undesirable")
    losses = torch.cat([
        desirable_weight * torch.sigmoid(beta * (divergence - (good.logp - good.reference))),
        undesirable_weight * torch.sigmoid(beta * ((bad.logp - bad.reference) - divergence)),
    ])  # fmt: skip
    return losses, {"kl": (float(divergence), 1.0)}


def bco(rows: Rows, *, beta: float = 0.1) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """Binary classifier optimisation: -log sigma(r - d) for good answers, -log sigma(d - r) for bad ones.

    d is half the sum of their mean rewards over the whole step, without gradient. Jung 2024, arXiv:2404.04656, equations 11 and 12.
    """
    good, bad = (beta * (part.logp - part.reference) for part in (rows.of("desirable"), rows.of("undesirable")))
    means = [part.detach().mean() for part in (good, bad) if len(part)]
    shift = torch.stack(means).mean()
    return torch.cat([-F.logsigmoid(good - shift), -F.logsigmoid(shift - bad)]), {"reward_shift": (float(shift), 1.0)}


def balanced_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """The range of desirable_weight, with undesirable_weight 1, that makes (weight_D n_D) / (weight_U n_U) lie in 1 to 4/3.

    Ethayarajh 2024, equation 9.
    """
    ratio = undesirable / desirable
    return ratio, 4 / 3 * ratio
