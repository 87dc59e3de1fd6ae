"""How the documents of one forward pass lie: end to end, with what attention needs to keep them apart.

A document may be a tree: a front of P tokens, the rest of a first row, and the tails of further rows. Every tail continues the front and
sees neither the first row's rest nor the other tails: those keys are hidden from it. As all tails lie behind the front, a tree is a
causal document but for these rectangles, and for its positions, which go on from P in every tail.

N tokens (with filler at the end, so that few values of N occur: every new one costs a CPU kernels made for it, and memory to keep
them), R rows of the padded buckets, H query heads, K key heads, G = H / K, L width of a bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TAIL, OWN_TAIL = 64, 16  # on a CPU the number of tokens is made a multiple of this, of the second where the layers' products are ours
STEP = 16  # widths and heights are multiples of this
BLOCK = 128  # query rows that are done at once: what lies right of a block of rows is never computed
SPREAD = 0.25  # a document shorter than this part of a bucket's width opens a new bucket (its keys would be mostly filler)
MOST_READ = 0.9  # where more of the tokens are read in the end than this part, the last layer does all
FULL = 0.5  # documents whose rows fill less than this part of a block's height open a block of their own
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents whose keys are padded to one `width`; `first` counts documents, `start` padded key rows before it."""

    first: int
    documents: int
    width: int
    start: int


class Hidden(NamedTuple):
    """Keys `left` to `right` that the query rows `top` to `bottom` of the `document`-th of a block do not see."""

    document: int
    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class Block:
    """Query rows `low` to `high` of the documents `first` to `last` of a bucket; `start` counts padded query rows before it.

    `hidden` counts rows from the block's first one and keys from the document's first one.
    """

    bucket: Bucket
    first: int
    last: int
    low: int
    high: int
    start: int
    hidden: tuple[Hidden, ...] = ()

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


@dataclass(frozen=True, eq=False)
class Runs:
    """Boundaries [runs + 1] int32 of query rows and of key rows, the longest of each, and the key rows [.] (None: as they stand)."""

    ends: Tensor
    key_ends: Tensor
    longest: int
    longest_keys: int
    keys: Tensor | None


