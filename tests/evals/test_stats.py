"""Statistics against numbers worked out elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunesmith.core.errors import GradeError
from tunesmith.evals import stats


def test_wilson_interval_equals_the_published_formula() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score): four of his cases.
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        got = stats.share([1.0] * right + [0.0] * (n - right))
        assert (got.value, got.n) == (right / n, n)
        assert (got.low, got.high) == pytest.approx((low, high), abs=5e-5)
    assert stats.share([1.0] * 20).high == 1.0
    assert stats.share([1.0] * 20).low == pytest.approx(1 - 0.1611, abs=5e-5)
    assert stats.share([0.5]).low < 0.5 < stats.share([0.5]).high


def test_bootstrap_of_a_mean_is_the_normal_interval_and_is_seeded() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    got = stats.mean(values, seed=3)
    spread = 1.96 * values.std() / math.sqrt(400)
    assert got.value == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.12 * spread)
    assert got == stats.mean(values, seed=3)
    assert got != stats.mean(values, seed=4)


def test_a_ratio_weighs_rows_by_their_tokens() -> None:
    got = stats.ratio([10.0, 1.0], [100.0, 1.0])
    assert got.value == pytest.approx(11 / 101), "sum over sum, not the mean of 0.1 and 1"
    assert (got.low, got.high) == pytest.approx((0.1, 1.0)), "both rows alone occur among resamples of two"


def test_coverage_of_the_bootstrap_is_near_its_level() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(150):
        counts = random.integers(5, 50, 80).astype(float)
        sums = counts * (2.0 + random.normal(0, 0.5, 80))
        got = stats.ratio(sums, counts, seed=trial)
        hits += got.low <= 2.0 <= got.high
    assert 0.88 <= hits / 150 <= 0.99


def test_right_and_wrong_is_tested_as_mcnemar_does() -> None:
    # 10 rows only ours has right, 2 only the base: exact binomial, 2 * (1 + 12 + 66) / 4096.
    ours, base = [1.0] * 10 + [0.0] * 2 + [1.0] * 8, [0.0] * 10 + [1.0] * 2 + [1.0] * 8
    got = stats.paired(ours, base)
    assert got.value == pytest.approx(8 / 20)
    assert got.p_value == pytest.approx(2 * 79 / 4096)
    assert got.low < 0.4 < got.high
    assert stats.paired(base, ours).p_value == got.p_value
    assert stats.paired(ours, ours) == stats.Difference(0.0, 0.0, 0.0, 1.0, 20)


def test_the_flip_test_is_exact_for_few_rows_and_never_zero_for_many() -> None:
    # Signs of (1, 2, 3): |sum| >= 6 only for all plus and all minus, 2 of 8.
    assert stats.flip_test(np.array([1.0, 2.0, 3.0])) == 0.25
    # |sum| of (1, 2, -3) is 0: every flip reaches it.
    assert stats.flip_test(np.array([1.0, 2.0, -3.0])) == 1.0
    many = np.random.default_rng(0).uniform(0.5, 1.5, 60)
    assert stats.flip_test(many) == 1 / 10000
    even = np.random.default_rng(0).normal(0, 1, 60)
    assert stats.flip_test(even) > 0.05


def test_perplexities_are_compared_on_the_same_tokens() -> None:
    counts = np.array([10.0, 20.0, 30.0])
    got = stats.paired_perplexity(counts * 1.0, counts * 2.0, counts)
    assert got.value == pytest.approx(math.e - math.e**2)
    assert (got.low, got.high) == pytest.approx((got.value, got.value)), "every row differs alike, so every resample does"
    assert got.p_value == 0.25


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.0, 2.0], [-0.1]])
def test_what_cannot_be_averaged_is_an_error(bad: list[float]) -> None:
    with pytest.raises(GradeError):
        stats.share(bad)


def test_rows_must_pair_and_must_have_tokens() -> None:
    with pytest.raises(GradeError, match="2 rows against 1"):
        stats.paired([1.0, 0.0], [1.0])
    with pytest.raises(GradeError, match="no tokens"):
        stats.ratio([1.0, 2.0], [3.0, 0.0])
