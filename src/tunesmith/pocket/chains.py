"""The demo's solutions in steps: running sums of small numbers, some with a slip that everything behind it builds on.

A step says the value so far, what is added or taken away, and the result, so that it can be checked from its own words:
"17 + 5 = 22". Held-out chains have prompts of their own, which are never among those of training.
"""

from __future__ import annotations

import zlib
from random import Random
from typing import Any, Literal

from tunesmith.core.seed import seed_of

Split = Literal["train", "test"]
LOWEST, TOP = 10, 30  # the values of a right chain: two digits each, so that a step always has the same shape
STEPS = (3, 4)  # how many, at least and at most
LARGEST = 3  # what one step adds or takes away, at most
RIGHT = 0.25  # share of chains without a slip

_HELD_OUT = 5  # one prompt of so many belongs to the held-out chains


def chain_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows of {"prompt", "completions": steps, "labels": booleans}, no two with the same prompt.

    A label is true as long as no step so far is wrong. The wrong result is off by 1 or by 10, or has its digits swapped; the steps
    behind it are right sums of that wrong value. The first wrong step is each of the steps equally often.
    """
    return _rows("train", count, seed)


def held_out_chains(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows in the same form, with prompts that `chain_rows` never writes, whatever its seed."""
    return _rows("test", count, seed)


def _rows(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    random = Random(seed_of(seed, "pocket chains", split))
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < count:
        start, changes = _task(random)
        prompt = _prompt(start, changes)
        if prompt in seen or (zlib.crc32(prompt.encode()) % _HELD_OUT == 0) == (split == "train"):
            continue
        seen.add(prompt)
        slip = None if random.random() < RIGHT else _number(random, 0, len(changes) - 1)
        rows.append({"prompt": prompt, **_solution(start, changes, slip, random)})
    return rows


def _task(random: Random) -> tuple[int, list[int]]:
    """A first value and what is added to it (or taken away, below 0), step by step; every value stays in LOWEST..TOP."""
    start = value = _number(random, LOWEST, TOP)
    changes: list[int] = []
    for _ in range(_number(random, *STEPS)):
        change = 0
        while not change or not LOWEST <= value + change <= TOP:
            change = _number(random, -LARGEST, LARGEST)
        changes.append(change)
        value += change
    return start, changes


def _prompt(start: int, changes: list[int]) -> str:
    return " ".join([f"Work out {start}", *(f"{'+' if change > 0 else '-'} {abs(change)}" for change in changes)]) + "."


def _solution(start: int, changes: list[int], slip: int | None, random: Random) -> dict[str, Any]:
    value, steps = start, list[str]()
    for place, change in enumerate(changes):
        result = value + change
        if place == slip:
            result = _slip(value, change, changes[place + 1 :], random)
        steps.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {result}")
        value = result
    right = len(changes) if slip is None else slip
    return {"completions": steps, "labels": [place < right for place in range(len(changes))]}


KINDS = ("ten", "swap", "sign")


def _slip(value: int, change: int, rest: list[int], random: Random) -> int:
    """A wrong result, of two digits, as are those that the rest of the chain makes of it."""
    result = value + change
    lowest = LOWEST - min(sum(rest[:place]) for place in range(len(rest) + 1))
    kinds = {"one": [result - 1, result + 1], "ten": [result - 10, result + 10], "swap": [int(str(result)[::-1])], "sign": [value - change]}
    while True:
        kind = KINDS[_number(random, 0, len(KINDS) - 1)]
        near = [number for number in kinds[kind] if number != result and number >= lowest]
        if near:
            return _pick(random, near)


def _number(random: Random, low: int, high: int) -> int:
    # random() alone is promised to give the same stream in every Python version.
    return low + int(random.random() * (high - low + 1))


def _pick(random: Random, numbers: list[int]) -> int:
    return numbers[_number(random, 0, len(numbers) - 1)]
