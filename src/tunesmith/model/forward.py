"""One batch as forward passes: how the rows are laid out, and where the hidden state that predicts each trained token lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.core.types import Batch, Segment
from tunesmith.model.layout import Layout

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
    """The part of a document that goes through the model: positions start..stop-1, of `length` that it has."""

    start: int
    stop: int
    length: int

    @property
    def inputs(self) -> int:
        return self.stop - self.start


def passes(
    batch: Batch,
    device: torch.device,
    layout: Literal["packed", "padded"],
    *,
    side: Literal["left", "right"] = "right",
    alone_from: int | None = None,
) -> list[Pass]:
    """The forward passes that cover every document up to its last trained token, which is a target and no input.

    `alone_from`: documents longer than this go through the model alone and whole, because its positions depend on the
    longest one.
    """
    spans = [_span(batch, s, whole=alone_from is not None) for s in batch.segments if batch.train[s.start : s.stop].any()]
    spans.sort(key=lambda span: -span.inputs)
    single = [[s] for s in spans if alone_from is not None and s.inputs > alone_from]
    together = spans[len(single) :]
    if layout == "packed":
        return [_packed(batch, group, device) for group in [*single, *([together] if together else [])]]
    return [_padded(batch, group, device, side) for group in [*single, *_alike(together)]]


def _span(batch: Batch, segment: Segment, *, whole: bool) -> Span:
    last = segment.start + int(np.flatnonzero(batch.train[segment.start : segment.stop])[-1])
    return Span(segment.start, segment.stop if whole else last, segment.stop - segment.start)


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


def _packed(batch: Batch, spans: Sequence[Span], device: torch.device) -> Pass:
    layout = Layout([span.inputs for span in spans], device)
    tail = layout.total - layout.real
    ids = np.concatenate([*(batch.ids[span.start : span.stop] for span in spans), np.zeros(tail, np.int32)]).astype(np.int64)
    index, rows = _places(batch, spans, layout.starts)
    lengths = np.repeat([*(span.length for span in spans), 1], [*layout.lengths, tail]).astype(np.float32)
    arguments = {"position_ids": layout.positions[None], "tunesmith_layout": layout}
    return Pass(send(ids, device)[None], arguments, send(lengths, device)[None], index, send(rows, device), layout)


def _padded(batch: Batch, spans: Sequence[Span], device: torch.device, side: str) -> Pass:
    """Right padding needs no mask: a causal model never looks ahead, and what stands behind a document is not scored."""
    inputs = np.array([span.inputs for span in spans])
    width = int(inputs.max())
    ids = np.zeros((len(spans), width), np.int64)
    offsets = width - inputs if side == "left" else np.zeros_like(inputs)
    for row, span in enumerate(spans):
        ids[row, offsets[row] : offsets[row] + span.inputs] = batch.ids[span.start : span.stop]
    index, rows = _places(batch, spans, np.arange(len(spans)) * width + offsets)
    arguments: dict[str, Any] = {}
    if side == "left":
        mask = np.arange(width)[None] >= offsets[:, None]
        arguments = {"attention_mask": send(mask.astype(np.int64), device)}
        arguments["position_ids"] = send(np.maximum(np.cumsum(mask, 1) - 1, 0), device)
    lengths = np.array([[span.length] for span in spans], np.float32)
    return Pass(send(ids, device), arguments, send(lengths, device), index, send(rows, device))


def _places(batch: Batch, spans: Sequence[Span], starts: Ints) -> tuple[Ints, Ints]:
    """Positions of the trained tokens in the batch, and the flat places of the states one before each."""
    index, rows = [], []
    for span, start in zip(spans, starts, strict=False):
        # Up to and including `stop`: where the document was cut it is the last target, elsewhere the next document's
        # first token, which is never trained.
        trained = np.flatnonzero(batch.train[span.start : span.stop + 1])
        index.append(span.start + trained)
        rows.append(start + trained - 1)
    return np.concatenate(index), np.concatenate(rows)


def send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on `device`; the way to a GPU goes through pinned memory, so that the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
