"""Rows as flat arrays: ids and weights end to end, in memory or mapped from disk."""

from __future__ import annotations

import hashlib
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
        self._offsets = arrays["offsets"]
        self._streams = {name.removeprefix("stream."): array for name, array in arrays.items() if name.startswith("stream.")}
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets)
        self.repeats: npt.NDArray[np.float64] = arrays["repeats"]
        self.trained: npt.NDArray[np.float64] = arrays["trained"]
        self.hash = hash

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Tokens:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        place = int(row) % len(self)
        start, stop = int(self._offsets[place]), int(self._offsets[place + 1])
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

    def _word(self, name: str, row: int) -> str:
        ends = self._arrays[f"{name}.offsets"]
        return bytes(self._arrays[name][int(ends[row]) : int(ends[row + 1])]).decode()

    def save(self, folder: Path) -> None:
        """Write one .npy a flat array."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in self._arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)


def load_set(folder: Path) -> TokenSet:
    """The set that `save` wrote, memory-mapped and hashed anew. Raises OSError, ValueError or KeyError when it is not whole."""
    arrays: dict[str, Array] = {}
    for path in sorted(folder.glob("*.npy")):
        # An empty file cannot be mapped.
        empty = np.load(path, allow_pickle=False, mmap_mode=None) if path.stat().st_size <= 128 else None
        arrays[path.name.removesuffix(".npy")] = np.load(path, mmap_mode="r", allow_pickle=False) if empty is None else empty
    if missing := {"ids", "train", "offsets", "repeats", "trained"} - set(arrays):
        raise KeyError(f"arrays missing: {sorted(missing)}")
    return TokenSet(arrays, _hash(arrays))


class Builder:
    """Collects rows and makes the set."""

    def __init__(self) -> None:
        self._ids: list[npt.NDArray[np.int32]] = []
        self._train: list[npt.NDArray[np.float32]] = []
        self._streams: dict[str, list[npt.NDArray[np.float32]]] = {}
        self._words: dict[str, list[bytes]] = {name: [] for name in WORDS}
        self._repeats: list[float] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, tokens: Tokens, repeats: float) -> None:
        """One more row, seen `repeats` times an epoch. Raises BugError when its arrays do not belong together."""
        if not self._ids:
            self._streams = {name: [] for name in tokens.streams}
        _check(tokens, set(self._streams))
        self._ids.append(np.asarray(tokens.ids, dtype=np.int32))
        self._train.append(np.asarray(tokens.train, dtype=np.float32))
        for name, values in tokens.streams.items():
            self._streams[name].append(np.asarray(values, dtype=np.float32))
        for name, word in zip(WORDS, (tokens.key, tokens.group, tokens.role), strict=True):
            self._words[name].append(word.encode())
        self._repeats.append(repeats)

    def build(self) -> TokenSet:
        """The set of all rows added."""
        lengths = [len(ids) for ids in self._ids]
        arrays: dict[str, Array] = {
            "ids": _flat(self._ids, np.int32),
            "train": _flat(self._train, np.float32),
            "offsets": _ends(lengths),
            "repeats": np.asarray(self._repeats, dtype=np.float64),
            "trained": np.asarray([float(train.sum(dtype=np.float64)) for train in self._train], dtype=np.float64),
        }
        for name, parts in self._streams.items():
            arrays[f"stream.{name}"] = _flat(parts, np.float32)
        for name, words in self._words.items():
            arrays[name] = np.frombuffer(b"".join(words), dtype=np.uint8)
            arrays[f"{name}.offsets"] = _ends([len(word) for word in words])
        for array in arrays.values():
            array.flags.writeable = False
        return TokenSet(arrays, _hash(arrays))


def _check(tokens: Tokens, streams: set[str]) -> None:
    size = len(tokens.ids)
    if size == 0 or len(tokens.train) != size or any(len(values) != size for values in tokens.streams.values()):
        raise BugError("a row's arrays are empty or differ in length", where=tokens.key)
    if tokens.train[0] != 0:
        raise BugError("the first token of a row is trained, but nothing predicts it", where=tokens.key)
    if set(tokens.streams) != streams:
        raise BugError("rows of one set carry different streams", where=tokens.key)


def _flat(parts: list[Any], kind: type[Any]) -> Array:
    return np.concatenate(parts).astype(kind, copy=False) if parts else np.zeros(0, dtype=kind)


def _ends(lengths: list[int]) -> Array:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def _hash(arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}\0{arrays[name].dtype.str}\0{len(arrays[name])}\0".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
