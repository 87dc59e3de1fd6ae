"""Losses over single tokens."""

from __future__ import annotations

from tunesmith.core.types import Batch, Loss, Outputs


def nll(outputs: Outputs, batch: Batch) -> Loss:
    """Negative log-likelihood of the trained tokens, each times its weight.

    The sum runs over outputs.logp [K]; it is to be divided by the weights of the whole optimizer step ("tokens").
    """
    del batch
    return Loss((outputs.logp * -outputs.train).sum(), "tokens")
