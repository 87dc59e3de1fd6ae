"""Rows as flat arrays: ids and weights end to end, in memory or mapped from disk."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import BugError
from tunesmith.core.types import Tokens

Array = npt.NDArray[Any]
WORDS = ("key", "group", "role")


class TokenSet:
    """All rows of one split, read-only; row i stands at offsets[i] .. offsets[i+1] of the flat arrays.

    `lengths` [R] int64 tokens a row; `trained` [R] float64 sum of the row's train weights; `repeats` [R] float64 how often a row
    is seen in an epoch on average; `hash` 64 hex digits over all of it. `tokens[i]` gives one row without copying.
    """

    def __init__(self, arrays: dict[str, Array], hash: str) -> None:
        self._arrays = arrays
        # A view of the buffer gives Python's own integers, several times as fast as an array gives its scalars.
        self._ends = arrays["offsets"].data
        self._streams = {name.removeprefix("stream."): array for name, array in arrays.items() if name.startswith("stream.")}
        self._words = {name: (arrays[name].data, arrays[f"{name}.offsets"].data) for name in WORDS}
        self.lengths: npt.NDArray[np.int64] = np.diff(arrays["offsets"])
        self.repeats: npt.NDArray[np.float64] = arrays["repeats"]
        self.trained: npt.NDArray[np.float64] = arrays["trained"]
        self.hash = hash
        self._groups: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Tokens:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        place = int(row) % len(self)
        start, stop = self._ends[place], self._ends[place + 1]
        return Tokens(
            ids=self._arrays["ids"][start:stop],
            train=self._arrays["train"][start:stop],
            key=self._word("key", place),
            group=self._word("group", place),
            role=self._word("role", place),
            streams={name: array[start:stop] for name, array in self._streams.items()},
        )

    def __iter__(self) -> Iterator[Tokens]:
        return (self[row] for row in range(len(self)))

    def key(self, row: int) -> str:
        """The key of a row without its arrays."""
        return self._word("key", row)

    def groups(self) -> npt.NDArray[np.int64]:
        """The rows [G] at which a group begins: contiguous rows of the same group that has a name; any other row is one alone."""
        if self._groups is None:
            self._groups = _group_starts(self._arrays["group"], self._arrays["group.offsets"])
        return self._groups

    def with_stream(self, name: str, values: Array) -> TokenSet:
        """The same rows with one more stream [sum of lengths] float32 beside them; the hash stays that of the rows."""
        return TokenSet({**self._arrays, f"stream.{name}": values}, self.hash)

    def _word(self, name: str, row: int) -> str:
        letters, ends = self._words[name]
        return bytes(letters[ends[row] : ends[row + 1]]).decode() if letters else ""

    def save(self, folder: Path) -> None:
        """Write one .npy a flat array."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in self._arrays.items():
            np.save(folder / f"{name}.npy", values, allow_pickle=False)


def _group_starts(letters: Array, ends: Array) -> npt.NDArray[np.int64]:
    sizes = np.diff(ends)
    begins = np.ones(len(sizes), dtype=np.bool_)
    # Rows whose group has as many letters as that of the row before: those letters are compared, end to end.
    alike = np.flatnonzero((sizes[1:] == sizes[:-1]) & (sizes[1:] > 0)) + 1
    if len(alike):
        lengths = sizes[alike]
        first = np.cumsum(lengths) - lengths
        within = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
        same = letters[np.repeat(ends[alike], lengths) + within] == letters[np.repeat(ends[alike - 1], lengths) + within]
        begins[alike] = ~np.logical_and.reduceat(same, first)
    return np.flatnonzero(begins)


def load_set(folder: Path) -> TokenSet:
    """The set that `save` wrote, memory-mapped and hashed anew. Raises OSError, ValueError or KeyError when it is not whole."""
    arrays: dict[str, Array] = {}
    for path in sorted(folder.glob("*.npy")):
        # An empty file cannot be mapped.
        empty = np.load(path, allow_pickle=False, mmap_mode=None) if path.stat().st_size <= 128 else None
        # Without the subclass `memmap`, whose slices cost several times as much.
        arrays[path.name.removesuffix(".npy")] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False) if empty is None else empty)
    if missing := {"ids", "train", "offsets", "repeats", "trained"} - set(arrays):
        raise KeyError(f"arrays missing: {sorted(missing)}")
    return TokenSet(arrays, _hash(arrays))


class Builder:
    """Collects rows, end to end as they come, and makes the set; no row is kept as an object of its own."""

    def __init__(self) -> None:
        self._ids = bytearray()
        self._train = bytearray()
        self._streams: dict[str, bytearray] = {}
        self._words: dict[str, bytearray] = {name: bytearray() for name in WORDS}
        self._sizes: dict[str, array[int]] = {name: array("q") for name in WORDS}  # bytes of each row's word
        self._lengths = array("q")
        self._trained = array("d")
        self._repeats = array("d")

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, tokens: Tokens, repeats: float) -> None:
        """One more row, seen `repeats` times an epoch. Raises BugError when its arrays do not belong together."""
        if not self._lengths:
            self._streams = {name: bytearray() for name in tokens.streams}
        _check(tokens, set(self._streams))
        train = np.asarray(tokens.train, dtype=np.float32)
        self._ids += np.asarray(tokens.ids, dtype=np.int32).tobytes()
        self._train += train.tobytes()
        for name, values in tokens.streams.items():
            self._streams[name] += np.asarray(values, dtype=np.float32).tobytes()
        for name, word in zip(WORDS, (tokens.key, tokens.group, tokens.role), strict=True):
            letters = word.encode()
            self._words[name] += letters
            self._sizes[name].append(len(letters))
        self._lengths.append(len(tokens))
        self._trained.append(float(train.sum(dtype=np.float64)))
        self._repeats.append(repeats)

    def build(self) -> TokenSet:
        """The set of all rows added, in the builder's own memory: nothing can be added afterwards."""
        arrays: dict[str, Array] = {
            "ids": np.frombuffer(self._ids, dtype=np.int32),
            "train": np.frombuffer(self._train, dtype=np.float32),
            "offsets": _ends(self._lengths),
            "repeats": np.frombuffer(self._repeats, dtype=np.float64),
            "trained": np.frombuffer(self._trained, dtype=np.float64),
        }
        for name, values in self._streams.items():
            arrays[f"stream.{name}"] = np.frombuffer(values, dtype=np.float32)
        for name, letters in self._words.items():
            arrays[name] = np.frombuffer(letters, dtype=np.uint8)
            arrays[f"{name}.offsets"] = _ends(self._sizes[name])
        for flat in arrays.values():
            flat.flags.writeable = False
        return TokenSet(arrays, _hash(arrays))


def _check(tokens: Tokens, streams: set[str]) -> None:
    size = len(tokens.ids)
    if size == 0 or len(tokens.train) != size or any(len(values) != size for values in tokens.streams.values()):
        raise BugError("a row's arrays are empty or differ in length", where=tokens.key)
    if tokens.train[0] != 0:
        raise BugError("the first token of a row is trained, but nothing predicts it", where=tokens.key)
    if set(tokens.streams) != streams:
        raise BugError("rows of one set carry different streams", where=tokens.key)


def _ends(lengths: array[int]) -> Array:
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.frombuffer(lengths, dtype=np.int64), out=ends[1:])
    return ends


def _hash(arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}\0{arrays[name].dtype.str}\0{len(arrays[name])}\0".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
