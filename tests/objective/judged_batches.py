"""Random batches of pairs, labels and scores in fp64, and what a model would say of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from tunesmith.core.recipe import Named
from tunesmith.core.types import Batch, Outputs, Segment
from tunesmith.objective import methods


@dataclass
class Said:
    """A batch, what was said of its trained positions (leaf [K] needs gradient), and both as an Outputs."""

    batch: Batch
    leaf: torch.Tensor
    outputs: Outputs


def batch_of(rows, reference=True, seed=0, streams=None, weights=None):
    """rows: (prompt length, answer length, group, role). Reference log-probabilities lie where tokens are trained."""
    rng = np.random.default_rng(seed)
    segments, train, start = [], [], 0
    for prompt, answer, group, role in rows:
        segments.append(Segment(start, start + prompt + answer, f"{group}/{role}", group, role))
        train.append(np.concatenate([np.zeros(prompt), np.ones(answer)]))
        start += prompt + answer
    train = np.concatenate(train).astype(np.float32)
    if weights is not None:
        train[train != 0] = weights
    held = dict(streams or {})
    if reference:
        held["reference"] = np.where(train != 0, -rng.exponential(0.8, start), 0).astype(np.float32)
    return Batch(rng.integers(0, 99, start).astype(np.int32), train, tuple(segments), held)


def say(batch, seed=1, score=False, values=None):
    """Log-probabilities (or scores) of the batch's trained positions."""
    index = torch.from_numpy(np.flatnonzero(batch.train))
    ends = torch.tensor([segment.stop for segment in batch.segments])
    row = torch.searchsorted(ends, index, right=True)
    noise = torch.Generator().manual_seed(seed)
    if values is None:
        drawn = torch.randn(len(index), generator=noise, dtype=torch.float64)
        values = drawn if score else -drawn.abs()
    leaf = torch.as_tensor(values, dtype=torch.float64).clone().requires_grad_()
    empty = torch.zeros(0, dtype=torch.float64)
    held = {"logp": empty, "score": leaf} if score else {"logp": leaf}
    return Said(batch, leaf, Outputs(index=index, train=torch.from_numpy(batch.train)[index], row=row, **held))


def pair_rows(n=5, seed=0, equal=False, prompt=None):
    """n pairs with answers of 1..7 tokens (all of one length with `equal`)."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        before = int(rng.integers(1, 4)) if prompt is None else prompt
        rows += [(before, 4 if equal else int(rng.integers(1, 8)), f"g{i}", role) for role in ("chosen", "rejected")]
    return rows


def label_rows(n=6, mismatched=True, seed=0):
    """n labelled answers, good and bad, each with a row of another answer behind it."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        roles = ("undesirable" if i % 3 == 1 else "desirable", *(["mismatched"] if mismatched else []))
        rows += [(2, int(rng.integers(1, 8)), f"g{i}", role) for role in roles]
    return rows


def pairs(n=5, seed=0, **more):
    return say(batch_of(pair_rows(n, seed, **more), seed=seed), seed + 1)


def labels(n=6, seed=0, **more):
    return say(batch_of(label_rows(n, seed=seed, **more), seed=seed), seed + 1)


def scored(n=5, seed=0, margin=True, throughout=False):
    """Pairs whose last token alone is scored, or every token of the answers (`throughout`)."""
    batch = batch_of(pair_rows(n, seed), reference=False, seed=seed)
    rng = np.random.default_rng(seed + 7)
    ends = batch.train.copy() if throughout else np.zeros_like(batch.train)
    margins = np.zeros_like(batch.train)
    for place, segment in enumerate(batch.segments):
        ends[segment.stop - 1] = 1
        if place % 2 == 0:
            margins[segment.start : batch.segments[place + 1].stop] = rng.exponential(1.0)
    return say(replace(batch, train=ends, streams={"margin": margins} if margin else {}), seed + 1, score=True)


def valued(n=6, seed=0, each=1, low=0.0, high=1.0):
    """Rows without group, `each` positions of which are scored against a value."""
    rows = [(3, each, "", "") for _ in range(n)]
    batch = batch_of(rows, reference=False, seed=seed)
    rng = np.random.default_rng(seed + 7)
    values = np.where(batch.train != 0, rng.integers(int(low), int(high) + 1, len(batch)), 0).astype(np.float32)
    return say(replace(batch, streams={"value": values}), seed + 1, score=True)


def method(name, weight=1.0, **settings):
    return methods([Named(name=name, weight=weight, **settings)])[0]


def said_for(term, n=5, seed=0):
    """Rows of the kind that a term asks for."""
    if "score" not in term.needs:
        return labels(n, seed) if "labels" in term.needs else pairs(n, seed)
    throughout = "every_token" in term.needs
    if "pairs" in term.needs:
        return scored(n, seed, throughout=throughout)
    return valued(n, seed, each=3 if "steps" in term.needs or throughout else 1)


def reorder(said, order):
    """The same rows in another order, and the places [K] of the new positions among the old ones."""
    batch, segments, pieces, start = said.batch, [], [], 0
    for place in order:
        old = batch.segments[place]
        segments.append(replace(old, start=start, stop=start + old.stop - old.start))
        pieces.append(np.arange(old.start, old.stop))
        start += old.stop - old.start
    where = np.concatenate(pieces)
    streams = {name: values[where] for name, values in batch.streams.items()}
    made = replace(batch, ids=batch.ids[where], train=batch.train[where], segments=tuple(segments), streams=streams)
    number = np.full(len(batch), -1)
    number[np.flatnonzero(batch.train)] = np.arange(len(said.leaf))
    places = torch.from_numpy(number[where][made.train != 0])
    return say(made, score=said.outputs.score is not None, values=said.leaf.detach()[places]), places
