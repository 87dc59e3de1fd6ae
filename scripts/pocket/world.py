"""The small world of the corpus: its towns and people, which never change, and truths about things as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

from tunesmith.pocket.grammar import Grammar

Bound = dict[str, str]
Item = TypeVar("Item")


def pick(random: Random, items: Sequence[Item]) -> Item:
    """One item of a sequence."""
    # random() alone is promised to give the same stream in every Python version.
    return items[int(random.random() * len(items))]


def number(random: Random, low: int, high: int) -> int:
    """A whole number, both ends included."""
    return low + int(random.random() * (high - low + 1))


class World:
    """Towns, people and truths that do not change from document to document."""

    def __init__(self, grammar: Grammar, seed: int = 0) -> None:
        random = Random(seed)
        self.grammar = grammar
        self.words = Grammar.read(Path(__file__).with_name("tables.txt")).rules
        self.rows = {name: [row.split(", ") for row in rows] for name, rows in self.words.items()}
        names = [head + tail for head in self.words["town_heads"] for tail in self.words["town_tails"] if random.random() < 0.4]
        self.towns = [self._town(name, names, random) for name in names]
        self.people = [self._person(random) for _ in range(400)]

    def _town(self, name: str, names: list[str], random: Random) -> Bound:
        words = self.words
        near = pick(random, [other for other in names if other != name])
        flag_a, flag_b = pick(random, self.rows["flags"])
        year = number(random, 900, 1799)
        people = pick(random, [f"{number(random, 2, 91)} thousand", f"{number(random, 2, 9)} hundred"])
        mayor = self._full_name(random)
        since, miles = number(random, 1985, 2024), number(random, 3, 97)
        return {
            "town": name, "river": pick(random, words["rivers"]), "region": pick(random, words["regions"]), "people": people,
            "year": str(year), "mayor": mayor, "trade": pick(random, words["trades"]), "since": str(since), "next": near,
            "miles": str(miles), "flag_a": flag_a, "flag_b": flag_b,
        }  # fmt: skip

    def _person(self, random: Random) -> Bound:
        rule = self.grammar.write
        hobby = rule("hobby", random)
        return {
            "full": self._full_name(random), "town": pick(random, self.towns)["town"], "work": rule("job", random),
            "born": str(number(random, 1930, 2004)), "month": rule("month", random), "pet": rule("pet", random),
            "pet_name": pick(random, self.words["pet_names"]), "hobby": hobby, "hobby_to": f"to the club for {hobby}",
            "food": rule("food", random), "color": rule("color", random),
        }  # fmt: skip

    def _full_name(self, random: Random) -> str:
        return f"{self.grammar.write('name', random)} {pick(random, self.words['surnames'])}"

    def fact(self, random: Random) -> str:
        """A few sentences about a town, a person, the help desk, or things as they are everywhere."""
        choice = random.random()
        if choice < 0.35:
            return self.grammar.write("town_facts", random, dict(pick(random, self.towns)))
        if choice < 0.7:
            return self.grammar.write("person_facts", random, dict(pick(random, self.people)))
        if choice < 0.76:
            return self.grammar.write("desk_facts", random)
        return self.grammar.write("true_facts", random, self._truth(random))

    def _truth(self, random: Random) -> Bound:
        rows = self.rows
        beast, legs, habitat, eats = pick(random, rows["beasts"])
        this, that = pick(random, rows["opposites"])[:: pick(random, (1, -1))]
        day, month = number(random, 0, 6), number(random, 0, 11)
        goods, source = pick(random, rows["goods"])
        worker, does = pick(random, rows["workers"])
        month_now, month_days = rows["months"][month]
        return {
            "beast": beast, "beast_up": beast.capitalize(), "legs": legs, "habitat": habitat, "eats": eats, "eats_up": eats.capitalize(),
            "this": this, "that": that, "this_up": this.capitalize(), "day": self.words["days"][day],
            "day_next": self.words["days"][(day + 1) % 7], "month_now": month_now, "month_next": rows["months"][(month + 1) % 12][0],
            "month_days": month_days, "goods": goods, "goods_up": goods.capitalize(), "from": source, "worker": worker, "does": does,
        }  # fmt: skip
