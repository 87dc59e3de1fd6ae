"""Sentences from rules: a small grammar in a text file, expanded with a seeded random generator.

A rules file holds sections. `[fruit]` opens the rule `fruit`; every line below is one alternative, and ` | ` divides
several on a line. `-` alone is the empty alternative, `#` opens a comment line, `\\n` is a line break. Inside:

    {fruit}       any alternative of the rule, expanded in turn
    {fruit@x}     the same, remembered as x: the next {fruit@x} of the document repeats it
    {@x}          what is remembered as x
    {3..9}        a whole number, both ends included; {3..9@n} is remembered
    {^...}        the first letter in upper case

The article "a" becomes "an" before a vowel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

_SLOT = re.compile(r"\{(\^?)([a-z_.]*|\d+\.\.\d+)(?:@([a-z_]+))?\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[AEIOUaeiou](?!ser\b|ne\b))")
_BREAKS = re.compile(r" *\n *")
_SPACES = re.compile(r" {2,}")


@dataclass(frozen=True, slots=True)
class _Slot:
    upper: bool
    rule: str
    name: str
    low: int = 0
    high: int = -1


_Parts = tuple[str | _Slot, ...]


class Grammar:
    """Rules by name; `write` expands one of them. Raises KeyError at once when a rule names another that is not there."""

    def __init__(self, rules: dict[str, list[str]]) -> None:
        self.rules = rules
        self._compiled: dict[str, tuple[_Parts, ...]] = {name: tuple(map(_compile, lines)) for name, lines in rules.items()}
        for name, alternatives in self._compiled.items():
            for part in (part for parts in alternatives for part in parts):
                if isinstance(part, _Slot) and part.high < 0 and part.rule and part.rule not in rules:
                    raise KeyError(f"the rule '{name}' uses '{part.rule}', which is not defined")

    @classmethod
    def read(cls, *paths: Path) -> Grammar:
        """The rules of several files together. Raises ValueError when a rule is defined twice or a line stands outside one."""
        rules: dict[str, list[str]] = {}
        for path in paths:
            for name, lines in _sections(path):
                if name in rules:
                    raise ValueError(f"{path}: the rule '{name}' is defined twice")
                rules[name] = lines
        return cls(rules)

    def write(self, rule: str, random: Random, bound: dict[str, str] | None = None) -> str:
        """One expansion of `rule`; `bound` holds remembered words and is added to."""
        out: list[str] = []
        self._expand(rule, random, {} if bound is None else bound, out)
        text = _ARTICLE.sub(r"\1n ", "".join(out))
        return _SPACES.sub(" ", _BREAKS.sub("\n", text)).strip()

    def _expand(self, rule: str, random: Random, bound: dict[str, str], out: list[str]) -> None:
        alternatives = self._compiled[rule]
        # random() alone is promised to give the same stream in every Python version; choice() is not.
        for part in alternatives[int(random.random() * len(alternatives))]:
            if isinstance(part, str):
                out.append(part)
                continue
            words = self._slot(part, random, bound)
            out.append(words[:1].upper() + words[1:] if part.upper else words)

    def _slot(self, slot: _Slot, random: Random, bound: dict[str, str]) -> str:
        if slot.name and slot.name in bound:
            return bound[slot.name]
        if slot.high >= 0:
            words = str(slot.low + int(random.random() * (slot.high - slot.low + 1)))
        else:
            pieces: list[str] = []
            self._expand(slot.rule, random, bound, pieces)
            words = "".join(pieces)
        if slot.name:
            bound[slot.name] = words
        return words


def _sections(path: Path) -> Iterable[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            if name:
                yield name, lines
            name, lines = line[1:-1], []
        elif not name:
            raise ValueError(f"{path}: '{line}' stands before the first rule")
        else:
            lines += ["" if part.strip() == "-" else part.strip() for part in line.split(" | ")]
    if name:
        yield name, lines


def _compile(line: str) -> _Parts:
    line = line.replace("\\n", "\n")
    parts: list[str | _Slot] = []
    last = 0
    for match in _SLOT.finditer(line):
        if match.start() > last:
            parts.append(line[last : match.start()])
        upper, rule, name = match[1] == "^", match[2], match[3] or ""
        low, dots, high = rule.partition("..")
        if dots and low.isdigit():
            parts.append(_Slot(upper, "", name, int(low), int(high)))
        else:
            parts.append(_Slot(upper, rule, name))
        last = match.end()
    if last < len(line):
        parts.append(line[last:])
    return tuple(parts)
