"""How the documents of one forward pass lie: end to end, with what attention needs to keep them apart.

N tokens, R rows of the padded buckets, H query heads, K key heads, G = H / K, L width of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LONG = 768  # documents from here on go through SDPA one by one: the padded product loses against it on a CPU
STEP = 16  # bucket widths are multiples of this
TIGHT = 0.75  # a document shorter than this part of the bucket's width opens a new bucket


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents of similar length, padded to `width`; `start` is the first row in the padded order."""

    documents: int
    width: int
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class HeadIndex:
    """Row numbers that carry [n * heads, D] to the padded buckets, the way back, and which padded rows are filler."""

    to_padded: Tensor
    back: Tensor
    filler: Tensor


class Layout:
    """Documents end to end, longest first; computed once for a forward pass and shared by all layers.

    `lengths` in descending order. `positions` [N] restarts at 0 with each document.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        if list(lengths) != sorted(lengths, reverse=True):
            raise ValueError("documents lie longest first")
        self.lengths = tuple(int(n) for n in lengths)
        self.device = device
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.total = int(self.starts[-1])
        self.positions = torch.from_numpy(np.concatenate([np.arange(n) for n in self.lengths])).to(device)
        self.spans = tuple((int(s), int(s) + n) for s, n in zip(self.starts, self.lengths, strict=False))
        self.long = tuple(span for span in self.spans if span[1] - span[0] >= LONG)
        self.short_start = int(self.starts[len(self.long)])
        self._rows, self._real, self.buckets = _bucket(self.lengths[len(self.long) :])
        self._grouped: dict[tuple[int, int], HeadIndex] = {}
        self._seen: dict[tuple[int, int], Tensor] = {}
        self._cumulative: Tensor | None = None

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

    def index(self, keys: int, group: int) -> HeadIndex:
        """Rows of the short documents for K key heads with `group` query heads each, ordered [document, K, G, L]."""
        if (keys, group) not in self._grouped:
            self._grouped[keys, group] = self._build(keys, group)
        return self._grouped[keys, group]

    def _build(self, keys: int, group: int) -> HeadIndex:
        heads = keys * group
        parts, filler = [], []
        for bucket in self.buckets:
            stop = bucket.start + bucket.documents * bucket.width
            rows = self._rows[bucket.start : stop].reshape(bucket.documents, 1, bucket.width)
            real = self._real[bucket.start : stop].reshape(bucket.documents, 1, bucket.width)
            parts.append((rows * heads + np.arange(heads)[None, :, None]).reshape(-1))
            filler.append(np.broadcast_to(~real, (bucket.documents, heads, bucket.width)).reshape(-1))
        to_padded, blank = np.concatenate(parts), np.concatenate(filler)
        back = np.empty((self.total - self.short_start) * heads, np.int64)
        back[to_padded[~blank]] = np.flatnonzero(~blank)
        return HeadIndex(*(torch.from_numpy(a).to(self.device) for a in (to_padded, back, np.flatnonzero(blank))))


def _bucket(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, tuple[Bucket, ...]]:
    """For documents longest first: source row and realness of every padded row, and the buckets."""
    buckets: list[Bucket] = []
    rows, real = [], []
    start = first = 0
    i = 0
    while i < len(lengths):
        width = -(-lengths[i] // STEP) * STEP
        j = i
        while j < len(lengths) and (lengths[j] >= TIGHT * width or lengths[j] + STEP > width):
            place = np.arange(width)
            rows.append(first + np.minimum(place, lengths[j] - 1))
            real.append(place < lengths[j])
            first += lengths[j]
            j += 1
        buckets.append(Bucket(j - i, width, start))
        start += (j - i) * width
        i = j
    if not buckets:
        return np.empty(0, np.int64), np.empty(0, bool), ()
    return np.concatenate(rows), np.concatenate(real), tuple(buckets)
