"""One batch as forward passes: how the rows are laid out, and where the hidden state that is read for each trained token lies.

A language model predicts token t from the state one before it, a reward head reads the state at t itself: `at`. Rows of one group
that begin alike share that front: it goes through the model once, and the tails of all rows follow it in one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.core.groups import common_front
from tunesmith.core.types import Batch, Segment
from tunesmith.model.layout import TAIL, Layout, send

WASTE = 1.3  # rows are padded together while no more than this many times their real tokens are computed
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One forward pass: ids [B, L], the model's arguments, lengths per position, and the places of the trained tokens.

    `index` are their positions in the batch, `rows` the flat places (of B * L) of the states that predict them.
    """

    ids: Tensor
    arguments: dict[str, Any]
    lengths: Tensor
    index: Ints
    rows: Tensor
    layout: Layout | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a row that goes through the model: positions start..stop-1 of the batch, of `length` that the row has."""

    start: int
    stop: int
    length: int

    @property
    def inputs(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Document:
    """What attention keeps to itself: one row, or several of which the first `shared` inputs are the same and stand once."""

    rows: tuple[Span, ...]
    shared: int = 0

    @property
    def inputs(self) -> int:
        return sum(row.inputs for row in self.rows) - self.shared * (len(self.rows) - 1)

    @property
    def tails(self) -> tuple[int, ...]:
        """Where the tail of every row after the first begins, counted from the document's start."""
        ends = np.cumsum([self.rows[0].inputs, *(row.inputs - self.shared for row in self.rows[1:])])
        return tuple(ends[:-1].tolist())

    def ids(self, batch: Batch) -> list[npt.NDArray[np.int32]]:
        """The ids in the order of the document, in pieces."""
        first, *others = self.rows
        return [batch.ids[first.start : first.stop], *(batch.ids[row.start + self.shared : row.stop] for row in others)]


@dataclass(frozen=True, slots=True)
class Sharing:
    """When rows of a group share their front: not beyond `window` positions (0: any), and only where it pays.

    `width`: the model's. What is saved is the work of a token, about 24 width^2 operations in a layer; what is wasted are the scores
    between tails, 12 width operations each at about half the speed of large products.
    """

    window: int = 0
    width: int = 1

    def front(self, rows: Sequence[npt.NDArray[np.int32]]) -> int:
        """How many inputs these rows of a group share; 0 where each goes through the model whole."""
        if len(rows) < 2 or (self.window and max(map(len, rows)) > self.window):
            return 0
        shared = min(common_front(rows), *(len(row) - 1 for row in rows))  # each row keeps an input of its own
        tails = [len(row) - shared for row in rows]
        between = (sum(tails) ** 2 - sum(tail**2 for tail in tails)) // 2
        return shared if shared * (len(rows) - 1) * self.width >= between else 0


def passes(
    batch: Batch,
    device: torch.device,
    layout: Literal["packed", "padded"],
    *,
    side: Literal["left", "right"] = "right",
    alone_from: int | None = None,
    at: Literal["before", "at"] = "before",
    sharing: Sharing | None = None,
    multiple: int = TAIL,
) -> list[Pass]:
    """The forward passes that cover every row up to its last trained token, which is a target and no input unless read `at` itself.

    `alone_from`: rows longer than this go through the model alone and whole, because its positions depend on the longest one.
    `sharing`: rows of one group may share their common front (packed layout only). `multiple`: packed tokens on a CPU
    are so many times a whole number.
    """
    tail = int(at == "at")
    spans = [_span(batch, s, tail, whole=alone_from is not None) for s in batch.segments if batch.train[s.start : s.stop].any()]
    single = [span for span in spans if alone_from is not None and span.inputs > alone_from]
    if layout == "packed":
        apart = {span.start for span in single}
        documents = _documents(batch, [span for span in spans if span.start not in apart], sharing)
        groups = [[Document((span,))] for span in single] + [group for group in _by_window(documents, sharing) if group]
        return [_packed(batch, sorted(group, key=lambda document: -document.inputs), device, tail, multiple) for group in groups]
    spans.sort(key=lambda span: -span.inputs)
    return [_padded(batch, group, device, side, tail) for group in [*([s] for s in single), *_alike(spans[len(single) :])]]


def _span(batch: Batch, segment: Segment, tail: int, *, whole: bool) -> Span:
    last = segment.start + int(np.flatnonzero(batch.train[segment.start : segment.stop])[-1])
    return Span(segment.start, segment.stop if whole else last + tail, segment.stop - segment.start)


