"""Dialogs and running text: how many, how long, and what comes twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tunesmith.core.types import Dialog, Message, Text
from tunesmith.data.inspection.prompts import Overlap, Prompts, count_prompts, overlap
from tunesmith.data.inspection.words import Digest, digest, plain, prompt_digest


@dataclass(frozen=True)
class DialogReport:
    """What `inspect_dialogs` found in n rows: the shortest, the middle and the longest in characters, rows that stand there before, and
    prompts (a dialog's turns before its last; of running text the whole).
    """

    n: int
    turns: int
    shortest: int
    median: float
    longest: int
    copies: int
    prompts: Prompts
    overlap: Overlap | None


def inspect_dialogs(rows: Iterable[Dialog | Text], validation: Iterable[Dialog | Text] | None = None) -> DialogReport | None:
    """The report of some dialogs or texts; None when there is none."""
    found = list(rows)
    if not found:
        return None
    texts = [plain(_turns(row)) for row in found]
    prompts = [_asked(row) for row in found]
    lengths = [len(text) for text in texts]
    return DialogReport(
        n=len(found),
        turns=sum(len(_turns(row)) for row in found),
        shortest=min(lengths),
        median=float(np.median(lengths)),
        longest=max(lengths),
        copies=len(texts) - len(set(map(digest, texts))),
        prompts=count_prompts(prompts),
        overlap=None if validation is None else overlap(prompts, [(_asked(row), row.key) for row in validation]),
    )


def _turns(row: Dialog | Text) -> tuple[Message, ...]:
    return (Message("assistant", row.text),) if isinstance(row, Text) else row.messages


def _asked(row: Dialog | Text) -> Digest:
    turns = _turns(row)
    return prompt_digest(turns[:-1] if isinstance(row, Dialog) and len(turns) > 1 else turns)
