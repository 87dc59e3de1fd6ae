"""How the documents of one forward pass lie: end to end, with what attention needs to keep them apart.

N tokens (with filler at the end, so that few values of N occur: every new one costs a CPU kernels made for it, and memory to keep
them), R rows of the padded buckets, H query heads, K key heads, G = H / K, L width of a bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TAIL = 64  # on a CPU the number of tokens is made a multiple of this
STEP = 16  # widths and heights are multiples of this
BLOCK = 128  # query rows that are done at once: what lies right of a block of rows is never computed
SPREAD = 0.25  # a document shorter than this part of a bucket's width opens a new bucket (its keys would be mostly filler)
FULL = 0.5  # documents whose rows fill less than this part of a block's height open a block of their own
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents whose keys are padded to one `width`; `first` counts documents, `start` padded key rows before it."""

    first: int
    documents: int
    width: int
    start: int


@dataclass(frozen=True, slots=True)
class Block:
    """Query rows `low` to `high` of the documents `first` to `last` of a bucket; `start` counts padded query rows before it."""

    bucket: Bucket
    first: int
    last: int
    low: int
    high: int
    start: int

    @property
    def documents(self) -> int:
        return self.last - self.first

    @property
    def rows(self) -> int:
        return self.high - self.low


@dataclass(frozen=True, eq=False)
class HeadIndex:
    """Row numbers that carry [N * heads, D] to the padded buckets, the way back, and which padded rows are filler.

    The way back starts from one row more than there are padded ones, a row of zeros for the filler tokens. `swapped` and
    `swapped_back` do the same with [N * heads * 2, D / 2], the halves of every row exchanged.
    """

    to_padded: Tensor
    back: Tensor
    filler: Tensor
    heads: int

    @functools.cached_property
    def swapped(self) -> Tensor:
        """Half rows to the padded buckets, exchanged."""
        return _halves(self.to_padded)

    @functools.cached_property
    def swapped_back(self) -> Tensor:
        """Half rows of the padded buckets on their way back, exchanged."""
        return _halves(self.back)


class Layout:
    """Documents end to end, longest first; computed once for a forward pass and shared by all layers.

    `lengths` in descending order, of `real` tokens together; `total` is N. `positions` [N] restarts at 0 with each document.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        if list(lengths) != sorted(lengths, reverse=True):
            raise ValueError("documents lie longest first")
        self.lengths = tuple(int(n) for n in lengths)
        self.device = device
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.real = int(self.starts[-1])
        self.total = -(-self.real // TAIL) * TAIL if device.type == "cpu" else self.real
        # Filler stands at position 0: rotary angles may depend on the largest position in sight.
        places = [*(np.arange(n) for n in self.lengths), np.zeros(self.total - self.real, np.int64)]
        self.positions = torch.from_numpy(np.concatenate(places)).to(device)
        self.spans = tuple((int(s), int(s) + n) for s, n in zip(self.starts, self.lengths, strict=False))
        self.buckets = _buckets(self.lengths)
        self.blocks = _blocks(self.lengths, self.buckets)
        self._queries: dict[tuple[int, int], HeadIndex] = {}
        self._keys: dict[int, HeadIndex] = {}
        self._seen: dict[tuple[int, int], Tensor] = {}
        self._cumulative: Tensor | None = None
        self.kept: dict[Any, Any] = {}  # what layers work out once for all of them, e.g. rotary tables

    @property
    def cumulative(self) -> Tensor:
        """Document boundaries [documents + 1] int32, for kernels that take variable lengths."""
        if self._cumulative is None:
            self._cumulative = torch.from_numpy(self.starts.astype(np.int32)).to(self.device)
        return self._cumulative

    def seen(self, length: int, window: int) -> Tensor:
        """[L, L], true where a query (row) may look at a key (column): not ahead, and less than `window` back (0: any distance)."""
        if (length, window) not in self._seen:
            place = torch.arange(length, device=self.device)
            far = place[:, None] - place[None, :]
            self._seen[length, window] = (far >= 0) & (far < window) if window else far >= 0
        return self._seen[length, window]

    def queries(self, keys: int, group: int) -> HeadIndex:
        """Rows for K key heads with `group` query heads each; inside a block ordered [document, K, G, row]."""
        if (keys, group) not in self._queries:
            parts = [self._rows(b.bucket.first + b.first, b.documents, b.low, b.high, keys * group) for b in self.blocks]
            self._queries[keys, group] = self._index(parts, keys * group)
        return self._queries[keys, group]

    def keys(self, keys: int) -> HeadIndex:
        """Rows for K key heads; inside a bucket ordered [document, K, L]."""
        if keys not in self._keys:
            self._keys[keys] = self._index([self._rows(b.first, b.documents, 0, b.width, keys) for b in self.buckets], keys)
        return self._keys[keys]

    def _rows(self, first: int, count: int, low: int, high: int, heads: int) -> Ints:
        """Source rows of [document, head, row low..high], flat; filler repeats the document's last row r and is written as -1 - r."""
        place = np.arange(low, high)[None, None, :]
        lengths, starts = (np.asarray(a[first : first + count])[:, None, None] for a in (self.lengths, self.starts))
        rows = (starts + np.minimum(place, lengths - 1)) * heads + np.arange(heads)[None, :, None]
        marked: Ints = np.where(place < lengths, rows, -1 - rows).reshape(-1)
        return marked

    def _index(self, parts: list[Ints], heads: int) -> HeadIndex:
        joined = np.concatenate(parts)
        blank = joined < 0
        to_padded = np.where(blank, -1 - joined, joined)
        back = np.full(self.total * heads, len(joined))  # filler tokens get the row behind the last, which is zero
        back[to_padded[~blank]] = np.flatnonzero(~blank)
        arrays = (to_padded, back, np.flatnonzero(blank))
        there, here, filler = (torch.from_numpy(array).to(self.device) for array in arrays)
        return HeadIndex(there, here, filler, heads)


def _halves(rows: Tensor) -> Tensor:
    return torch.stack([rows * 2 + 1, rows * 2], -1).view(-1)


def _buckets(lengths: Sequence[int]) -> list[Bucket]:
    """Neighbours in the descending order of lengths, while the shortest is not much shorter than the longest."""
    buckets: list[Bucket] = []
    i = start = 0
    while i < len(lengths):
        width = -(-lengths[i] // STEP) * STEP
        j = i
        while j < len(lengths) and lengths[j] >= SPREAD * lengths[i]:
            j += 1
        buckets.append(Bucket(i, j - i, width, start))
        start += (j - i) * width
        i = j
    return buckets


def _blocks(lengths: Sequence[int], buckets: Sequence[Bucket]) -> list[Block]:
    """Every bucket cut into blocks of query rows that many documents share; the later rows of a bucket come first."""
    blocks: list[Block] = []
    start = 0
    for bucket in buckets:
        own = lengths[bucket.first : bucket.first + bucket.documents]
        for low in reversed(range(0, bucket.width, BLOCK)):
            left = [min(BLOCK, length - low) for length in own if length > low]
            i = 0
            while i < len(left):
                high = low + -(-left[i] // STEP) * STEP
                j = i
                while j < len(left) and left[j] >= FULL * left[i]:
                    j += 1
                blocks.append(Block(bucket, i, j, low, high, start))
                start += (j - i) * (high - low)
                i = j
    return blocks
