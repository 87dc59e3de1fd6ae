"""Preference pairs: length bias, answers alike, copies, contradictions, overlap with validation, and pairs that may be labelled wrong."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.core.types import Pair
from tunesmith.data.inspection.lengths import Counter, LengthBias, paired_bias
from tunesmith.data.inspection.prompts import SHOWN, Overlap, Prompts, count_prompts, overlap
from tunesmith.data.inspection.suspects import Suspect, suspect
from tunesmith.data.inspection.words import Digest, digest, plain, prompt_digest

_AT_ONCE = 2000  # texts that a tokenizer is given together


@dataclass(frozen=True)
class PairReport:
    """What `inspect_pairs` found in n pairs.

    `margins` counts pairs with a margin; `alike` those whose answers differ in white space or case alone; `copies` pairs that stand there
    before, `contradicted` pairs of which the reverse stands there too, as (key, key) for the first; `suspicious` counts all suspects, of
    which the worst are listed.
    """

    n: int
    margins: int
    characters: LengthBias
    tokens: LengthBias | None
    alike: int
    copies: int
    contradicted: int
    contradictions: tuple[tuple[str, str], ...]
    prompts: Prompts
    suspicious: int
    suspects: tuple[Suspect, ...]
    overlap: Overlap | None


def inspect_pairs(
    pairs: Iterable[Pair], validation: Iterable[Pair] | None = None, count_tokens: Counter | None = None, shown: int = SHOWN
) -> PairReport | None:
    """The report of some pairs; None when there is none.

    `count_tokens` gives the number of tokens of each of some texts; `shown` is how many suspects and contradictions are listed.
    """
    rows = list(pairs)
    if not rows:
        return None
    chosen, rejected = [plain(pair.chosen) for pair in rows], [plain(pair.rejected) for pair in rows]
    prompts = [prompt_digest(pair.prompt) for pair in rows]
    sides = [(digest(good), digest(bad)) for good, bad in zip(chosen, rejected, strict=True)]
    copies, couples = _repeats(rows, prompts, sides)
    found = {pair.key: odd for pair, *both in zip(rows, chosen, rejected, strict=True) if (odd := suspect(pair.key, *both))}
    for key, other in couples:
        for name, reverse in ((key, other), (other, key)):
            found[name] = Suspect(name, 1.0, f"{reverse} prefers the other answer")
    return PairReport(
        n=len(rows),
        margins=sum(pair.margin is not None for pair in rows),
        characters=paired_bias([len(text) for text in chosen], [len(text) for text in rejected]),
        tokens=paired_bias(counted(chosen, count_tokens), counted(rejected, count_tokens), "tokens") if count_tokens else None,
        alike=sum(good == bad for good, bad in sides),
        copies=copies,
        contradicted=len({key for couple in couples for key in couple}),
        contradictions=tuple(couples[:shown]),
        prompts=count_prompts(prompts),
        suspicious=len(found),
        suspects=tuple(heapq.nsmallest(shown, found.values(), key=lambda odd: -odd.score)),
        overlap=None if validation is None else overlap(prompts, [(prompt_digest(pair.prompt), pair.key) for pair in validation]),
    )


def counted(texts: list[str], count_tokens: Counter) -> list[int]:
    """The number of tokens of each text."""
    return [count for start in range(0, len(texts), _AT_ONCE) for count in count_tokens(texts[start : start + _AT_ONCE])]


def _repeats(rows: list[Pair], prompts: list[Digest], sides: list[tuple[Digest, Digest]]) -> tuple[int, list[tuple[str, str]]]:
    """How many pairs stand there before, and the keys of pairs that prefer opposite answers: the first of each way."""
    first: dict[tuple[Digest, Digest, Digest], str] = {}
    copies, couples = 0, list[tuple[str, str]]()
    for pair, prompt, (good, bad) in zip(rows, prompts, sides, strict=True):
        if (prompt, good, bad) in first:
            copies += 1
            continue
        first[prompt, good, bad] = pair.key
        if good != bad and (reverse := first.get((prompt, bad, good))) is not None:
            couples.append((reverse, pair.key))
    return copies, couples
