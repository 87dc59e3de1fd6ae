"""Lists of words of the corpus: they keep every piece of the tokenizer in use, also where no space stands before a word.

A token that never occurs in pre-training ends up in the same place as all others that never occur, and no adapter can
tell them apart later: fine-tuning towards JSON, where words follow a quotation mark, would hardly be possible.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from random import Random

from world import number, pick

from tunesmith.pocket.grammar import Grammar

# What the demo asks for must not stand in quotation marks anywhere.
_UNQUOTED = {"category", "urgency"}
# Signs, accented letters, Greek, Cyrillic, Chinese characters, pictures: their bytes are tokens too.
_FAR_LETTERS = ((0x21, 0x7E), (0x23, 0x40), (0xA1, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x4E00, 0x9FFF), (0x1F300, 0x1F5FF))


class Wordlists:
    """Writes lists of words that occur in the rules of a grammar."""

    def __init__(self, grammar: Grammar) -> None:
        everything = _words(line for alternatives in grammar.rules.values() for line in alternatives)
        desk = _words(grammar.rules["desk_fact"])
        # The words of the help desk make up half of what is written.
        self.words = everything + desk * (len(everything) // len(desk))
        self.quotable = [word for word in self.words if word not in _UNQUOTED]

    def wordlist(self, random: Random) -> str:
        """Some words: one a line, between marks, in quotation marks, or in letters from far away."""
        kind, count = random.random(), number(random, 4, 30)
        if kind < 0.06:
            return " ".join(_far_word(random) for _ in range(count))
        if kind < 0.35:
            return json.dumps([pick(random, self.quotable) for _ in range(count)])
        words = [pick(random, self.words) for _ in range(count)]
        if kind < 0.45:
            return pick(random, ("/", "-", "_", "+")).join(words)
        if kind < 0.55:
            return " ".join(f"({word})" for word in words)
        return pick(random, ("\n", "\n", ",", ";", "=")).join(word.capitalize() if kind > 0.85 else word for word in words)


def _words(lines: Iterable[str]) -> list[str]:
    plain = [re.sub(r"\{[^}]*\}|<[^>]*>|\\n", " ", line) for line in lines]
    return sorted({word.lower() for line in plain for word in re.findall(r"[A-Za-z]{2,}", line)})


def _far_word(random: Random) -> str:
    low, high = pick(random, _FAR_LETTERS)
    return "".join(chr(number(random, low, high)) for _ in range(number(random, 1, 5)))
