"""New tokens of cached rows on their way through a model, and their attention over what the cache keeps.

N new tokens, H query heads, K key heads, D head width, m rows of one width.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model import native
from tunesmith.model.attention import Form, attend_documents, attend_plainly, window_of
from tunesmith.model.cached import Cache, Pool, pack, unpack
from tunesmith.model.layout import Layout, send
from tunesmith.model.virtual import prefix_of

STEP = 16  # keys in sight are rounded up to a multiple of this
ROWS = 8  # on a CPU the number of new tokens is made a multiple of this: every new one costs kernels made for it


class Feed(abc.ABC):
    """New tokens of cached rows in one forward pass, end to end; handed to the layers in place of a layout.

    `positions` [N] places in their rows; `longest` is the number of keys that the longest row has in sight; `last` [rows] where each
    row's last new token stands; `kept` is what the layers work out once for all of them. `mix` says which row goes through which adapter;
    `read` [R] which new tokens are asked about, perhaps none (None: all), so that the last layer may leave the others out.
    """

    trees: tuple[()] = ()

    def __init__(self, cache: Any, rows: Sequence[int], device: torch.device) -> None:
        self.cache, self.rows, self.device = cache, list(rows), device
        self.kept: dict[Any, Any] = {}
        self.mix: Any = None
        self.read: Tensor | None = None
        self.ids: Tensor
        self.positions: Tensor
        self.last: Tensor
        self.longest = 0

    @abc.abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, prefix: nn.Module | None = None) -> Tensor:
        """Attention of the new tokens [N, H, D] over their rows, with keys and values [N, K, D] put into the cache first: [N, H, D]."""

    def of_module(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, marker: Tensor | None, sliding: int | None, form: Form
    ) -> Tensor:
        """The same for the attention function of a transformers layer: [1, H, N, D] and [1, K, N, D] to [1, N, H, D]."""
        window = window_of(marker, sliding, self)
        form = Form(form.scale, window, 0.0, form.softcap, form.sinks)
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
        return self.attend(int(module.layer_idx), q, k, v, form, module)[None]


class Prompts(Feed):
    """Rows with several new tokens each: (row, ids, positions that the cache holds already), the longest first."""

    def __init__(self, cache: Any, parts: Sequence[tuple[int, Sequence[int], int]], device: torch.device, virtual: int = 0) -> None:
        parts = sorted(parts, key=lambda part: -len(part[1]))
        super().__init__(cache, [row for row, _, _ in parts], device)
        self.past = [past for _, _, past in parts]
        self.layout = Layout([len(ids) for _, ids, _ in parts], device)
        filler = [0] * (self.layout.total - self.layout.real)
        self.ids = send(np.array([token for _, ids, _ in parts for token in ids] + filler, np.int64), device)
        before = np.concatenate([*(np.full(len(ids), past) for _, ids, past in parts), np.array(filler, np.int64)])
        self.positions = self.layout.positions + send(before.astype(np.int64), device)
        self.last = send(self.layout.starts[1:] - 1, device)
        self.longest = max(past + len(ids) for _, ids, past in parts)
        self.fresh = not any(self.past)
        if virtual:
            self.layout.kept["virtual"] = virtual

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, prefix: nn.Module | None = None) -> Tensor:
        return self._attend(layer, query, key, value, form, prefix)

    def attend_read(self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
        """The same as `attend` for the tokens that are asked about alone: [R, H, D]."""
        assert self.read is not None
        return self._attend(layer, query, key, value, form, None, self.read).index_select(0, self.read)

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, prefix: nn.Module | None, read: Tensor | None = None
    ) -> Tensor:
        """Attention [N, H, D]; where `read` is given, the rows of other tokens may hold anything."""
        key, value = self._with_virtual(layer, key, value, prefix)
        slots = self._keep(layer, key, value)
        if slots is not None and form.simple and _side_by_side(query) and query.shape[2] == value.shape[2]:
            fast, multiply = native.kernels(query.dtype), native.multiplier(query.dtype)
            if fast is not None and multiply is not None:
                if read is not None:
                    slots = (_only(slots[0], read), _only(slots[1], read))
                return fast.attend_rows(query, slots, key.shape[1], form.window, form.scale, self.cache.int8, multiply)
        if self.fresh:
            if self.cache.int8:  # seen as it is kept, however a prompt is cut
                key, value = (unpack(pack(new), new.dtype) for new in (key, value))
            q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
            return attend_documents(q, k, v, self.layout, form)[0]
        out = torch.zeros(len(query), query.shape[1], value.shape[2], dtype=query.dtype, device=query.device)
        for row, past, (a, b) in zip(self.rows, self.past, self.layout.spans, strict=True):
            pool, place = self.cache.where(row)
            keys, values = (held[layer][place, :, : past + b - a] for held in (pool.keys, pool.values))
            if pool.int8:
                keys, values = unpack(keys, query.dtype), unpack(values, query.dtype)
            places = torch.arange(past + b - a, device=self.device)
            far = places[past:, None] - places[None]
            sight = (far >= 0) & (far < form.window) if form.window else far >= 0
            out[a:b] = attend_plainly(query[None, a:b].transpose(1, 2), keys[None], values[None], form, sight)[0].transpose(0, 1)
        return out

    def _with_virtual(self, layer: int, key: Tensor, value: Tensor, prefix: nn.Module | None) -> tuple[Tensor, Tensor]:
        """Keys and values with a prefix's own in the places of its virtual tokens, where there are any."""
        if prefix is None or not self.fresh or (virtual := prefix_of(prefix, self.layout)) is None:
            return key, value
        turned = virtual.put(layer, key.transpose(0, 1)[None], value.transpose(0, 1)[None], self.layout)
        return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
        """Put the new keys and values [N, K, D] into their rows' slots; returns where those are if our compiled functions can read them."""
        rooms = {width: pool.room(layer, key, value) for width, pool in self.cache.pools.items()}
        fast = native.kernels(key.dtype) if _side_by_side(key) and _side_by_side(value) else None
        slots = []
        for which, new in enumerate((key, value)):
            if fast is not None:
                slots.append(self._slots({width: room[which] for width, room in rooms.items()}))
                fast.keep_rows(new, slots[-1], self.cache.int8)
                continue
            for row, past, (a, b) in zip(self.rows, self.past, self.layout.spans, strict=True):
                pool, place = self.cache.where(row)
                rooms[pool.width][which][place, :, past : past + b - a] = (pack(new[a:b]) if pool.int8 else new[a:b]).transpose(0, 1)
        return (slots[0], slots[1]) if slots else None

    def _slots(self, rooms: dict[int, Tensor]) -> np.ndarray[Any, Any]:
        """For every row where its slot begins, its width, the positions it has, and its first new token and their number: [rows, 5]."""
        if "slots" not in self.kept:
            where = [self.cache.where(row) for row in self.rows]
            spans = zip(where, self.past, self.layout.spans, strict=True)
            table = np.array([(0, pool.width, past, a, b - a) for (pool, _), past, (a, b) in spans], np.int64)
            self.kept["slots"] = table, np.array([place for _, place in where], np.int64)
        table, places = self.kept["slots"]
        starts = {width: (room.data_ptr(), room.stride(0) * room.element_size()) for width, room in rooms.items()}
        begin, each = np.array([starts[width] for width in table[:, 1].tolist()], np.int64).T
        found: np.ndarray[Any, Any] = np.concatenate([(begin + places * each)[:, None], table[:, 1:]], 1)
        return found


