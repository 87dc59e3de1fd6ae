"""From a source of the recipe to rows with keys: files, folders of files, and hub data sets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError, RecipeError, did_you_mean
from tunesmith.core.files import file_hash
from tunesmith.core.recipe import Source
from tunesmith.core.types import Row
from tunesmith.data.problem import Problem
from tunesmith.data.readers import READERS, Found, kind_of, read_file, without_holes

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read(source: Source) -> Iterator[Found]:
    """The rows of a source as (key, row), or (key, Problem) where a row cannot be read.

    The columns of `source.columns` are renamed to ours; at most `source.limit` rows are read. Raises DataError when a file
    is missing, of an unknown ending, or broken as a whole, and when the source holds no row at all.
    """
    rows = islice(_rows(source), source.limit)
    empty = True
    for key, row in rows:
        empty = False
        yield key, _renamed(row, source.columns, key) if source.columns and not isinstance(row, Problem) else row
    if empty:
        raise DataError("there is not one row in it", where=source.path, remedy="check that it is the right file", code="empty_file")


def fingerprint(source: Source) -> str:
    """SHA-256 of what a source holds: the bytes of its files, or the rows of a hub data set."""
    digest = hashlib.sha256()
    if Path(source.path).exists():
        for path, name in files_of(source.path):
            digest.update(f"{name}\0{file_hash(path)}\n".encode())
    else:
        for key, row in islice(_rows(source), source.limit):
            digest.update(f"{key}\0{json.dumps(row, sort_keys=True, default=str)}\n".encode())
    return digest.hexdigest()


def files_of(path: str) -> list[tuple[Path, str]]:
    """The data files that a path means, sorted, each with the name used in keys. Raises DataError when there is none."""
    root = Path(path)
    if root.is_file():
        if kind_of(root) not in READERS:
            raise DataError(
                f"the ending '{kind_of(root) or 'none'}' is not a known kind of data{did_you_mean(kind_of(root), READERS)}",
                where=path,
                remedy=f"known: {', '.join(READERS)}, each also with .gz or .zst",
                code="unknown_ending",
            )
        return [(root, path)]
    if root.exists() and not root.is_dir():
        raise DataError(
            "this is a pipe or a device, and rows are read more than once",
            where=path,
            remedy="write the rows to a file first",
            code="no_file",
        )
    if not root.is_dir():
        raise DataError(f"the file does not exist{_neighbour(root)}", where=path, remedy="check the path", code="no_file")
    found = [p for p in sorted(root.rglob("*")) if p.is_file() and kind_of(p) in READERS and not _hidden(p, root)]
    if not found:
        raise DataError("the folder holds no data file", where=path, remedy=f"known: {', '.join(READERS)}", code="no_file")
    return [(p, f"{path.rstrip('/')}/{p.relative_to(root).as_posix()}") for p in found]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _neighbour(path: Path) -> str:
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _rows(source: Source) -> Iterator[Found]:
    path = source.path
    if Path(path).exists() or kind_of(Path(path)) in READERS or not _HUB_ID.fullmatch(path):
        for file, name in files_of(path):
            yield from read_file(file, name)
    else:
        yield from keyed(_hub(source), f"{path}:{source.split}")


def keyed(rows: Iterable[Row], name: str) -> Iterator[Found]:
    """The rows of a hub data set (one loaded by `datasets`, streaming or not) with keys `name:number`."""
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", without_holes(row)


def _hub(source: Source) -> Any:
    if source.streaming and source.limit is None:
        raise RecipeError("a streamed data set needs a limit", where=source.path, remedy="set limit: 10000", code="no_limit")
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=source.streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        near = _neighbour(Path(source.path))
        raise DataError(
            f"there is no such file{near or ''}, and the hub data set cannot be loaded: {' '.join(str(error).split())[:300]}",
            where=source.path,
            remedy="check the path or id, the split and the subset, and that the hub can be reached",
            code="no_data_set",
        ) from error


def _renamed(row: Row, columns: dict[str, str], key: str) -> Row | Problem:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        return Problem(
            key,
            "no_column",
            f"there is no column '{missing[0]}'{did_you_mean(missing[0], row)}",
            f"mend data columns; the row has: {', '.join(map(str, row))}",
        )
    taken = set(columns.values())
    return {name: value for name, value in row.items() if name not in taken} | {ours: row[theirs] for ours, theirs in columns.items()}
