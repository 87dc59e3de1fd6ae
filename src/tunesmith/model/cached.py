"""Keys and values of rows that are being sampled, in slots of doubling width.

A row starts in the narrowest slot that holds it and moves to one twice as wide when it is full, so that at most half of the room of a slot
is idle and rows that are worked on together have similar lengths. The rows of one width lie densely, without gaps: one call of attention
reads them where they stand.
N new tokens, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import BugError
from tunesmith.model import huge_pages

NARROWEST = 64
STEP_BYTES = 4  # behind a key or value in 8 bits, as in cpp/attention.h
FIRST_SLOTS = 4


class Pool:
    """The rows whose slots are `width` wide, densely by place; per layer keys and values [slots, K, width, D].

    `int8`: as `pack` makes them, [.., D + 4].
    """

    def __init__(self, width: int, int8: bool = False) -> None:
        self.width, self.int8 = width, int8
        self.rows: list[int] = []
        self.slots = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._addresses: np.ndarray[Any, Any] | None = None
        self._seen: tuple[int, int, int] = (0, 0, 0)
        self._sights: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, row: int) -> int:
        """The place of a new row."""
        self.rows.append(row)
        if len(self.rows) > self.slots:
            self.slots = max(FIRST_SLOTS, 2 * self.slots)
            self._addresses = None
            for held in (self.keys, self.values):
                for layer, old in held.items():
                    held[layer] = _zeros((self.slots, *old.shape[1:]), old)
                    held[layer][: len(old)] = old
        return len(self.rows) - 1

    def room(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, made when its first tokens [.., heads, width] arrive: only they know heads and widths."""
        if layer not in self.keys:
            for held, like in ((self.keys, key), (self.values, value)):
                *_, heads, width = like.shape
                # Zeros, not chance: what is masked gets weight zero, and zero times NaN would be NaN.
                kind = torch.int8 if self.int8 else like.dtype
                held[layer] = _zeros(
                    (self.slots, heads, self.width, width + (STEP_BYTES if self.int8 else 0)), like.new_empty(0, dtype=kind)
                )
        return self.keys[layer], self.values[layer]

    def addresses(self, layers: Sequence[int], like: Tensor) -> np.ndarray[Any, Any]:
        """Where the keys and the values of each layer begin, [2, layers]; `like` [.., heads, width] as for `room`."""
        if self._addresses is None or self._addresses.shape[1] != len(layers):
            rooms = [self.room(layer, like, like) for layer in layers]
            self._addresses = np.array([[key.data_ptr() for key, _ in rooms], [value.data_ptr() for _, value in rooms]], np.int64)
        return self._addresses

    def sight(self, layer: int, rows: int, seen: int) -> tuple[Tensor, Tensor]:
        """The first `seen` keys and values of the first `rows` rows, as they are kept; made once for the many steps that look the same."""
        if self._seen != (rows, seen, self.slots):
            self._seen, self._sights = (rows, seen, self.slots), {}
        if layer not in self._sights:
            self._sights[layer] = (self.keys[layer][:rows, :, :seen], self.values[layer][:rows, :, :seen])
        return self._sights[layer]

    def copy(self, place: int, other: Pool, from_place: int, count: int) -> None:
        """The first `count` positions of a row of `other` to the row at `place`."""
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, old in theirs.items():
                if layer not in ours:
                    ours[layer] = _zeros((self.slots, old.shape[1], self.width, old.shape[3]), old)
                ours[layer][place, :, :count] = old[from_place, :, :count]

    def bytes(self) -> int:
        """What the slots take."""
        return sum(t.numel() * t.element_size() for held in (self.keys, self.values) for t in held.values())


