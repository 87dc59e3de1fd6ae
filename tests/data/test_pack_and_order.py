"""Bins, batches, and the order of an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tunesmith.core.errors import BugError, RecipeError
from tunesmith.core.recipe import StepBatch
from tunesmith.core.types import Tokens
from tunesmith.data.order import WINDOW, copies, epoch_steps
from tunesmith.data.pack import fit, pack


def row(size, key, group="", streams=()):
    ids = np.arange(size, dtype=np.int32)
    train = np.ones(size, dtype=np.float32)
    train[0] = 0
    return Tokens(ids, train, key, group, "r", {name: np.full(size, 0.5, dtype=np.float32) for name in streams})


def plain_best_fit(lengths, capacity):
    """The rule in its plainest form, for comparison of fill."""
    bins = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in bins if b[0] >= lengths[place]]
        if fitting:
            best = min(fitting, key=lambda b: b[0])
            best[0] -= lengths[place]
            best[1].append(place)
        else:
            bins.append([capacity - lengths[place], [place]])
    return len(bins)


@pytest.mark.parametrize("seed", range(20))
def test_fit_is_best_fit_decreasing(seed):
    lengths = np.random.default_rng(seed).integers(1, 100, 200).tolist()
    bins = fit(lengths, 128)
    assert sorted(i for b in bins for i in b) == list(range(200))
    assert all(sum(lengths[i] for i in b) <= 128 for b in bins)
    assert len(bins) == plain_best_fit(lengths, 128)


@pytest.mark.parametrize("capacity", [1023, 1024, 1025, 5000, 70_000])
def test_large_bins_are_found_by_the_same_rule(capacity):
    lengths = np.random.default_rng(capacity).integers(0, capacity // 2 + 2, 300).tolist()
    bins = fit(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(300))
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)
    assert len(bins) == plain_best_fit(lengths, capacity)


def test_fit_at_the_edges():
    assert fit([], 10) == []
    assert fit([10, 10], 10) == [[0], [1]]
    assert fit([11, 3, 7], 10) == [[0], [1, 2]]
    assert fit([5, 5, 5], 10) == [[0, 1], [2]]
    # The tightest bin is taken, not the first: 4 goes beside 6 and not beside 5.
    assert fit([5, 6, 4], 10) == [[1, 2], [0]]
    with pytest.raises(ValueError, match="at least one"):
        fit([1], 0)


def test_pack_lays_rows_end_to_end_and_keeps_groups_together():
    rows = [row(6, "a"), row(4, "b", "g"), row(5, "c"), row(4, "d", "g"), row(30, "e"), row(1, "f")]
    batches = pack(rows, 12)
    where = {segment.key: place for place, batch in enumerate(batches) for segment in batch.segments}
    assert sorted(where) == list("abcdef")
    assert where["b"] == where["d"]
    assert all(len(batch) <= 12 for place, batch in enumerate(batches) if place != where["e"])
    for batch in batches:
        assert [s.start for s in batch.segments] == [0, *[s.stop for s in batch.segments[:-1]]]
        assert batch.segments[-1].stop == len(batch) == len(batch.train)
        for segment in batch.segments:
            original = next(r for r in rows if r.key == segment.key)
            np.testing.assert_array_equal(batch.ids[segment.start : segment.stop], original.ids)
            np.testing.assert_array_equal(batch.train[segment.start : segment.stop], original.train)
            assert (segment.group, segment.role) == (original.group, "r")


def test_pack_carries_streams_and_refuses_unequal_ones():
    (batch,) = pack([row(3, "a", streams=["s"]), row(2, "b", streams=["s"])], 10)
    assert batch.streams["s"].tolist() == [0.5] * 5
    with pytest.raises(BugError):
        pack([row(3, "a", streams=["s"]), row(2, "b")], 10)


def test_examples_a_step():
    lengths, ones = np.full(10, 5), np.ones(10)
    steps = epoch_steps(lengths, ones, StepBatch(examples=4), seed=3, epoch=0)
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(np.concatenate(steps).tolist()) == list(range(10))
    again = epoch_steps(lengths, ones, StepBatch(examples=4), seed=3, epoch=0)
    assert all((a == b).all() for a, b in zip(steps, again, strict=True))
    for other in ({"seed": 4, "epoch": 0}, {"seed": 3, "epoch": 1}):
        assert np.concatenate(epoch_steps(lengths, ones, StepBatch(examples=4), **other)).tolist() != np.concatenate(steps).tolist()


def test_tokens_a_step():
    lengths = np.random.default_rng(0).integers(1, 400, WINDOW + 2000)
    steps = epoch_steps(lengths, np.ones(len(lengths)), StepBatch(tokens=4096), seed=0, epoch=2)
    sums = np.array([lengths[step].sum() for step in steps])
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    assert sums.max() <= 4096
    assert sums.sum() / (len(steps) * 4096) > 0.99
    # The windows are mixed and the fullest steps do not come first.
    assert abs(sums[: len(sums) // 2].mean() - sums[len(sums) // 2 :].mean()) < 100


def test_a_row_over_the_step_is_a_recipe_error():
    with pytest.raises(RecipeError, match="cannot hold a row of 9") as caught:
        epoch_steps(np.array([3, 9]), np.ones(2), StepBatch(tokens=8), 0, 0)
    assert caught.value.where == "run.batch.tokens"


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0, 1.5, 2.0, 3.3])
def test_every_row_occurs_as_often_as_its_weight_says(weight):
    rows, epochs = 400, 40
    counts = Counter()
    for epoch in range(epochs):
        steps = epoch_steps(np.full(rows, 2), np.full(rows, weight), StepBatch(examples=32), 7, epoch)
        once = Counter(np.concatenate(steps).tolist() if steps else [])
        assert all(once[i] in (int(weight), int(np.ceil(weight))) for i in range(rows))
        assert abs(sum(once.values()) / rows - weight) < 0.12
        counts += once
    assert all(abs(counts[i] - weight * epochs) < 1 + 1e-9 for i in range(rows))


def test_weights_of_two_sources_do_not_disturb_each_other():
    weights = np.array([1.0] * 5 + [0.5] * 5)
    assert copies(weights, 0, 0)[:5].tolist() == [1] * 5
    assert (copies(weights, 0, 0) + copies(weights, 0, 1))[5:].tolist() == [1] * 5


def test_nothing_left_is_no_step():
    assert epoch_steps(np.zeros(0, dtype=np.int64), np.zeros(0), StepBatch(tokens=8), 0, 0) == []
