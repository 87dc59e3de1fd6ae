"""Losses over what a reward head reads: pairs of scores, scores with a value, and the steps of a solution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import BugError
from tunesmith.core.types import Batch, Loss, Outputs


def scores_of(outputs: Outputs) -> Tensor:
    """The scores [K] in fp64. Raises BugError when a language model spoke."""
    if outputs.score is None:
        raise BugError("a reward objective met a model without a score head", where="objective")
    return outputs.score.double()


def stream(outputs: Outputs, batch: Batch, name: str) -> Tensor:
    """A stream of the batch [K] at the scored positions."""
    return torch.from_numpy(batch.streams[name]).to(outputs.index.device)[outputs.index].double()


def reward(outputs: Outputs, batch: Batch, *, centre: float = 0.0) -> Loss:
    """Bradley-Terry: -log sigma(s_w - s_l - margin) + centre (s_w + s_l)^2, over pairs.

    Bradley 1952; margin: Touvron 2023, arXiv:2307.09288, equation 2; centring: Eisenstein 2023, arXiv:2312.09244, section 2.
    """
    scores = scores_of(outputs)
    sides: dict[str, dict[str, int]] = {"chosen": {}, "rejected": {}}
    for place, row in enumerate(outputs.row.tolist()):
        segment = batch.segments[row]
        if segment.role not in sides or segment.group in sides[segment.role]:
            raise BugError(f"a row of role '{segment.role}' stands where pairs are needed", where=segment.key)
        sides[segment.role][segment.group] = place
    if sides["chosen"].keys() != sides["rejected"].keys():
        raise BugError("a pair was torn apart", where=batch.segments[0].key)
    order = list(sides["chosen"])
    first, second = (torch.tensor([sides[role][group] for group in order], device=scores.device) for role in ("chosen", "rejected"))
    chosen, rejected = scores[first], scores[second]
    margin = stream(outputs, batch, "margin")[first] if "margin" in batch.streams else torch.zeros_like(chosen)
    losses = -F.logsigmoid(chosen - rejected - margin) + centre * (chosen + rejected).square()
    gap = (chosen - rejected).detach()
    n = float(len(order))
    right = float((gap > 0).double().sum() + 0.5 * (gap == 0).double().sum())
    metrics = {"accuracy": (right, n), "score_margin": (float(gap.sum()), n), "score_mean": (float(scores.detach().sum()), 2 * n)}
    return Loss(losses.sum(), "pairs", metrics)


def reward_regression(outputs: Outputs, batch: Batch) -> Loss:
    """Squared error to the row's value: (s - y)^2, over rows (Wang 2024, arXiv:2406.08673, for regression rewards)."""
    scores, values = scores_of(outputs), stream(outputs, batch, "value")
    error = (scores - values).detach().abs()
    return Loss((scores - values).square().sum(), "sequences", {"absolute_error": (float(error.sum()), float(len(scores)))})


def reward_classes(outputs: Outputs, batch: Batch) -> Loss:
    """Binary cross-entropy of sigma(s) against the row's value in 0..1, over rows (Cobbe 2021, arXiv:2110.14168, for verifiers)."""
    scores, values = scores_of(outputs), stream(outputs, batch, "value")
    return Loss(_cross_entropy(scores, values), "sequences", _right(scores, values))


def prm(outputs: Outputs, batch: Batch) -> Loss:
    """Binary cross-entropy at the end of every step: sigma(s) says that the solution is right so far.

    Lightman 2023, arXiv:2305.20050, section 2.6; over all steps of the optimizer step alike.
    """
    scores, values = scores_of(outputs), stream(outputs, batch, "value")
    return Loss(_cross_entropy(scores, values), "tokens", _right(scores, values))


def _cross_entropy(scores: Tensor, values: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, values, reduction="sum")


def _right(scores: Tensor, values: Tensor) -> dict[str, tuple[float, float]]:
    right = ((scores.detach() > 0) == (values > 0.5)).double()
    return {"accuracy": (float(right.sum()), float(len(right)))}
