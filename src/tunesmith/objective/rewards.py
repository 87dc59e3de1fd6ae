"""Losses over what a reward head reads: pairs of scores, scores with a value, and the steps of a solution. s is a score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import BugError, DataError
from tunesmith.core.types import Batch, Loss, Outputs
from tunesmith.objective.rows import match, sums, values_of
from tunesmith.objective.sequences import read, right


def reward(outputs: Outputs, batch: Batch, *, centre: float = 0.0, token_weight: float = 0.0) -> Loss:
    """Bradley-Terry over pairs: -log sigma(s_w - s_l - margin) + centre (s_w + s_l)^2, s read at the end of each conversation.

    margin is the row's (stream "margin", 0 without one). Bradley 1952; Stiennon 2020, arXiv:2009.01325, equation 1; margin: Touvron
    2023, arXiv:2307.09288, equation 2; centring: Eisenstein 2023, arXiv:2312.09244, equation 2, 0.01 in TRL's advice.
    token_weight adds so many times the cross-entropy of sigma(s) at every token of the answers, which is to be 1 in chosen and 0 in
    rejected ones, a mean over each answer's tokens and then over both: Cobbe 2021, arXiv:2110.14168, section 4.2.
    """
    every, ends = _scores(outputs), _ends(outputs, batch)
    scores = every[ends]
    places = match([segment.role for segment in batch.segments], [segment.group for segment in batch.segments])
    chosen, rejected = (torch.tensor(side, device=scores.device) for side in places)
    gap, total = scores[chosen] - scores[rejected], scores[chosen] + scores[rejected]
    margin = values_of("margin", outputs, batch)[ends][chosen] if "margin" in batch.streams else 0.0
    loss = (-F.logsigmoid(gap - margin) + centre * total.square()).sum()
    if token_weight:
        good = torch.zeros_like(scores).index_fill(0, chosen, 1.0)
        loss = loss + token_weight * _over_tokens(every, good[outputs.row], outputs, batch).sum() / 2
    n = float(len(gap))
    return Loss(
        loss,
        "pairs",
        read({"accuracy": (right(gap), n), "score_margin": (gap.sum(), n), "score_mean": (scores.sum(), 2 * n)}),
    )


def reward_regression(outputs: Outputs, batch: Batch) -> Loss:
    """Squared error to the row's value y: (s - y)^2.

    Wang 2024, arXiv:2406.08673, for rewards by regression.
    """
    ends = _ends(outputs, batch)
    scores = _scores(outputs)[ends]
    error = scores - values_of("value", outputs, batch)[ends]
    n = float(len(scores))
    return Loss(error.square().sum(), "sequences", read({"absolute_error": (error.abs().sum(), n), "score_mean": (scores.sum(), n)}))


def reward_classes(outputs: Outputs, batch: Batch, *, token_weight: float = 0.0) -> Loss:
    """Binary cross-entropy to the row's value y in 0..1: -y log sigma(s) - (1 - y) log sigma(-s), s read at the end of the conversation.

    Cobbe 2021, arXiv:2110.14168, section 4.2, for verifiers; token_weight adds so many times the mean of the same over the answer's tokens.
    """
    _demand_shares(batch)
    every, targets, ends = _scores(outputs), values_of("value", outputs, batch), _ends(outputs, batch)
    scores, values = every[ends], targets[ends]
    loss = _cross_entropy(scores, values).sum()
    if token_weight:
        loss = loss + token_weight * _over_tokens(every, targets, outputs, batch).sum()
    n = float(len(scores))
    accuracy = right(scores * (values - 0.5).sign()), n
    return Loss(loss, "sequences", read({"accuracy": accuracy, "score_mean": (scores.sum(), n)}))


def prm(outputs: Outputs, batch: Batch) -> Loss:
    """Process reward: binary cross-entropy at the end of every step, sigma(s) the chance that the solution is right so far.

    Lightman 2023, arXiv:2305.20050, section 2.6, with value 1 for right and 0 for wrong. Each step counts alike (count "tokens").
    """
    _demand_shares(batch)
    scores, values, weights = _scores(outputs), values_of("value", outputs, batch), outputs.train.double()
    correct = (scores.detach() * (values - 0.5).sign()).sign()
    metrics = read({"accuracy": ((correct + 1).sum() / 2, float(len(scores)))})
    return Loss((weights * _cross_entropy(scores, values)).sum(), "tokens", metrics)


def _scores(outputs: Outputs) -> Tensor:
    if outputs.score is None:
        raise BugError("a reward objective met a model without a score head", where="objective", code="no_score")
    return outputs.score.double()


def _ends(outputs: Outputs, batch: Batch) -> Tensor:
    """Which of the K positions is the last one of each row, [S] in the order of the rows."""
    size, index, row = len(batch.segments), outputs.index, outputs.row
    last = torch.full((size,), -1, device=index.device).scatter_reduce(0, row, index, "amax")
    (ends,) = torch.where(index == last[row])
    if len(ends) != size:
        raise BugError(f"{len(ends)} of {size} rows are scored", where=batch.segments[0].key, code="no_score")
    return ends[row[ends].argsort()]


def _over_tokens(scores: Tensor, values: Tensor, outputs: Outputs, batch: Batch) -> Tensor:
    """The mean cross-entropy [S] of each row's positions, from scores and values [K]."""
    size = len(batch.segments)
    return sums(_cross_entropy(scores, values), outputs.row, size) / sums(torch.ones_like(scores), outputs.row, size)


def _demand_shares(batch: Batch) -> None:
    for segment in batch.segments:
        there = slice(segment.start, segment.stop)
        values = batch.streams["value"][there][batch.train[there] != 0]
        if ((values < 0) | (values > 1)).any():
            raise DataError(
                f"the value {values[(values < 0) | (values > 1)][0]:g} is no probability",
                where=segment.key,
                remedy="give labels in 0..1, or learn scores with objective: reward_regression",
                code="bad_value",
            )


def _cross_entropy(scores: Tensor, values: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, values, reduction="none")