class Layout:
    """Documents end to end, longest first; computed once for a forward pass and shared by all layers.

    `lengths` in descending order, of `real` tokens together; `total` is N. `trees`: number of a document -> (P, where its tails begin).
    `positions` [N] restarts at 0 with each document and at P with each tail; `longest` is the number of different positions.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        trees: Mapping[int, tuple[int, Sequence[int]]] | None = None,
        multiple: int = TAIL,
    ) -> None:
        if list(lengths) != sorted(lengths, reverse=True):
            raise ValueError("documents lie longest first")
        self.lengths = tuple(int(n) for n in lengths)
        self.device = device
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.real = int(self.starts[-1])
        self.total = -(-self.real // multiple) * multiple if device.type == "cpu" else self.real
        # Filler stands at position 0: rotary angles may depend on the largest position in sight.
        self.trees = {number: (front, tuple(tails)) for number, (front, tails) in (trees or {}).items()}
        places = [*(self._places(number) for number in range(len(self.lengths))), np.zeros(self.total - self.real, np.int64)]
        joined = np.concatenate(places)
        self.positions = send(joined, device)
        self.longest = int(joined.max()) + 1 if len(joined) else 0
        self.spans = tuple((int(s), int(s) + n) for s, n in zip(self.starts, self.lengths, strict=False))
        self.buckets = _buckets(self.lengths)
        self.blocks = [self._with_hidden(block) for block in _blocks(self.lengths, self.buckets)]
        self._queries: dict[tuple[int, int], HeadIndex] = {}
        self._keys: dict[int, HeadIndex] = {}
        self._seen: dict[tuple[int, int], Tensor] = {}
        self.read: Tensor | None = None
        self.kept: dict[Any, Any] = {}  # what layers work out once for all of them, e.g. rotary tables

    def only(self, places: Tensor) -> None:
        """From here on nobody reads what the last layer says of other tokens than these: `read` [R] has them in order, None for all."""
        read = torch.unique(places)
        if self.read is not None and not torch.equal(read, self.read):
            raise ValueError("what layers have worked out for other tokens is kept")
        self.read = read if len(read) < MOST_READ * self.total else None

    @functools.cached_property
    def read_documents(self) -> tuple[Ints, npt.NDArray[np.int32]]:
        """`documents` with the tokens of `read` as rows of queries."""
        assert self.read is not None
        spans, sight = self.documents
        read = self.read.numpy()
        edges = np.searchsorted(read, np.concatenate([spans[:, 0], [self.real]]))
        return np.stack([spans[:, 0], spans[:, 1], edges[:-1], np.diff(edges)], 1), np.ascontiguousarray(sight[read])

    @functools.cached_property
    def documents(self) -> tuple[Ints, npt.NDArray[np.int32]]:
        """Of each document [first token, tokens, first row of queries, rows], and of each row what it sees of its document.

        A row is a token here. It sees [P, first, place]: the keys before P and those from `first` to `place`, its own, all counted from the
        document's start; a token of no tail has P = first = 0.
        """
        sight = np.zeros((self.real, 3), np.int32)
        for number, (start, end) in enumerate(self.spans):
            sight[start:end, 2] = np.arange(end - start)
            front, tails = self.trees.get(number, (0, ()))
            for tail in tails:
                sight[start + tail : end, :2] = front, tail
        spans = np.array([(start, end - start) * 2 for start, end in self.spans], np.int64).reshape(-1, 4)
        return spans, sight

    def straight(self, heads: int) -> Tensor:
        """The numbers of all rows [N * heads], as they stand."""
        name = ("straight", heads)
        if name not in self.kept:
            self.kept[name] = torch.arange(self.total * heads, device=self.device)
        rows: Tensor = self.kept[name]
        return rows

    def _places(self, number: int) -> Ints:
        """The positions of a document's tokens."""
        place = np.arange(self.lengths[number])
        front, tails = self.trees.get(number, (0, ()))
        for begin, end in _between(tails, self.lengths[number]):
            place[begin:end] = np.arange(front, front + end - begin)
        return place

    def _rectangles(self, number: int) -> list[tuple[int, int, int, int]]:
        """(top, bottom, left, right) of what is hidden in a document: from each tail, everything between the front and itself."""
        front, tails = self.trees.get(number, (0, ()))
        return [(begin, end, front, begin) for begin, end in _between(tails, self.lengths[number])]

    def _with_hidden(self, block: Block) -> Block:
        found = []
        for document in range(block.documents) if self.trees else ():
            for top, bottom, left, right in self._rectangles(block.bucket.first + block.first + document):
                if top < block.high and bottom > block.low:
                    found.append(Hidden(document, max(top, block.low) - block.low, min(bottom, block.high) - block.low, left, right))
        return replace(block, hidden=tuple(found)) if found else block

    @functools.cached_property
    def runs(self) -> Runs:
        """The rows as kernels take them that know documents of several lengths only: every tail with the front's keys before it."""
        ends, key_ends, keys = [0], [0], []
        for number, start in enumerate(self.starts[:-1].tolist()):
            front, tails = self.trees.get(number, (0, ()))
            for begin, end in ((0, tails[0] if tails else self.lengths[number]), *_between(tails, self.lengths[number])):
                before = front if begin else 0
                ends.append(ends[-1] + end - begin)
                key_ends.append(key_ends[-1] + before + end - begin)
                keys += [np.arange(start, start + before), np.arange(start + begin, start + end)]
        lengths = (max(np.diff(ends).tolist()), max(np.diff(key_ends).tolist()))
        cumulative, key_cumulative = (send(np.array(values, np.int32), self.device) for values in (ends, key_ends))
        gathered = send(np.concatenate(keys), self.device) if self.trees else None
        return Runs(cumulative, key_cumulative, *lengths, gathered)

    def seen(self, length: int, window: int) -> Tensor:
        """[L, L], true where a query (row) may look at a key (column): not ahead, and less than `window` back (0: any distance)."""
        if (length, window) not in self._seen:
            place = torch.arange(length, device=self.device)
            far = place[:, None] - place[None, :]
            self._seen[length, window] = (far >= 0) & (far < window) if window else far >= 0
        return self._seen[length, window]

    def sight(self, number: int, window: int) -> Tensor:
        """`seen` of the document with this number, less what is hidden in it."""
        seen = self.seen(self.lengths[number], window)
        rectangles = self._rectangles(number)
        if rectangles:
            seen = seen.clone()
            for top, bottom, left, right in rectangles:
                seen[top:bottom, left:right] = False
        return seen

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
        there, here, filler = (send(array, self.device) for array in arrays)
        return HeadIndex(there, here, filler, heads)


def _between(tails: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Where each tail begins and ends."""
    return list(zip(tails, [*tails[1:], length], strict=True)) if tails else []


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


def send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on `device`; the way to a GPU goes through pinned memory, so that the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
