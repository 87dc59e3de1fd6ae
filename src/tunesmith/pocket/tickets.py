"""The demo's data: support tickets and their labels, written by rules.

A ticket is a problem of one category and a sentence about how much it presses. Training and test share the words
(what is broken, by when) and no sentence: greetings, problems, urgency, sign-offs and their order come from rules
of their own, so that a right answer on the test is more than a remembered one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

from tunesmith.core.seed import seed_of
from tunesmith.pocket.grammar import Grammar

CATEGORIES = ("billing", "login", "shipping", "bug", "refund", "account")
URGENCIES = ("low", "medium", "high")
RULES = Path(__file__).with_name("tickets.txt")
SYSTEM = "Give the category and the urgency of the ticket as JSON."

Split = Literal["train", "test"]
_PARTS = ("layout", "hello", "bye", "context", *CATEGORIES, *URGENCIES)


def training_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """`n` labelled tickets as rows of messages (system, user, assistant), categories and urgencies in equal shares."""
    return _rows("train", n, seed)


def test_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """`n` labelled tickets whose sentences never occur in training, in the same form as `training_rows`."""
    return _rows("test", n, seed)


def frames(split: Split) -> set[str]:
    """The rules that the tickets of a split are written from: layouts and sentences with their slots open."""
    return {line for part in _PARTS for line in rules().rules[f"{split}.{part}"]}


@cache
def rules() -> Grammar:
    """The grammar of the tickets; the pre-training corpus borrows its words, not its sentences."""
    return Grammar.read(RULES)


def _rows(split: Split, n: int, seed: int) -> list[dict[str, Any]]:
    random = Random(seed_of(seed, "pocket tickets", split))
    labels = [(category, urgency) for category in CATEGORIES for urgency in URGENCIES]
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < n:
        category, urgency = labels[len(rows) % len(labels)]
        text = _ticket(split, category, urgency, random)
        if text not in seen:
            seen.add(text)
            rows.append(_row(text, category, urgency))
    # Sorting by random keys keeps the order the same in every Python version, which shuffle() does not promise.
    return [row for _, row in sorted(((random.random(), row) for row in rows), key=lambda pair: pair[0])]


def _ticket(split: Split, category: str, urgency: str, random: Random) -> str:
    grammar = rules()
    sentences = {name: grammar.write(f"{split}.{name}", random) for name in ("hello", "bye", "context")}
    sentences["problem"] = grammar.write(f"{split}.{category}", random)
    sentences["urgency"] = grammar.write(f"{split}.{urgency}", random)
    return grammar.write(f"{split}.layout", random, sentences)


def _row(text: str, category: str, urgency: str) -> dict[str, Any]:
    answer = json.dumps({"category": category, "urgency": urgency})
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
    }
