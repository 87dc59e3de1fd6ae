"""What a model says of given words: summed log-probabilities a row, through the policy's packed scoring."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from tunesmith.core.errors import ModelError
from tunesmith.core.types import Tokens
from tunesmith.data.pack import pack
from tunesmith.evals.stats import Floats
from tunesmith.model import fuse
from tunesmith.model.policy import Policy

CAPACITY = 8192  # tokens of one packed batch; a longer row stands alone


def row_sums(policy: Policy, rows: Sequence[Tokens], *, capacity: int = CAPACITY) -> tuple[Floats, Floats]:
    """For every row the sum of weight x negative log-likelihood of its trained tokens, and the sum of the weights, in float64.

    Scored in evaluation mode, without gradients and rounding to 8 bits; the model's modes are restored. Raises ModelError when a
    log-probability is not finite.
    """
    sums, weights = np.zeros(len(rows)), np.zeros(len(rows))
    named = [replace(row, key=str(place), group="") for place, row in enumerate(rows)]
    with quiet(policy), fuse.exact(policy.model):
        for batch in pack(named, capacity) if named else []:
            out = policy.score(batch)
            train = out.train.double().cpu().numpy()
            losses = -out.logp.double().cpu().numpy() * train
            starts = [segment.start for segment in batch.segments]
            owner = np.searchsorted(starts, out.index.cpu().numpy(), side="right") - 1
            places = np.array([int(segment.key) for segment in batch.segments])[owner]
            np.add.at(sums, places, losses)
            np.add.at(weights, places, train)
    bad = np.flatnonzero(~np.isfinite(sums))
    if len(bad):
        raise ModelError(
            "the model gives a log-probability that is not a number",
            where=rows[int(bad[0])].key,
            remedy="look for NaN in the weights, or score in fp32",
            code="nan_logprob",
        )
    return sums, weights


@contextlib.contextmanager
def quiet(policy: Policy) -> Iterator[None]:
    """Evaluation mode and no gradients while open; every module's mode comes back afterwards."""
    modes = [(module, module.training) for module in policy.model.modules()]
    policy.train_mode(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