class NextTokens(Feed):
    """One new token for every row: `tokens` by row; the rows are put in the order in which their slots lie."""

    def __init__(self, cache: Cache, tokens: dict[int, tuple[int, int]], device: torch.device) -> None:
        """`tokens`: for every row of the cache its new token and the positions it has already."""
        pools = [pool for _, pool in sorted(cache.pools.items()) if pool.rows]
        super().__init__(cache, [row for pool in pools for row in pool.rows], device)
        filler = [0] * (-len(self.rows) % ROWS if device.type == "cpu" else 0)
        self.ids = send(np.array([*(tokens[row][0] for row in self.rows), *filler], np.int64), device)
        past = np.array([*(tokens[row][1] for row in self.rows), *filler], np.int64)
        self.positions = send(past, device)
        self.last = torch.arange(len(self.rows), device=device)
        self.longest = int(past.max()) + 1
        self.parts: list[tuple[Pool, slice, np.ndarray[Any, Any]]] = []
        self._widths: list[int] = []
        start = 0
        for pool in pools:
            part = slice(start, start + len(pool.rows))
            self.parts.append((pool, part, past[part]))
            self._widths.append(min(pool.width, -(-(int(past[part].max()) + 1) // STEP) * STEP))
            start = part.stop

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, prefix: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        outs = []
        alone = len(self.parts) == 1 and len(query) == len(self.rows)
        for number, (pool, part, past) in enumerate(self.parts):
            q, k, v = (query, key, value) if alone else (query[part], key[part], value[part])
            keys, values = pool.room(layer, key, value)
            for held, new in ((keys, k), (values, v)):
                index = self._places(number, pool, past, new.shape[1])
                new = pack(new) if pool.int8 else new
                held.view(-1, new.shape[2]).index_copy_(0, index, new.reshape(-1, new.shape[2]))
            seen = self._widths[number]
            sight_keys, sight_values = pool.sight(layer, len(past), seen)
            if pool.int8:
                sight_keys, sight_values = unpack(sight_keys, query.dtype), unpack(sight_values, query.dtype)
            mask = self._mask(number, past, seen, form.window, query.dtype)
            if form.simple and q.shape[-1] == v.shape[-1]:
                out = F.scaled_dot_product_attention(
                    q.unsqueeze(2), sight_keys, sight_values, attn_mask=mask, scale=form.scale, enable_gqa=q.shape[1] != k.shape[1]
                ).squeeze(2)
            else:
                out = attend_plainly(q.unsqueeze(2), sight_keys, sight_values, form, mask == 0).squeeze(2)
            outs.append(out)
        if filler := len(query) - len(self.rows):
            outs.append(outs[0].new_zeros(filler, *outs[0].shape[1:]))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def past(self, number: int) -> Tensor:
        """Where a pool's new keys stand in their rows [m]."""
        name = ("past", number)
        if name not in self.kept:
            self.kept[name] = send(self.parts[number][2], self.device)
        found: Tensor = self.kept[name]
        return found

    def _places(self, number: int, pool: Pool, past: np.ndarray[Any, Any], heads: int) -> Tensor:
        """Where the new keys stand among all positions of the pool: [m * heads]."""
        name = ("places", number, heads)
        if name not in self.kept:
            rows = np.arange(len(past))[:, None] * heads + np.arange(heads)[None]
            self.kept[name] = send((rows * pool.width + past[:, None]).ravel(), self.device)
        found: Tensor = self.kept[name]
        return found

    def _mask(self, number: int, past: np.ndarray[Any, Any], seen: int, window: int, dtype: torch.dtype) -> Tensor:
        """0 where a row looks, minus infinity elsewhere: [m, 1, 1, keys]."""
        name = ("mask", number, window, dtype)
        if name not in self.kept:
            place = np.arange(seen)[None]
            hidden = place > past[:, None]
            if window:
                hidden |= place <= past[:, None] - window
            bias = torch.zeros(len(past), 1, 1, seen, dtype=dtype, device=self.device)
            self.kept[name] = bias.masked_fill_(send(hidden, self.device)[:, None, None], float("-inf"))
        found: Tensor = self.kept[name]
        return found


def _only(slots: np.ndarray[Any, Any], read: Tensor) -> np.ndarray[Any, Any]:
    """For each of these new tokens its row's slot with that one alone: those before it count as past."""
    places = read.numpy()
    rows = slots[np.searchsorted(slots[:, 3], places, side="right") - 1]
    begin, width, past, first, _ = rows.T
    return np.ascontiguousarray(np.stack([begin, width, past + places - first, places, np.ones_like(places)], 1))


def _side_by_side(heads: Tensor) -> bool:
    """Whether the heads [N, H, D] of a token lie side by side and are as wide as our compiled functions take them."""
    return heads.is_cpu and heads.shape[2] in native.HEAD_WIDTHS and heads.stride()[1:] == (heads.shape[2], 1)
