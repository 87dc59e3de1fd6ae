"""One batch as forward passes: how the rows are laid out, and where the hidden state that predicts each trained token lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.core.types import Batch
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


def passes(
    batch: Batch,
    device: torch.device,
    layout: Literal["packed", "padded"],
    *,
    side: Literal["left", "right"] = "right",
    alone_from: int | None = None,
) -> list[Pass]:
    """The forward passes that cover every document with a trained token.

    `alone_from`: documents longer than this go through the model alone, because its positions depend on the longest one.
    """
    spans = [(s.start, s.stop) for s in batch.segments if batch.train[s.start : s.stop].any()]
    spans.sort(key=lambda span: span[0] - span[1])
    single = [[s] for s in spans if alone_from is not None and s[1] - s[0] > alone_from]
    together = spans[len(single) :]
    if layout == "packed":
        return [_packed(batch, group, device) for group in [*single, *([together] if together else [])]]
    return [_padded(batch, group, device, side) for group in [*single, *_alike(together)]]


def _alike(spans: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    groups: list[list[tuple[int, int]]] = []
    real = 0
    for a, b in spans:
        if groups and (groups[-1][0][1] - groups[-1][0][0]) * (len(groups[-1]) + 1) <= WASTE * (real + b - a):
            groups[-1].append((a, b))
            real += b - a
        else:
            groups.append([(a, b)])
            real = b - a
    return groups


def _packed(batch: Batch, spans: Sequence[tuple[int, int]], device: torch.device) -> Pass:
    layout = Layout([b - a for a, b in spans], device)
    ids = np.concatenate([batch.ids[a:b] for a, b in spans]).astype(np.int64)
    index, rows = _places(batch, spans, layout.starts)
    lengths = np.repeat(layout.lengths, layout.lengths).astype(np.float32)
    arguments = {"position_ids": layout.positions[None], "tunesmith_layout": layout}
    return Pass(_send(ids, device)[None], arguments, _send(lengths, device)[None], index, _send(rows, device), layout)


def _padded(batch: Batch, spans: Sequence[tuple[int, int]], device: torch.device, side: str) -> Pass:
    """Right padding needs no mask: a causal model never looks ahead, and what stands behind a document is not scored."""
    lengths = np.array([b - a for a, b in spans])
    width = int(lengths.max())
    ids = np.zeros((len(spans), width), np.int64)
    offsets = width - lengths if side == "left" else np.zeros_like(lengths)
    for row, (a, b) in enumerate(spans):
        ids[row, offsets[row] : offsets[row] + b - a] = batch.ids[a:b]
    index, rows = _places(batch, spans, np.arange(len(spans)) * width + offsets)
    arguments: dict[str, Any] = {}
    if side == "left":
        mask = np.arange(width)[None] >= offsets[:, None]
        arguments = {"attention_mask": _send(mask.astype(np.int64), device)}
        arguments["position_ids"] = _send(np.maximum(np.cumsum(mask, 1) - 1, 0), device)
    return Pass(_send(ids, device), arguments, _send(lengths.astype(np.float32), device)[:, None], index, _send(rows, device))


def _places(batch: Batch, spans: Sequence[tuple[int, int]], starts: Ints) -> tuple[Ints, Ints]:
    index, rows = [], []
    for (a, b), start in zip(spans, starts, strict=False):
        trained = np.flatnonzero(batch.train[a:b])
        index.append(a + trained)
        rows.append(start + trained - 1)
    return np.concatenate(index), np.concatenate(rows)


def _send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
