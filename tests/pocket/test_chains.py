"""The demo's solutions in steps: right labels, near misses, and prompts of their own for the held-out ones."""

import re
from collections import Counter

import pytest

from tunesmith.data.formats import FORMATS
from tunesmith.pocket import chains

ROWS = {"train": chains.chain_rows, "test": chains.held_out_chains}
STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def read(step):
    value, sign, change, result = STEP.fullmatch(step).groups()
    return int(value), int(f"{sign}{change}"), int(result)


def asked(prompt):
    start, *rest = re.findall(r"\d+", prompt)
    signs = re.findall(r"Add|Take away", prompt)
    return int(start), [int(number) if sign == "Add" else -int(number) for sign, number in zip(signs, rest, strict=True)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_depend_on_the_seed_alone_and_no_prompt_comes_twice(split):
    rows = ROWS[split](500, 3)
    assert rows == ROWS[split](500, 3)
    assert rows != ROWS[split](500, 4)
    assert len({row["prompt"] for row in rows}) == 500


def test_no_held_out_prompt_is_a_training_prompt_of_any_seed():
    held_out = {row["prompt"] for row in chains.held_out_chains(2000, 0)}
    for seed in range(3):
        assert not held_out & {row["prompt"] for row in chains.chain_rows(5000, seed)}


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_say_where_the_first_wrong_sum_is(split):
    for row in ROWS[split](800, 0):
        value, changes = asked(row["prompt"])
        right = True
        for step, change, label in zip(row["completions"], changes, row["labels"], strict=True):
            before, said, result = read(step)
            assert (before, said) == (value, change), "a step goes on from the value before it, as the prompt says"
            right = right and result == before + said
            assert label is right
            value = result


def test_a_slip_is_one_near_miss_and_the_rest_adds_up():
    misses = Counter()
    for row in chains.chain_rows(2000, 0):
        sums = [read(step) for step in row["completions"]]
        wrong = [(before + change, result) for before, change, result in sums if before + change != result]
        assert len(wrong) == (not all(row["labels"]))
        for true, said in wrong:
            swapped = str(said).zfill(len(str(true))) == str(true)[::-1]
            assert swapped or abs(said - true) in (1, 10)
            misses["swapped" if swapped else abs(said - true)] += 1
    assert min(misses[kind] for kind in (1, 10, "swapped")) > 150


def test_shares_are_as_stated():
    rows = chains.chain_rows(4000, 0)
    assert sum(all(row["labels"]) for row in rows) / 4000 == pytest.approx(chains.RIGHT, abs=0.03)
    for size in range(chains.STEPS[0], chains.STEPS[1] + 1):
        places = Counter(row["labels"].index(False) for row in rows if len(row["labels"]) == size and not all(row["labels"]))
        assert set(places) == set(range(size))
        assert max(places.values()) < 1.35 * min(places.values())


def test_numbers_stay_small():
    values = [number for row in chains.chain_rows(2000, 1) for step in row["completions"] for number in read(step)]
    assert max(map(abs, values)) < 2 * chains.TOP + 20
    assert "-" not in "".join(step.split(" = ")[1] for row in chains.chain_rows(2000, 1) for step in row["completions"])


def test_rows_are_steps_that_the_reader_takes():
    row = chains.chain_rows(1, 0)[0]
    steps = FORMATS.get("steps").function(row, "rows:1")
    assert steps.steps == tuple(row["completions"])
    assert steps.values == tuple(map(float, row["labels"]))
