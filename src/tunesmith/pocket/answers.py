"""The demo's preferences: support questions with a helpful answer against a curt or rude one, written by rules.

Training and held-out rows share the words and no sentence: questions, answers and the order of their sentences come from rules of
their own. Both answers speak of the same things and are equally long on average, so that neither a topic nor a length decides.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

from tunesmith.core.seed import seed_of
from tunesmith.pocket import tickets
from tunesmith.pocket.grammar import Grammar

RULES = Path(__file__).with_name("answers.txt")
APART = 24  # characters that the two answers of a pair differ in length, at most

Split = Literal["train", "test"]
_SIDES = ("good", "bad")
_PARTS = ("feel", "do", "end")


def preference_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows of {"prompt", "chosen", "rejected"}, all different; topics and which answer is the longer one in equal shares."""
    return _rows("train", count, seed)


def held_out_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows whose questions and answers share no sentence with training, in the same form as `preference_rows`."""
    return _rows("test", count, seed)


def labelled_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows of {"prompt", "completion", "label"}, one answer to a question; half of them have the label true.

    They come from the sentences of training, and no question comes twice.
    """
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if place < count // 2 else "rejected"], "label": place < count // 2}
        for place, pair in enumerate(_rows("train", count, seed, "labelled"))
    ]
    return _shuffled(rows, Random(seed_of(seed, "pocket labels")))


def frames(split: Split) -> set[str]:
    """The rules that the rows of a split are written from: layouts and sentences with their slots open."""
    parts = [f"ask.{split}.{topic}" for topic in ("layout", *tickets.CATEGORIES)]
    parts += [f"{side}.{split}.{part}" for side in _SIDES for part in ("layout", *_PARTS)]
    return {line for part in parts for line in rules().rules[part]} | {
        line for part in ("hello", "bye", "context") for line in rules().rules[f"{split}.{part}"]
    }


@cache
def rules() -> Grammar:
    """The grammar of the answers, with the words of the tickets."""
    return Grammar.read(tickets.RULES, RULES)


def _rows(split: Split, count: int, seed: int, name: str = "pairs") -> list[dict[str, Any]]:
    random = Random(seed_of(seed, "pocket answers", name, split))
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < count:
        topic = tickets.CATEGORIES[len(rows) % len(tickets.CATEGORIES)]
        bound = {"thing": rules().write(f"thing.{topic}", random)}
        prompt = _question(split, topic, bound, random)
        if prompt in seen:
            continue
        seen.add(prompt)
        # Every other row of each topic has the longer answer on the helpful side.
        longer = len(rows) // len(tickets.CATEGORIES) % 2 == 0
        chosen, rejected = _answers(split, topic, bound, random, longer=longer)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return _shuffled(rows, random)


def _question(split: Split, topic: str, bound: dict[str, str], random: Random) -> str:
    sentences = {name: rules().write(f"{split}.{name}", random) for name in ("hello", "bye", "context")}
    sentences["question"] = rules().write(f"ask.{split}.{topic}", random, dict(bound))
    return rules().write(f"ask.{split}.layout", random, sentences)


def _answers(split: Split, topic: str, bound: dict[str, str], random: Random, *, longer: bool) -> tuple[str, str]:
    """A helpful answer and another one, the former being the longer one or the shorter one by at most APART characters."""
    while True:
        good, bad = (_answer(split, side, topic, bound, random) for side in _SIDES)
        more = (len(good) - len(bad)) * (1 if longer else -1)
        if 0 < more <= APART:
            return good, bad


def _answer(split: Split, side: str, topic: str, bound: dict[str, str], random: Random) -> str:
    words = {**bound, "act": rules().write(f"act.{topic}", random, dict(bound))}
    sentences = {part: rules().write(f"{side}.{split}.{part}", random, dict(words)) for part in _PARTS}
    return rules().write(f"{side}.{split}.layout", random, sentences)


def _shuffled(rows: list[dict[str, Any]], random: Random) -> list[dict[str, Any]]:
    # Sorting by random keys keeps the order the same in every Python version, which shuffle() does not promise.
    return [row for _, row in sorted(((random.random(), row) for row in rows), key=lambda pair: pair[0])]
