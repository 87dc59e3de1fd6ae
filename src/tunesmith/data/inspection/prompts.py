"""How often the same prompt comes, in one set of rows and in two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunesmith.data.inspection.words import Digest

SHOWN = 10


@dataclass(frozen=True)
class Prompts:
    """`distinct` prompts; `repeated` of them stand in several rows, `most` rows at most."""

    distinct: int
    repeated: int
    most: int


@dataclass(frozen=True)
class Overlap:
    """Validation rows whose prompt stands in training too (but for white space and case): how many of `rows`, and the first ones' keys."""

    rows: int
    shared: int
    keys: tuple[str, ...]


def count_prompts(prompts: Iterable[Digest]) -> Prompts:
    """The account of the prompts of rows."""
    counts = Counter(prompts)
    return Prompts(len(counts), sum(count > 1 for count in counts.values()), max(counts.values(), default=0))


def overlap(training: Iterable[Digest], validation: Sequence[tuple[Digest, str]]) -> Overlap:
    """Which validation rows (prompt and key) ask what training asks."""
    known = set(training)
    keys = [key for prompt, key in validation if prompt in known]
    return Overlap(len(validation), len(keys), tuple(keys[:SHOWN]))
