"""Solutions in steps: how many go wrong, and where."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.core.types import Steps
from tunesmith.data.inspection.prompts import Overlap, Prompts, count_prompts, overlap
from tunesmith.data.inspection.words import prompt_digest

_RIGHT = 0.5  # the least value of a right step


@dataclass(frozen=True)
class StepReport:
    """What `inspect_steps` found in n solutions.

    `steps` is how many they have in all, `fewest` and `most` in one; `wrong` is the share of solutions with a wrong step (a value
    below 0.5), `first_wrong` how often the first wrong one is step 1, 2, ...; `recovered` counts solutions with a right step behind a
    wrong one, which a process reward model that is read up to the first wrong step does not expect.
    """

    n: int
    steps: int
    fewest: int
    most: int
    wrong: float
    first_wrong: dict[int, int]
    recovered: int
    prompts: Prompts
    overlap: Overlap | None


def inspect_steps(rows: Iterable[Steps], validation: Iterable[Steps] | None = None) -> StepReport | None:
    """The report of some solutions; None when there is none."""
    found = list(rows)
    if not found:
        return None
    prompts = [prompt_digest(row.prompt) for row in found]
    marks = [[value >= _RIGHT for value in row.values] for row in found]
    first = Tally(mark.index(False) + 1 for mark in marks if not all(mark))
    return StepReport(
        n=len(found),
        steps=sum(map(len, marks)),
        fewest=min(map(len, marks)),
        most=max(map(len, marks)),
        wrong=first.total() / len(found),
        first_wrong=dict(sorted(first.items())),
        recovered=sum(not all(mark) and any(mark[mark.index(False) :]) for mark in marks),
        prompts=count_prompts(prompts),
        overlap=None if validation is None else overlap(prompts, [(prompt_digest(row.prompt), row.key) for row in validation]),
    )
