"""Many LoRA adapters on one base, a row at a time: each row of a batch goes through the adapter that its request names.

The adapters in use stand side by side in stacks, so that all rows of a forward pass take two products a projection, whatever their adapters
are (Chen 2023, arXiv:2310.18547, does so with a kernel of its own). Adapters that nobody uses now wait in host memory.
N tokens, S places in the stacks, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import RecipeError, did_you_mean
from tunesmith.model.arena_feed import ArenaTokens
from tunesmith.model.feed import Feed, Prompts
from tunesmith.model.layout import send
from tunesmith.model.lora_folder import read_lora
from tunesmith.model.policy import Policy
from tunesmith.model.tokenizer import resolve

MOST_ACTIVE = 64
MANY = 256  # tokens from which each goes through its own adapter only


class Factors:
    """One adapter: A [R, in] and B [out, R] (times its scale) by the path of the layer, in the dtype of the products."""

    def __init__(self, folder: str, version: int, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.folder, self.version, self.layers = folder, version, layers


class Stack:
    """The adapters' factors for layers on one input: A [S, sum of ranks, in] joined, B^T [S, R, out] by layer; zeros where one has none."""

    def __init__(
        self, paths: Sequence[str], adapters: Sequence[Factors | None], shapes: Mapping[str, tuple[int, int]], like: Tensor
    ) -> None:
        self.paths = tuple(paths)
        self.ranks = {path: max((len(f.layers[path][0]) for f in adapters if f and path in f.layers), default=0) for path in paths}
        total, start = sum(self.ranks.values()), 0
        self.a = like.new_zeros(len(adapters), total, shapes[paths[0]][1])
        self.b: dict[str, tuple[slice, Tensor]] = {}
        for path in paths:
            if rank := self.ranks[path]:
                self.b[path] = (slice(start, start + rank), like.new_zeros(len(adapters), rank, shapes[path][0]))
                start += rank
        for place, factors in enumerate(adapters):
            if factors is not None:
                self.put(place, factors)

    def put(self, place: int, factors: Factors) -> bool:
        """Write an adapter to a place; False where its rank is larger than the stack's."""
        if any(path in factors.layers and len(factors.layers[path][0]) > self.ranks[path] for path in self.paths):
            return False
        self.a[place].zero_()
        for path, (rank, b) in self.b.items():
            b[place].zero_()
            if path in factors.layers:
                first, second = factors.layers[path]
                self.a[place, rank.start : rank.start + len(first)] = first
                b[place, : len(first)] = second.t()
        return True


