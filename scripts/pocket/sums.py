"""Small arithmetic of the corpus."""

from __future__ import annotations

from random import Random

from world import number, pick


def sums(random: Random) -> str:
    """A few sums, written as equations or in words; every one of them is right."""
    return pick(random, ("\n", " ", "; ", ". ")).join(_sum(random) for _ in range(number(random, 3, 8)))


def _sum(random: Random) -> str:
    top = pick(random, (10, 20, 50, 100))
    a, b = number(random, 0, top), number(random, 0, top)
    if b > a:
        a, b = b, a
    small_a, small_b = number(random, 2, 12), number(random, 2, 12)
    kind = int(random.random() * 8)
    if kind < 2:
        return f"{a} + {b} = {a + b}" if kind else f"{b} + {a} = {a + b}"
    if kind == 2:
        return f"{a} - {b} = {a - b}"
    if kind == 3:
        return f"{small_a} x {small_b} = {small_a * small_b}"
    if kind == 4:
        return f"{small_a * small_b} / {small_b} = {small_a}"
    if kind == 5:
        return pick(random, (f"{a} plus {b} is {a + b}", f"{a} minus {b} is {a - b}", f"{small_a} times {small_b} is {small_a * small_b}"))
    if kind == 6:
        compared = f"{a} is more than {b}" if a > b else f"{a} is as much as {b}"
        return pick(random, (compared, f"half of {2 * b} is {b}", f"twice {a} is {2 * a}"))
    start, step = number(random, 0, 30), number(random, 1, 9)
    return "count: " + ", ".join(str(start + step * i) for i in range(5))
