"""Rows into bins: best-fit decreasing, and the packed batch that a bin becomes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import BugError
from tunesmith.core.groups import common_front
from tunesmith.core.types import Batch, Segment, Tokens

_BITS = 10  # free spaces are kept in blocks of 2 ** 10 bits
_MASK = (1 << _BITS) - 1


def fit(lengths: Sequence[int] | npt.NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Row numbers in bins of at most `capacity`, by best-fit decreasing; a longer row gets a bin of its own.

    The free spaces are bits, so the tightest bin is found by a shift and the lowest set bit (Johnson 1973 for the rule); in two
    levels, so that a large capacity costs no more. Inside a bin the rows stand in their old order, and equal input gives equal bins.
    """
    if capacity < 1:
        raise ValueError(f"a bin holds at least one token, not {capacity}")
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # free space -> bins that have exactly that much
    low = [0] * ((capacity >> _BITS) + 1)  # bit s of low[b] is set while open_bins[(b << _BITS) + s] is not empty
    high = 0  # bit b is set while low[b] is not 0
    for row, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        block = size >> _BITS
        tight = low[block] >> (size & _MASK) if size <= capacity else 0
        if tight:
            space = size + (tight & -tight).bit_length() - 1
        elif size <= capacity and (above := high >> (block + 1)):
            block += (above & -above).bit_length()
            space = (block << _BITS) + (low[block] & -low[block]).bit_length() - 1
        else:
            space = capacity
        if space in open_bins:
            places = open_bins[space]
            place = places.pop()
            bins[place].append(row)
            if not places:
                del open_bins[space]
                low[block] &= ~(1 << (space & _MASK))
                high &= ~(1 << block) if not low[block] else -1
        else:
            place = len(bins)
            bins.append([row])
        if (left := space - size) > 0:
            open_bins.setdefault(left, []).append(place)
            low[left >> _BITS] |= 1 << (left & _MASK)
            high |= 1 << (left >> _BITS)
    return [sorted(rows) for rows in bins]


def pack(rows: Sequence[Tokens], capacity: int, *, sharing: bool = False) -> list[Batch]:
    """The rows laid end to end in batches of at most `capacity` tokens; rows of one group stay in one batch.

    A row, or a group, that is longer than the capacity gets a batch of its own. With `sharing`, what the rows of a group begin
    with alike counts once.
    """
    units = _units(rows)
    sizes = [sum(len(rows[i]) for i in unit) for unit in units]
    if sharing:
        sizes = [
            size - (len(unit) - 1) * common_front([rows[i].ids for i in unit]) if len(unit) > 1 else size
            for size, unit in zip(sizes, units, strict=True)
        ]
    bins = fit(sizes, capacity)
    return [join([rows[i] for place in places for i in units[place]]) for places in bins]


def join(rows: Sequence[Tokens]) -> Batch:
    """One batch of these rows in this order. Raises BugError when they do not carry the same streams."""
    names = set(rows[0].streams)
    if any(set(row.streams) != names for row in rows):
        raise BugError("rows with different streams in one batch", where=rows[0].key)
    segments, start = [], 0
    for row in rows:
        segments.append(Segment(start, start + len(row), row.key, row.group, row.role))
        start += len(row)
    return Batch(
        ids=np.concatenate([row.ids for row in rows]),
        train=np.concatenate([row.train for row in rows]),
        segments=tuple(segments),
        streams={name: np.concatenate([row.streams[name] for row in rows]) for name in sorted(names)},
    )


def _units(rows: Sequence[Tokens]) -> list[list[int]]:
    units: list[list[int]] = []
    by_group: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if not row.group:
            units.append([place])
        elif row.group in by_group:
            by_group[row.group].append(place)
        else:
            by_group[row.group] = [place]
            units.append(by_group[row.group])
    return units
