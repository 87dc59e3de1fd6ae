"""Keys and values of rows that are being sampled, in slots of doubling width, and attention of new tokens over them.

A row starts in the narrowest slot that holds it and moves to one twice as wide when it is full, so that at most half of the room of a slot
is idle and rows that are worked on together have similar lengths. The rows of one width lie densely, without gaps: one call of attention
reads them where they stand.
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

from tunesmith.core.errors import BugError
from tunesmith.model import huge_pages
from tunesmith.model.attention import Form, attend_documents, attend_plainly, window_of
from tunesmith.model.layout import Layout, send
from tunesmith.model.virtual import prefix_of

NARROWEST = 64
STEP = 16  # keys in sight are rounded up to a multiple of this
FIRST_SLOTS = 4
ROWS = 8  # on a CPU the number of new tokens is made a multiple of this: every new one costs kernels made for it


class Pool:
    """The rows whose slots are `width` wide, densely by place; per layer keys and values [slots, K, width, D]."""

    def __init__(self, width: int) -> None:
        self.width = width
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
                # Zeros, not chance: what is masked gets weight zero, and zero times NaN would be NaN.
                held[layer] = _zeros((self.slots, like.shape[-2], self.width, like.shape[-1]), like)
        return self.keys[layer], self.values[layer]

    def addresses(self, layers: Sequence[int], like: Tensor) -> np.ndarray[Any, Any]:
        """Where the keys and the values of each layer begin, [2, layers]; `like` [.., heads, width] as for `room`."""
        if self._addresses is None or self._addresses.shape[1] != len(layers):
            rooms = [self.room(layer, like, like) for layer in layers]
            self._addresses = np.array([[key.data_ptr() for key, _ in rooms], [value.data_ptr() for _, value in rooms]], np.int64)
        return self._addresses

    def sight(self, layer: int, rows: int, seen: int) -> tuple[Tensor, Tensor]:
        """The first `seen` keys and values of the first `rows` rows; made once for the many steps that look the same."""
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
    """The slots of all rows; a row is known by a number of the caller's. `most` positions at most are held (None: no limit)."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
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
        for layer, (key, value) in kept.items():
            keys, values = pool.room(layer, key.transpose(0, 1), value.transpose(0, 1))
            keys[place, :, :count], values[place, :, :count] = key[:, :count], value[:, :count]

    def bytes(self) -> int:
        """What all slots take."""
        return sum(pool.bytes() for pool in self.pools.values())

    def _put(self, row: int, width: int) -> None:
        pool = self.pools.setdefault(width, Pool(width))
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


def width_for(length: int) -> int:
    """The width of the slot for so many positions: the next power of two."""
    return max(NARROWEST, 1 << (length - 1).bit_length())


class Feed(abc.ABC):
    """New tokens of cached rows in one forward pass, end to end; handed to the layers in place of a layout.

    `positions` [N] places in their rows; `longest` is the number of keys that the longest row has in sight; `last` [rows] where each
    row's last new token stands; `kept` is what the layers work out once for all of them. `mix` says which row goes through which adapter.
    """

    trees: tuple[()] = ()

    def __init__(self, cache: Cache, rows: Sequence[int], device: torch.device) -> None:
        self.cache, self.rows, self.device = cache, list(rows), device
        self.kept: dict[Any, Any] = {}
        self.mix: Any = None
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

    def __init__(self, cache: Cache, parts: Sequence[tuple[int, Sequence[int], int]], device: torch.device, virtual: int = 0) -> None:
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
        if prefix is not None and self.fresh and (virtual := prefix_of(prefix, self.layout)) is not None:
            turned = virtual.put(layer, key.transpose(0, 1)[None], value.transpose(0, 1)[None], self.layout)
            key, value = (t[0].transpose(0, 1) for t in turned)
        sights = []
        for row, past, (a, b) in zip(self.rows, self.past, self.layout.spans, strict=True):
            pool, place = self.cache.where(row)
            keys, values = pool.room(layer, key, value)
            keys[place, :, past : past + b - a] = key[a:b].transpose(0, 1)
            values[place, :, past : past + b - a] = value[a:b].transpose(0, 1)
            sights.append((keys[place, :, : past + b - a], values[place, :, : past + b - a]))
        if self.fresh:
            q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
            return attend_documents(q, k, v, self.layout, form)[0]
        out = torch.zeros(len(query), query.shape[1], value.shape[2], dtype=query.dtype, device=query.device)
        for past, (a, b), (keys, values) in zip(self.past, self.layout.spans, sights, strict=True):
            places = torch.arange(past + b - a, device=self.device)
            far = places[past:, None] - places[None]
            sight = (far >= 0) & (far < form.window) if form.window else far >= 0
            out[a:b] = attend_plainly(query[None, a:b].transpose(1, 2), keys[None], values[None], form, sight)[0].transpose(0, 1)
        return out


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
                held.view(-1, new.shape[2]).index_copy_(0, index, new.reshape(-1, new.shape[2]))
            seen = self._widths[number]
            sight_keys, sight_values = pool.sight(layer, len(past), seen)
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
