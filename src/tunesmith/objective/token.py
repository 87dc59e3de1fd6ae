"""Losses over single tokens."""

from __future__ import annotations

from tunesmith.core.types import Batch, Loss, Outputs


def nll(outputs: Outputs, batch: Batch) -> Loss:
    """Negative log-likelihood of the trained tokens, each times its weight.

    The sum runs over outputs.logp [K] in fp64, so that it does not depend on how a step is cut into micro-batches beyond the
    rounding of each term; it is to be divided by the weights of the whole optimizer step ("tokens").
    """
    del batch
    return Loss((outputs.logp.double() * -outputs.train.double()).sum(), "tokens")
