"""JSON records of the corpus; none has the keys that the demo asks for."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from world import World, number, pick

Record = dict[str, Any]


class Records:
    """Writes records of ten kinds about the world and its things."""

    def __init__(self, world: World) -> None:
        self.world, self.write = world, world.grammar.write
        self.kinds = (
            self._desk, self._weather, self._person, self._product, self._order,
            self._event, self._animal, self._dish, self._settings, self._town,
        )  # fmt: skip

    def record(self, random: Random) -> str:
        """One record or a list of two, on one line or indented."""
        value: Record | list[Record] = pick(random, self.kinds)(random)
        if random.random() < 0.2:
            value = [value, pick(random, self.kinds)(random)]
        return json.dumps(value, indent=pick(random, (None, None, None, 2)))

    def _words(self, random: Random, **rules: str) -> Record:
        return {key: self.write(rule, random) for key, rule in rules.items()}

    def _desk(self, random: Random) -> Record:
        desk = pick(random, ("billing", "login", "shipping", "bug", "refund", "account", "press", "sales"))
        return {"desk": desk, **self._words(random, head="person"), "phone": number(random, 100, 999), "open": _yes(random)}

    def _weather(self, random: Random) -> Record:
        wind = self._words(random, place="place") | {"wind": pick(random, ("low", "medium", "high")), "degrees": number(random, -9, 35)}
        return wind | self._words(random, day="weekday")

    def _person(self, random: Random) -> Record:
        person = pick(random, self.world.people)
        return {"name": person["full"], "town": person["town"], "job": person["work"], "born": int(person["born"])}

    def _product(self, random: Random) -> Record:
        return self._words(random, product="product", color="color") | {"price": number(random, 2, 99), "in_stock": _yes(random)}

    def _order(self, random: Random) -> Record:
        items = [self._words(random, item="thing") | {"count": number(random, 1, 9)} for _ in range(number(random, 1, 3))]
        return {"order": number(random, 1000, 9999), "items": items, **self._words(random, day="weekday")}

    def _event(self, random: Random) -> Record:
        return self._words(random, title="hobby", place="place", month="month") | {"guests": number(random, 2, 80)}

    def _animal(self, random: Random) -> Record:
        words = self._words(random, animal="animal", size="size")
        return words | {"colors": [self.write("color", random), self.write("color", random)], "tame": _yes(random)}

    def _dish(self, random: Random) -> Record:
        needs = self._words(random, dish="food")
        return needs | {"needs": [self.write("fruit", random), self.write("drink", random)], "minutes": number(random, 5, 90)}

    def _settings(self, random: Random) -> Record:
        language = pick(random, ("en", "de", "fr", "es", "it"))
        return {"language": language, **self._words(random, theme="color"), "volume": number(random, 0, 100), "mute": _yes(random)}

    def _town(self, random: Random) -> Record:
        town = pick(random, self.world.towns)
        return {"town": town["town"], "river": town["river"], "founded": int(town["year"]), "mayor": town["mayor"]}


def _yes(random: Random) -> bool:
    return random.random() < 0.5