class Cache:
    """The slots of all rows; a row is known by a number of the caller's. `most` positions at most are held (None: no limit).

    `int8`: keys and values are rounded to 8 bits (`pack`).
    """

    def __init__(self, most: int | None = None, *, int8: bool = False) -> None:
        self.most, self.int8 = most, int8
        self.pools: dict[int, Pool] = {}
        self._at: dict[int, tuple[Pool, int]] = {}

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, row: int) -> bool:
        return row in self._at

    def where(self, row: int) -> tuple[Pool, int]:
        """Pool and place of a row."""
        return self._at[row]

    def held(self) -> int:
        """Positions that are spoken for."""
        return sum(pool.width for pool, _ in self._at.values())

    def fits(self, length: int) -> bool:
        """Whether a new row of this many positions goes in; one row alone always does."""
        return self.most is None or not self._at or self.held() + width_for(length) <= self.most

    def add(self, row: int, length: int) -> None:
        """A slot for a new row that will soon have `length` positions."""
        if row in self._at:
            raise BugError(f"row {row} has a slot already")
        self._put(row, width_for(length))

    def widen(self, row: int, length: int) -> bool:
        """Move the row to a wider slot if `length` positions do not fit into its own; False where there is no room for that."""
        pool, place = self._at[row]
        if length <= pool.width:
            return True
        width = width_for(length)
        if self.most is not None and len(self._at) > 1 and self.held() - pool.width + width > self.most:
            return False
        del self._at[row]
        self._put(row, width)
        wider, at = self._at[row]
        wider.copy(at, pool, place, pool.width)
        self._close_gap(pool, place)
        return True

    def drop(self, row: int, *, clean: bool = False) -> None:
        """Give a row's slot back; the last row of its pool moves into the gap.

        `clean` wipes the slot first. What is left in one is masked for the next row there, which infinity and NaN survive.
        """
        pool, place = self._at.pop(row)
        if clean:
            for held in (*pool.keys.values(), *pool.values.values()):
                held[place].zero_()
        self._close_gap(pool, place)

    def share(self, row: int, other: int, count: int) -> None:
        """Give `row` the first `count` positions of another row."""
        (pool, place), (theirs, from_place) = self._at[row], self._at[other]
        pool.copy(place, theirs, from_place, count)

    def take(self, row: int, count: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Copies of the row's first `count` positions, by layer."""
        pool, place = self._at[row]
        return {layer: (pool.keys[layer][place, :, :count].clone(), pool.values[layer][place, :, :count].clone()) for layer in pool.keys}

    def give(self, row: int, kept: dict[int, tuple[Tensor, Tensor]], count: int) -> None:
        """Put the first `count` positions of what `take` gave into a row."""
        pool, place = self._at[row]
        for layer, parts in kept.items():
            for held, new in zip((pool.keys, pool.values), parts, strict=True):
                if layer not in held:
                    held[layer] = _zeros((pool.slots, new.shape[0], pool.width, new.shape[2]), new)
                held[layer][place, :, :count] = new[:, :count]

    def bytes(self) -> int:
        """What all slots take."""
        return sum(pool.bytes() for pool in self.pools.values())

    def _put(self, row: int, width: int) -> None:
        pool = self.pools.setdefault(width, Pool(width, self.int8))
        self._at[row] = (pool, pool.add(row))

    def _close_gap(self, pool: Pool, place: int) -> None:
        last = len(pool.rows) - 1
        if place != last:
            moved = pool.rows[last]
            pool.copy(place, pool, last, pool.width)
            pool.rows[place] = moved
            self._at[moved] = (pool, place)
        pool.rows.pop()
        if not pool.rows:
            del self.pools[pool.width]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return huge_pages.CACHE.empty(shape, like.dtype).zero_() if like.is_cpu else like.new_zeros(shape)


def pack(numbers: Tensor) -> Tensor:
    """Keys or values [.., D] in 8 bits, and behind them the four bytes of their step: [.., D + 4]; a step is the largest one over 127."""
    numbers = numbers.float()
    step = (numbers.abs().amax(-1, keepdim=True) / 127).clamp_min_(1e-30)
    seen = step.reshape(-1).view(torch.int8).view(*step.shape[:-1], STEP_BYTES)
    return torch.cat([(numbers / step).round_().to(torch.int8), seen], -1)


def unpack(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack` made, as numbers again: [.., D]."""
    step = kept[..., -STEP_BYTES:].reshape(-1).view(torch.float32).view(*kept.shape[:-1], 1)
    return (kept[..., :-STEP_BYTES] * step).to(dtype)


def width_for(length: int) -> int:
    """The width of the slot for so many positions: the next power of two."""
    return max(NARROWEST, 1 << (length - 1).bit_length())
