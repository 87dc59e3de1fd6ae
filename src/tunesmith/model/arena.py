"""Keys and values of rows that are being sampled, in one piece of memory a layer: what variable-length attention on a GPU reads.

Every row has a span of its own, as wide as a power of two, and one call of attention reads all rows, however long each is: it is told where
spans begin and how much of each is in use. The numbers that say so live on the device, so that a recorded step (`graphs.py`) finds them
there. K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tunesmith.core.errors import BugError
from tunesmith.model.cached import NARROWEST, width_for

FIRST = 1024  # positions to begin with


class Spans:
    """Where spans of powers of two lie on a line of `size` positions that grows, at most to `most` (None: without end).

    A free span and the one it was split from are joined again (Knuth's buddy system), so that every span begins at a multiple of its width.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self.size = most, 0
        self._free: dict[int, set[int]] = {}

    def take(self, width: int, *, beyond: bool = False) -> int | None:
        """The beginning of a new span; None where the line has no room. `beyond`: let it grow past `most`."""
        while not any(self._free.get(free) for free in self._wider(width)):
            more = next(self._growth(beyond=beyond), None)
            if more is None or not (beyond or self.can_take(width)):
                return None
            self.size += more
            self.give(self.size - more, more)
        free = next(free for free in self._wider(width) if self._free.get(free))
        start = min(self._free[free])
        self._free[free].remove(start)
        while free > width:
            free //= 2
            self._free.setdefault(free, set()).add(start + free)
        return start

    def can_take(self, width: int) -> bool:
        """Whether `take` finds room."""
        return any(self._free.get(free) for free in self._wider(width)) or any(block >= width for block in self._growth())

    def widen(self, start: int, width: int) -> bool:
        """Make a span twice as wide where it stands, if what follows is free."""
        behind = self._free.get(width, set())
        if start % (2 * width) or start + width not in behind:
            return False
        behind.remove(start + width)
        return True

    def give(self, start: int, width: int) -> None:
        """Take a span back."""
        while (other := start ^ width) in self._free.get(width, ()):
            self._free[width].remove(other)
            start, width = min(start, other), 2 * width
        self._free.setdefault(width, set()).add(start)

    def _wider(self, width: int) -> Iterator[int]:
        return iter(sorted(free for free in self._free if free >= width))

    def _growth(self, *, beyond: bool = False) -> Iterator[int]:
        """The blocks that the line would grow by, one after the other: each doubles it, the last ones fill it up to `most`."""
        size = self.size
        while True:
            block = size & -size or FIRST  # doubles a whole line; one that was filled up goes on by what keeps spans at multiples
            if self.most is not None and size + block > self.most and not beyond:
                room = self.most - size
                if room < NARROWEST:
                    return
                block = 1 << (room.bit_length() - 1)
                while size % block:  # a span begins at a multiple of its width
                    block //= 2
            yield block
            size += block


class Arena:
    """Spans of all rows; a row is known by a number of the caller's. `most` positions at most are held (None: no limit).

    `grown` counts how often keys and values moved to another place in memory. Behind all spans are `NARROWEST` positions that belong to no
    row, from `nowhere` on: there goes what stands in for rows that a recorded step does not have.
    """

    int8 = False

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.grown = 0
        self._spans = Spans(most)
        self._at: dict[int, tuple[int, int]] = {}
        self.nowhere = 0

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, row: int) -> bool:
        return row in self._at

    @property
    def rows(self) -> list[int]:
        """The rows, in the order of their spans."""
        return sorted(self._at, key=lambda row: self._at[row])

    def where(self, row: int) -> tuple[int, int]:
        """Beginning and width of a row's span."""
        return self._at[row]

    def held(self) -> int:
        """Positions that are spoken for."""
        return sum(width for _, width in self._at.values())

    def fits(self, length: int) -> bool:
        """Whether a new row of this many positions goes in; one row alone always does."""
        width = width_for(length)
        within = self.most is None or self.held() + width <= self.most
        return not self._at or (within and self._spans.can_take(width))

    def add(self, row: int, length: int) -> None:
        """A span for a new row that will soon have `length` positions."""
        if row in self._at:
            raise BugError(f"row {row} has a span already")
        start = self._take(width_for(length), beyond=not self._at)
        if start is None:
            raise BugError(f"row {row} has no room; ask `fits` first")
        self._at[row] = start, width_for(length)

    def widen(self, row: int, length: int) -> bool:
        """Give the row a wider span if `length` positions do not fit into its own; False where there is no room for that."""
        start, width = self._at[row]
        wanted = width_for(length)
        if wanted <= width:
            return True
        alone = len(self._at) == 1
        if not alone and self.most is not None and self.held() - width + wanted > self.most:
            return False
        if wanted == 2 * width and self._spans.widen(start, width):
            self._at[row] = start, wanted
            return True
        new = self._take(wanted, beyond=alone)
        if new is None:
            return False
        self._copy(start, new, width)
        self._spans.give(start, width)
        self._at[row] = new, wanted
        return True

    def drop(self, row: int, *, clean: bool = False) -> None:
        """Give a row's span back. `clean` wipes it first: what is left there is masked for the next row, which infinity and NaN survive."""
        start, width = self._at.pop(row)
        if clean:
            for held in (*self.keys.values(), *self.values.values()):
                held.narrow(0, start, width).zero_()
        self._spans.give(start, width)

    def share(self, row: int, other: int, count: int) -> None:
        """Give `row` the first `count` positions of another row."""
        self._copy(self._at[other][0], self._at[row][0], count)

    def take(self, row: int, count: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Copies of the row's first `count` positions, by layer."""
        start, _ = self._at[row]
        return {
            layer: (keys.narrow(0, start, count).clone(), self.values[layer].narrow(0, start, count).clone())
            for layer, keys in self.keys.items()
        }

    def give(self, row: int, kept: dict[int, tuple[Tensor, Tensor]], count: int) -> None:
        """Put the first `count` positions of what `take` gave into a row."""
        start, _ = self._at[row]
        for layer, (keys, values) in kept.items():
            for held, new in zip(self.room(layer, keys, values), (keys, values), strict=True):
                held.narrow(0, start, count).copy_(new.narrow(0, 0, count))

    def room(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values [positions, K, D], made when its first tokens [.., K, D] arrive: only they know heads and widths."""
        if layer not in self.keys:
            made = [like.new_zeros(self.nowhere + NARROWEST, *like.shape[-2:]) for like in (key, value)]
            self.keys[layer], self.values[layer] = made  # both or none
        return self.keys[layer], self.values[layer]

    def bytes(self) -> int:
        """What all spans take, free ones among them."""
        return sum(t.numel() * t.element_size() for held in (self.keys, self.values) for t in held.values())

    def _take(self, width: int, *, beyond: bool) -> int | None:
        start = self._spans.take(width, beyond=beyond)
        if start is not None and start + width > self.nowhere:
            try:
                self._grow()
            except BaseException:  # no memory: the next one that lies there tries again
                self._spans.give(start, width)
                raise
        return start

    def _grow(self) -> None:
        """Make keys and values as long as the line has become. Left half-way the rows are as they were."""
        self.grown += 1
        for held in (self.keys, self.values):
            for layer, old in held.items():
                if len(old) < self._spans.size + NARROWEST:
                    new = old.new_zeros(self._spans.size + NARROWEST, *old.shape[1:])
                    new.narrow(0, 0, self.nowhere).copy_(old.narrow(0, 0, self.nowhere))
                    held[layer] = new
        self.nowhere = self._spans.size

    def _copy(self, start: int, to: int, count: int) -> None:
        for held in (*self.keys.values(), *self.values.values()):
            held.narrow(0, to, count).copy_(held.narrow(0, start, count))
