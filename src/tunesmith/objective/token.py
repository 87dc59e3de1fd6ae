"""Losses over single tokens."""

from __future__ import annotations

import torch

from tunesmith.core.types import Batch, Loss, Outputs

# Roles of rows whose words are no example to follow.
UNLEARNED = frozenset({"rejected", "undesirable", "mismatched"})


def nll(outputs: Outputs, batch: Batch) -> Loss:
    """Negative log-likelihood of the trained tokens, each times its weight; of pairs the chosen answers alone, of labels the good ones.

    The sum runs over outputs.logp [K] in fp64, so that it does not depend on how a step is cut into micro-batches beyond the
    rounding of each term; it is to be divided by the weights of the whole optimizer step ("tokens"). Fisher 1922.
    """
    weights = outputs.train.double()
    if any(segment.role in UNLEARNED for segment in batch.segments):
        learned = torch.tensor([segment.role not in UNLEARNED for segment in batch.segments], device=outputs.row.device)
        weights = weights * learned[outputs.row]
    return Loss((outputs.logp.double() * -weights).sum(), "tokens")
