"""Labelled answers: balance, KTO's weights for it, prompts with one label alone, contradictions, lengths and overlap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.core.types import Labelled
from tunesmith.data.inspection.lengths import Counter, LengthBias, unpaired_bias
from tunesmith.data.inspection.pairs import counted
from tunesmith.data.inspection.prompts import SHOWN, Overlap, Prompts, count_prompts, overlap
from tunesmith.data.inspection.words import Digest, digest, plain, prompt_digest

GOOD, BAD = 1.0, 0.0


@dataclass(frozen=True)
class Weights:
    """A range for KTO's weight of one label, the other one's being 1."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class LabelReport:
    """What `inspect_labels` found in n answers.

    `scored` counts those with a number instead of a yes or no, whose range is `lowest` to `highest`. `unpaired` is the share of the yes
    and no answers whose prompt has no answer with the other label; `contradicted` counts answers that have both labels.
    """

    n: int
    desirable: int
    undesirable: int
    scored: int
    lowest: float
    highest: float
    unpaired: float
    weights: Weights | None
    characters: LengthBias | None
    tokens: LengthBias | None
    copies: int
    contradicted: int
    contradictions: tuple[tuple[str, str], ...]
    prompts: Prompts
    overlap: Overlap | None


def inspect_labels(
    rows: Iterable[Labelled], validation: Iterable[Labelled] | None = None, count_tokens: Counter | None = None, shown: int = SHOWN
) -> LabelReport | None:
    """The report of some labelled answers; None when there is none. `count_tokens` and `shown` as for `inspect_pairs`."""
    found = list(rows)
    if not found:
        return None
    prompts, texts = [prompt_digest(row.prompt) for row in found], [plain(row.answer) for row in found]
    good, bad = ([place for place, row in enumerate(found) if row.value == value] for value in (GOOD, BAD))
    copies, couples = _repeats(found, prompts, texts)
    both = {prompts[place] for place in good} & {prompts[place] for place in bad}
    yes_or_no = [*good, *bad]
    lengths = [len(text) for text in texts]
    tokens = counted(texts, count_tokens) if count_tokens else None
    return LabelReport(
        n=len(found),
        desirable=len(good),
        undesirable=len(bad),
        scored=len(found) - len(yes_or_no),
        lowest=min(row.value for row in found),
        highest=max(row.value for row in found),
        unpaired=sum(prompts[place] not in both for place in yes_or_no) / len(yes_or_no) if yes_or_no else 0.0,
        weights=recommended_weights(len(good), len(bad)),
        characters=unpaired_bias([lengths[place] for place in good], [lengths[place] for place in bad]) if good and bad else None,
        tokens=unpaired_bias([tokens[place] for place in good], [tokens[place] for place in bad], "tokens")
        if tokens and good and bad
        else None,
        copies=copies,
        contradicted=len({key for couple in couples for key in couple}),
        contradictions=tuple(couples[:shown]),
        prompts=count_prompts(prompts),
        overlap=None if validation is None else overlap(prompts, [(prompt_digest(row.prompt), row.key) for row in validation]),
    )


def recommended_weights(desirable: int, undesirable: int) -> Weights | None:
    """The weight of the rarer label that brings desirable_weight x n over undesirable_weight x n into 1 to 4/3.

    Ethayarajh 2024 (arXiv:2402.01306), section 4.2. None where one label does not occur at all.
    """
    if not desirable or not undesirable:
        return None
    if desirable < undesirable:
        return Weights("desirable_weight", undesirable / desirable, 4 / 3 * undesirable / desirable)
    return Weights("undesirable_weight", 3 / 4 * desirable / undesirable, desirable / undesirable)


def _repeats(rows: list[Labelled], prompts: list[Digest], texts: list[str]) -> tuple[int, list[tuple[str, str]]]:
    """How many labelled answers stand there before with the same label, and the keys of the same answers with different ones."""
    first: dict[tuple[Digest, Digest], dict[float, str]] = {}
    copies, couples = 0, list[tuple[str, str]]()
    for row, prompt, text in zip(rows, prompts, texts, strict=True):
        known = first.setdefault((prompt, digest(text)), {})
        if row.value in known:
            copies += 1
            continue
        if known:
            couples.append((next(iter(known.values())), row.key))
        known[row.value] = row.key
    return copies, couples
