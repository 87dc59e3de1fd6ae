"""Each labelled answer's prompt beside the answer of another row, for KTO's estimate of the KL divergence.

Ethayarajh 2024 (arXiv:2402.01306), section 4.1: the reference point is estimated from pairs (x, y') of unrelated prompt and answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import DataError
from tunesmith.core.types import Tokens
from tunesmith.data.dataset import TokenSet
from tunesmith.data.judged import first_trained


def partners(rows: TokenSet, digests: npt.NDArray[np.bytes_], limit: int, where: str) -> Iterator[Tokens]:
    """For each row its prompt with the answer of another, role "mismatched", at most `limit` tokens (cut at the answer's end).

    digests [R]: hashes of the rows' content, in whose order the next row with a different answer is the partner; so nobody has its own
    answer or one equal to it, and the same rows have the same partners wherever they stand. Raises DataError "too_few_rows".
    """
    firsts = [first_trained(row) for row in rows]
    kinds: dict[bytes, int] = {}
    answers = [kinds.setdefault(row.ids[first:].tobytes(), len(kinds)) for row, first in zip(rows, firsts, strict=True)]
    if len(kinds) < 2:
        raise DataError(
            "every row has the same answer, so no row has another one's to be compared with",
            where=where,
            remedy="give rows with different answers, two at least",
            code="too_few_rows",
        )
    order = np.argsort(digests, kind="stable").tolist()
    follows = _next_other([answers[row] for row in order])
    partner = dict(zip(order, (order[place] for place in follows), strict=True))
    for place, row in enumerate(rows):
        other = rows[partner[place]]
        front, behind = firsts[place], firsts[partner[place]]
        ids = np.concatenate([row.ids[:front], other.ids[behind:]])[:limit]
        train = np.concatenate([np.zeros(front, dtype=np.float32), other.train[behind:]])[:limit]
        yield Tokens(ids, train, row.key, row.group, "mismatched")


def _next_other(kinds: list[int]) -> list[int]:
    """For each place the next one, round the end, with another kind."""
    size = len(kinds)
    found = [0] * (2 * size)
    for place in range(2 * size - 2, -1, -1):
        here, after = kinds[place % size], (place + 1) % size
        found[place] = after if kinds[after] != here else found[place + 1]
    return found[:size]