class ManyAdapters:
    """The adapters that an engine has loaded, by name; at most `most_active` of them are sampled through at a time.

    `in_use` gives the names that rows go through now or will go through: those cannot be replaced or evicted.
    """

    def __init__(self, policy: Policy, in_use: Callable[[], set[str]] = set, *, most_active: int = MOST_ACTIVE) -> None:
        self.policy, self.most_active, self._in_use = policy, most_active, in_use
        self._known: dict[str, Factors] = {}
        self._places: list[str | None] = []
        self._used: dict[str, int] = {}
        self._stacks: dict[tuple[str, ...], Stack | None] = {}
        self.moves = 0  # how often what a recorded step reads of the stacks came to lie elsewhere
        self._shapes: dict[str, tuple[int, int]] = {}
        self._clock = 0
        self._now: Mix | None = None
        self._watched: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The loaded adapters."""
        return sorted(self._known)

    def load(self, name: str, folder: str | Path) -> None:
        """Read a LoRA adapter from a PEFT folder (or a run folder); a name that is taken is replaced, unless rows are using it.

        Raises RecipeError `adapter_on_adapter` when the model has an adapter of its own, `adapter_in_use`, `adapter_kind` for what
        cannot be mixed by row (other kinds than LoRA, DoRA, trained modules or biases beside it); ModelError `no_model`, `bad_adapter`
        (another base: layers or shapes differ).
        """
        if self.policy.adapted:
            raise RecipeError(
                "the model has an adapter of its own, which all rows go through", where=name, remedy="open its base, and load both by name",
                code="adapter_on_adapter",
            )  # fmt: skip
        self._demand_idle(name)
        place = resolve(str(folder))
        self._clock += 1
        factors = Factors(place, self._clock, read_lora(place, self.policy, self._shape))
        self._known[name] = factors
        for path in factors.layers:
            self._watch(path)
        if name in self._places:
            self._write(self._places.index(name), factors)
        else:
            # Layers may take part now that no adapter touched before.
            self._drop([paths for paths, stack in self._stacks.items() if stack is None])

    def evict(self, name: str) -> None:
        """Forget an adapter. Raises RecipeError `unknown_adapter`, `adapter_in_use`."""
        self.demand(name)
        self._demand_idle(name)
        del self._known[name]
        self._used.pop(name, None)
        if name in self._places:
            self._places[self._places.index(name)] = None

    def demand(self, name: str) -> None:
        """Raises RecipeError `unknown_adapter` for a name that is not loaded."""
        if name not in self._known:
            raise RecipeError(
                f"there is no adapter '{name}'{did_you_mean(name, self._known)}", where="adapter",
                remedy=f"load it first; loaded are: {', '.join(self.names) or 'none'}", code="unknown_adapter",
            )  # fmt: skip

    def _demand_idle(self, name: str) -> None:
        if name in self._in_use():
            raise RecipeError(
                f"requests are going through the adapter '{name}'",
                where="adapter",
                remedy="let them end or cancel them, or load the new weights under another name",
                code="adapter_in_use",
            )

    @property
    def places(self) -> int:
        """Places of the stacks."""
        return len(self._places)

    def version(self, name: str | None) -> int:
        """A number that changes when an adapter's weights do; 0 for the base."""
        return 0 if name is None or name not in self._known else self._known[name].version

    def make_active(self, name: str | None, sampled: set[str]) -> bool:
        """Give an adapter a place in the stacks; False when all places are taken by those that rows are sampled through."""
        if name is None:
            return True
        self._clock += 1
        self._used[name] = self._clock
        if name in self._places:
            return True
        if None in self._places:
            place = self._places.index(None)
        elif len(self._places) < self.most_active:
            self._places.append(None)
            self._drop(list(self._stacks))
            place = len(self._places) - 1
        else:
            idle = [old for old in self._places if old not in sampled]
            if not idle:
                return False
            place = self._places.index(min(idle, key=lambda old: self._used.get(old or "", 0)))
        self._places[place] = name
        self._write(place, self._known[name])
        return True

    def mix(self, feed: Feed, names: Sequence[str | None]) -> Mix | None:
        """Which token of a feed goes through which adapter, from the names of its rows; None when all go through the base alone."""
        if all(name is None for name in names):
            return None
        places = np.array([-1 if name is None else self._places.index(name) for name in names])
        if isinstance(feed, Prompts):
            places = np.repeat(places, [b - a for a, b in feed.layout.spans])
        # What stands in for rows of a step that may be recorded goes through what is there, so that one adapter stays alone.
        filler = places[0] if isinstance(feed, ArenaTokens) else -1
        places = np.concatenate([places, np.full(len(feed.ids) - len(places), filler)])
        return Mix(self, places, self.policy.device, together=isinstance(feed, ArenaTokens))

    @contextlib.contextmanager
    def at_work(self, mix: Mix | None) -> Iterator[None]:
        """While open, layers that run as modules add what this mix says."""
        self._now = mix
        try:
            yield
        finally:
            self._now = None

    def stack(self, paths: tuple[str, ...]) -> Stack | None:
        """The factors for layers on one input; None when no adapter touches them."""
        if paths not in self._stacks:
            held = [self._known[name] if name is not None else None for name in self._places]
            touched = any(f is not None and path in f.layers for f in held for path in paths)
            like = next(iter(next(f for f in held if f is not None).layers.values()))[0] if touched else None
            for path in paths:
                self._shape(path)
            self._stacks[paths] = Stack(paths, held, self._shapes, like) if like is not None else None
        return self._stacks[paths]

    def _write(self, place: int, factors: Factors) -> None:
        for paths, stack in list(self._stacks.items()):
            touches = any(path in factors.layers for path in paths)
            if (stack is None and touches) or (stack is not None and not stack.put(place, factors)):
                self._drop([paths])

    def _drop(self, which: Sequence[tuple[str, ...]]) -> None:
        for paths in which:
            del self._stacks[paths]
        self.moves += 1

    def _watch(self, path: str) -> None:
        """Let a layer that runs as a module add its rows' adapters."""
        if path in self._watched:
            return
        self._watched.add(path)
        self.moves += 1  # a recorded step does not know of the hook

        def add(_module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._now is None:
                return None
            flat = output.reshape(-1, output.shape[-1])
            self._now.add({path: slice(0, output.shape[-1])}, inputs[0].reshape(-1, inputs[0].shape[-1]), flat)
            return flat.view_as(output)

        self.policy.causal.get_submodule(path).register_forward_hook(add)

    def _shape(self, path: str) -> tuple[int, int]:
        """(outputs, inputs) of a layer."""
        if path not in self._shapes:
            layer: Any = self.policy.causal.get_submodule(path)
            conv = type(layer).__name__ == "Conv1D"
            self._shapes[path] = (layer.nf, layer.nx) if conv else (layer.out_features, layer.in_features)
        return self._shapes[path]


class Mix:
    """The adapters of one forward pass: `places` [N] says where in the stacks each token's adapter stands (-1: none).

    Few tokens go through all adapters of the stacks at once, as if they were one of rank S R, and what is not their own is set to zero in
    between: two plain products, whose weights have to be read in any case. Many tokens are brought together by adapter, and back.
    """

    def __init__(self, adapters: ManyAdapters, places: np.ndarray[Any, Any], device: torch.device, *, together: bool = False) -> None:
        """`together`: few tokens go through all adapters at once also where only some have one, and it is the same."""
        self._adapters = adapters
        self.places = send(places.astype(np.int64), device)
        self.present = sorted({int(place) for place in places} - {-1})
        members = [np.flatnonzero(places == place) for place in self.present]
        ends = np.cumsum([len(each) for each in members]).tolist()
        self.alone = ends == [len(places)]  # one adapter for all
        self.few = (len(self.present) > 1 or (together and not self.alone)) and len(places) <= MANY
        self.groups = [slice(end - len(each), end) for end, each in zip(ends, members, strict=True)]
        back = np.full(len(places), ends[-1])  # tokens without an adapter find a row of zeros behind the others
        back[np.concatenate(members)] = np.arange(ends[-1])
        self._gather, self._back = send(np.concatenate(members), device), send(back, device)
        own = places[:, None] == np.arange(adapters.places)[None]
        self._own = send(own, device)[:, :, None].to(adapters.policy.dtype)

    def stack(self, paths: tuple[str, ...]) -> Stack | None:
        """The adapters' factors for layers on one input."""
        return self._adapters.stack(paths)

    @property
    def form(self) -> tuple[Any, ...] | None:
        """What a recorded step depends on besides the numbers that `replace` moves; None where it cannot be recorded."""
        if not (self.alone or self.few):
            return None
        return self._adapters.moves, self.present[0] if self.alone else None

    def replace(self, other: Mix) -> None:
        """Say what another mix of the same form says, in the same memory."""
        self.places.copy_(other.places, non_blocking=True)
        self._own.copy_(other._own, non_blocking=True)

    def add(self, spans: Mapping[str, slice], x: Tensor, y: Tensor) -> None:
        """Add to y [N, outputs of all layers] what the tokens' adapters make of x [N, in], in place; `spans`: where each layer's stand."""
        stack = self._adapters.stack(tuple(spans))
        if stack is None:
            return
        x = x.to(stack.a.dtype)
        if self.alone:
            (place,) = self.present
            small = x @ stack.a[place].t()
            for path, (rank, b) in stack.b.items():
                y[:, spans[path]] += small[:, rank] @ b[place]
        elif self.few:
            own = (x @ stack.a.flatten(0, 1).t()).view(len(x), len(stack.a), -1) * self._own
            for path, (rank, b) in stack.b.items():
                y[:, spans[path]] += own[:, :, rank].reshape(len(x), -1) @ b.flatten(0, 1)
        else:
            self._add_by_group(stack, spans, x.index_select(0, self._gather), y)

    def _add_by_group(self, stack: Stack, spans: Mapping[str, slice], x: Tensor, y: Tensor) -> None:
        """The same for tokens [M, in] that stand together by adapter."""
        small = x.new_empty(len(x), stack.a.shape[1])
        for place, group in zip(self.present, self.groups, strict=True):
            torch.mm(x[group], stack.a[place].t(), out=small[group])
        for path, (rank, b) in stack.b.items():
            more = x.new_empty(len(x) + 1, b.shape[2])
            more[-1].zero_()
            for place, group in zip(self.present, self.groups, strict=True):
                torch.mm(small[group, rank], b[place], out=more[group])
            y[:, spans[path]] += more.index_select(0, self._back)