def _documents(batch: Batch, spans: Sequence[Span], sharing: Sharing | None) -> list[Document]:
    """One document a row, or a group whose rows share their front where that pays."""
    if sharing is None:
        return [Document((span,)) for span in spans]
    names = {segment.start: segment.group for segment in batch.segments}
    groups: dict[str, list[Span]] = {}
    for span in spans:
        groups.setdefault(names[span.start] or f"\0{span.start}", []).append(span)
    documents = []
    for rows in groups.values():
        if shared := sharing.front([batch.ids[row.start : row.stop] for row in rows]):
            documents.append(Document(tuple(rows), shared))
        else:
            documents += [Document((row,)) for row in rows]
    return documents


def _by_window(documents: Sequence[Document], sharing: Sharing | None) -> list[list[Document]]:
    """Those with a shared front apart from the rest where the rest reaches over the window: distances in the former are not places."""
    if sharing is None or not sharing.window or all(row.inputs <= sharing.window for d in documents for row in d.rows):
        return [list(documents)]
    return [[d for d in documents if d.shared], [d for d in documents if not d.shared]]


def _alike(spans: Sequence[Span]) -> list[list[Span]]:
    groups: list[list[Span]] = []
    real = 0
    for span in spans:
        if groups and groups[-1][0].inputs * (len(groups[-1]) + 1) <= WASTE * (real + span.inputs):
            groups[-1].append(span)
            real += span.inputs
        else:
            groups.append([span])
            real = span.inputs
    return groups


def _packed(batch: Batch, documents: Sequence[Document], device: torch.device, at: int, multiple: int) -> Pass:
    trees = {i: (d.shared, d.tails) for i, d in enumerate(documents) if d.shared}
    layout = Layout([d.inputs for d in documents], device, trees, multiple)
    filler = layout.total - layout.real
    ids = np.concatenate([*(piece for d in documents for piece in d.ids(batch)), np.zeros(filler, np.int32)]).astype(np.int64)
    index, rows, lengths = [], [], []
    for document, start in zip(documents, layout.starts.tolist(), strict=False):
        for row, tail in zip(document.rows, (0, *document.tails), strict=True):
            shared = document.shared if tail else 0
            trained, place = _trained(batch, row, at)
            index.append(row.start + trained)
            # In the front the states of all rows are those of the first.
            rows.append(start + np.where(place < shared, place, place + (tail - shared if tail else 0)))
            lengths += [row.length] * (row.inputs - shared)
    sizes = np.array([*lengths, *[1] * filler], np.float32)
    arguments = {"position_ids": layout.positions[None], "tunesmith_layout": layout}
    where = send(np.concatenate(rows), device)
    return Pass(send(ids, device)[None], arguments, send(sizes, device)[None], np.concatenate(index), where, layout)


def _padded(batch: Batch, spans: Sequence[Span], device: torch.device, side: str, at: int) -> Pass:
    """Right padding needs no mask: a causal model never looks ahead, and what stands behind a document is not scored."""
    inputs = np.array([span.inputs for span in spans])
    width = int(inputs.max())
    ids = np.zeros((len(spans), width), np.int64)
    offsets = width - inputs if side == "left" else np.zeros_like(inputs)
    index, rows = [], []
    for row, span in enumerate(spans):
        ids[row, offsets[row] : offsets[row] + span.inputs] = batch.ids[span.start : span.stop]
        trained, place = _trained(batch, span, at)
        index.append(span.start + trained)
        rows.append(row * width + offsets[row] + place)
    arguments: dict[str, Any] = {}
    if side == "left":
        mask = np.arange(width)[None] >= offsets[:, None]
        arguments = {"attention_mask": send(mask.astype(np.int64), device)}
        arguments["position_ids"] = send(np.maximum(np.cumsum(mask, 1) - 1, 0), device)
    lengths = np.array([[span.length] for span in spans], np.float32)
    return Pass(send(ids, device), arguments, send(lengths, device), np.concatenate(index), send(np.concatenate(rows), device))


def _trained(batch: Batch, row: Span, at: int) -> tuple[Ints, Ints]:
    """Trained tokens counted from the row's start, and the inputs whose states are read for them: one before each, or each itself."""
    # The last target may stand right behind the inputs.
    trained = np.flatnonzero(batch.train[row.start : row.start + row.length][: row.inputs + 1 - at])
    return trained, trained - 1 + at
