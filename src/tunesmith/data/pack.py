"""Rows into bins: best-fit decreasing, and the packed batch that a bin becomes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import BugError
from tunesmith.core.types import Batch, Segment, Tokens


def fit(lengths: Sequence[int] | npt.NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Row numbers in bins of at most `capacity`, by best-fit decreasing; a longer row gets a bin of its own.

    The free spaces are the bits of one integer, so the tightest bin is found by a shift and the lowest set bit (Johnson 1973 for
    the rule). Inside a bin the rows stand in their old order, and equal input gives equal bins.
    """
    if capacity < 1:
        raise ValueError(f"a bin holds at least one token, not {capacity}")
    sizes = np.asarray(lengths, dtype=np.int64)
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # free space -> bins that have exactly that much
    mask = 0  # bit s is set while open_bins[s] is not empty
    for row in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[row])
        tight = mask >> size if size <= capacity else 0
        if tight:
            space = size + (tight & -tight).bit_length() - 1
            place = open_bins[space].pop()
            if not open_bins[space]:
                mask &= ~(1 << space)
            bins[place].append(row)
        else:
            space, place = capacity, len(bins)
            bins.append([row])
        if (left := space - size) > 0:
            open_bins.setdefault(left, []).append(place)
            mask |= 1 << left
    return [sorted(rows) for rows in bins]


def pack(rows: Sequence[Tokens], capacity: int) -> list[Batch]:
    """The rows laid end to end in batches of at most `capacity` tokens; rows of one group stay in one batch.

    A row, or a group, that is longer than the capacity gets a batch of its own.
    """
    units = _units(rows)
    bins = fit([sum(len(rows[i]) for i in unit) for unit in units], capacity)
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
