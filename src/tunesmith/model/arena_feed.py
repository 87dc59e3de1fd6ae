"""New tokens of rows whose keys and values lie in an arena: one call of variable-length attention for all rows, whatever their lengths.

On a GPU that is PyTorch's flash attention, which reads the beginning of every row's span and how much of it is in use from the device.
Written without a GPU at hand: the bookkeeping is tested on a CPU, where the rows are done one after the other, and the call on tensors
without data.
N new tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.model.arena import Arena
from tunesmith.model.attention import Form, LayoutError, attend_plainly
from tunesmith.model.cached import NARROWEST
from tunesmith.model.feed import Feed, Prompts
from tunesmith.model.layout import send

LEAST_REACH = 256  # keys that a recorded step is made for at least; then powers of two


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """What each row's queries look at, in int32 on the device.

    `ends` [rows + 1] where the queries of each row end, 0 first; `starts` [rows + 1] where its span begins, and a number nobody reads;
    `used` [rows] how many of its positions are in use, the new ones among them. `queries` and `keys`: of no row more than these.
    """

    ends: Tensor
    starts: Tensor
    used: Tensor
    queries: int
    keys: int


def attend_spans(query: Tensor, keys: Tensor, values: Tensor, reach: Reach, form: Form) -> Tensor:
    """Causal attention of each row's queries [N, H, D], its last tokens, over its part of keys and values [positions, K, D]: [N, H, D].

    Raises LayoutError on a GPU for what flash attention cannot do.
    """
    if query.device.type == "cpu":
        return _one_by_one(query, keys, values, reach, form)
    return _flash(query, keys, values, reach, form)


def _flash(query: Tensor, keys: Tensor, values: Tensor, reach: Reach, form: Form) -> Tensor:
    if query.dtype not in (torch.bfloat16, torch.float16) or not form.simple or query.shape[2] != values.shape[2]:
        raise LayoutError("flash attention does not have this form")
    from torch.nn.attention.varlen import varlen_attn

    # A single query sees all that is in use: asked without a mask, the kernel does the heads of a group together.
    behind = -1 if reach.queries == 1 and not form.window else 0
    out = varlen_attn(
        query, keys, values, reach.ends, reach.starts, reach.queries, reach.keys, scale=form.scale, seqused_k=reach.used,
        window_size=(form.window - 1 if form.window else -1, behind), enable_gqa=query.shape[1] != keys.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    return out


def _one_by_one(query: Tensor, keys: Tensor, values: Tensor, reach: Reach, form: Form) -> Tensor:
    out = query.new_zeros(len(query), query.shape[1], values.shape[2])
    ends = reach.ends.tolist()
    for a, b, start, used in zip(ends, ends[1:], reach.starts.tolist(), reach.used.tolist(), strict=False):
        places = torch.arange(used)
        far = places[used - (b - a) :, None] - places[None]
        sight = (far >= 0) & (far < form.window) if form.window else far >= 0
        q, k, v = (t.transpose(0, 1)[None] for t in (query[a:b], keys[start : start + used], values[start : start + used]))
        out[a:b] = attend_plainly(q, k, v, form, sight)[0].transpose(0, 1)
    return out


class ArenaPrompts(Prompts):
    """Rows with several new tokens each, as `Prompts`."""

    def __init__(self, arena: Arena, parts: Sequence[tuple[int, Sequence[int], int]], device: torch.device, virtual: int = 0) -> None:
        super().__init__(arena, parts, device, virtual)
        self.arena = arena
        starts = np.array([arena.where(row)[0] for row in self.rows])
        lengths = np.array([b - a for a, b in self.layout.spans])
        used = np.array(self.past) + lengths
        write = [np.arange(start + past, start + past + n) for start, past, n in zip(starts, self.past, lengths, strict=True)]
        if filler := self.layout.total - self.layout.real:
            assert filler <= NARROWEST
            write.append(np.arange(arena.nowhere, arena.nowhere + filler))
            starts, used, lengths = np.append(starts, arena.nowhere), np.append(used, filler), np.append(lengths, filler)
        self._write = send(np.concatenate(write).astype(np.int64), device)
        ends, starts = np.append(0, np.cumsum(lengths)), np.append(starts, 0)
        ends_there, starts_there, used_there = (send(each.astype(np.int32), device) for each in (ends, starts, used))
        self._reach = Reach(ends_there, starts_there, used_there, int(lengths.max()), int(used.max()))

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: Form,
        prefix: nn.Module | None,
        read: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        key, value = self._with_virtual(layer, key, value, prefix)
        return _put_and_attend(self.arena, layer, query, key, value, self._write, self._reach, form)


class ArenaTokens(Feed):
    """One new token for every row of the arena, in the order of their spans, and as many that stand in as make a usual number of rows.

    All that changes from step to step lies in one piece on the device (`replace`), so that the step can be recorded once and run again.
    `size` rows, those that stand in among them.
    """

    def __init__(self, arena: Arena, tokens: dict[int, tuple[int, int]], device: torch.device) -> None:
        """`tokens`: for every row of the arena its new token and the positions it has already."""
        super().__init__(arena, arena.rows, device)
        self.arena = arena
        n, self.size = len(self.rows), usual(len(self.rows))
        past = np.array([tokens[row][1] for row in self.rows], np.int64)
        starts = np.array([arena.where(row)[0] for row in self.rows], np.int64)
        self.longest = max(LEAST_REACH, 1 << int(past.max()).bit_length())
        # Numbers of 64 bits first, then those of 32: places in memory stay whole.
        parts = [6 * self.size, self.size, self.size + 1, self.size + 1]
        packed = np.zeros(sum(parts), np.int32)
        ids, positions, write = packed[: parts[0]].view(np.int64).reshape(3, -1)
        used, begin, ends = np.split(packed[parts[0] :], np.cumsum(parts[1:-1]))
        ids[:n], positions[:n] = [tokens[row][0] for row in self.rows], past
        write[:n], write[n:] = starts + past, arena.nowhere
        used[:n], used[n:] = past + 1, 1
        begin[:n], begin[n:] = starts, arena.nowhere
        ends[:] = np.arange(self.size + 1)
        self._packed = send(packed, device)
        wide, *narrow = torch.split(self._packed, parts)
        self.ids, self.positions, self._write = wide.view(torch.int64).view(3, self.size).unbind(0)
        self._reach = Reach(narrow[2], narrow[1], narrow[0], 1, self.longest)
        self.last = narrow[2].narrow(0, 0, n)

    def replace(self, other: ArenaTokens) -> None:
        """Stand for another step of the same `size` and `longest` on the same arena: its numbers move in where these are."""
        self._packed.copy_(other._packed, non_blocking=True)
        if self.mix is not None:
            self.mix.replace(other.mix)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, prefix: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        return _put_and_attend(self.arena, layer, query, key, value, self._write, self._reach, form)


def _put_and_attend(arena: Arena, layer: int, query: Tensor, key: Tensor, value: Tensor, write: Tensor, reach: Reach, form: Form) -> Tensor:
    keys, values = arena.room(layer, key, value)
    keys.index_copy_(0, write, key)
    values.index_copy_(0, write, value)
    return attend_spans(query, keys, values, reach, form)


def usual(rows: int) -> int:
    """The next number of rows that steps are recorded for: powers of two up to 8, then at most a third more than there are."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = max(4, (1 << (rows - 1).bit_length()) // 8)
    return -(-rows // step) * step
