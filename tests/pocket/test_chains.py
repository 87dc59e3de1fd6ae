"""The demo's sums in steps: labels are true up to the first wrong step, and nothing of the held-out chains is trained on."""

import re
from itertools import pairwise

import pytest

from tunesmith.pocket import chains

SIDES = {"train": chains.chain_rows, "test": chains.held_out_chains}


def read(step):
    value, sign, change, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step).groups()
    return int(value), int(f"{sign}{change}"), int(result)


@pytest.mark.parametrize("side", SIDES)
def test_labels_say_where_the_first_wrong_sum_is(side):
    rows = SIDES[side](300, 1)
    slips = 0
    for row in rows:
        steps = [read(step) for step in row["completions"]]
        assert row["prompt"] == f"Work out {steps[0][0]} " + " ".join(f"{'+' if c > 0 else '-'} {abs(c)}" for _, c, _ in steps) + "."
        assert all(before[2] == after[0] for before, after in pairwise(steps))
        wrong = [value + change != result for value, change, result in steps]
        assert sum(wrong) <= 1
        first = wrong.index(True) if any(wrong) else len(steps)
        assert row["labels"] == [place < first for place in range(len(steps))]
        slips += any(wrong)
    assert 0.65 < slips / len(rows) < 0.85


def test_prompts_are_different_repeat_with_the_seed_and_are_never_on_both_sides():
    train, test = chains.chain_rows(2000, 0), chains.held_out_chains(500, 0)
    assert train == chains.chain_rows(2000, 0)
    assert train != chains.chain_rows(2000, 1)
    prompts = [row["prompt"] for row in train]
    assert len(set(prompts)) == len(prompts)
    assert not {row["prompt"] for row in chains.chain_rows(2000, 7)} & {row["prompt"] for row in test}


def test_more_rows_than_there_are_prompts_are_refused(monkeypatch):
    monkeypatch.setattr(chains, "STEPS", (1, 1))
    with pytest.raises(ValueError, match="not 1000 different prompts"):
        chains.chain_rows(1000, 0)
