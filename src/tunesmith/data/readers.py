"""One reader a file type: bytes to rows, each row with its number, each fault named where it stands.

A fault of one row is a Problem and reading goes on; a fault of the whole file is a DataError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from tunesmith.core.errors import DataError
from tunesmith.core.types import Row
from tunesmith.data.problem import Problem

Found = tuple[str, Row | Problem]
LONGEST_LINE = 64 << 20  # bytes; a longer line is a file that is not JSON lines, or a mistake
WRAPPERS = ("data", "rows", "examples", "train", "items")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _RepeatedKeyError(ValueError):
    pass


class _ZstdFile(io.RawIOBase):
    """The bytes of a .zst file; raises EOFError when it ends inside a frame (the library's own reader just ends early)."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = path.open("rb")
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready and (packed := self._file.read(1 << 18)):
            if self._frame is None:
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(packed))
            if self._frame.eof:
                # The next frame begins in what was read too much.
                self._file.seek(-len(self._frame.unused_data), io.SEEK_CUR)
                self._frame = None
        if not self._ready and self._frame is not None:
            raise EOFError("it ends in the middle")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked when its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path), 1 << 20)
    return path.open("rb")


def read_file(path: Path, name: str) -> Iterator[Found]:
    """The rows of one file as (key, row or problem), with key `name:number`.

    The number is the line for .jsonl, the first line of the record for .csv and .tsv, and the place (from 1) for .json
    arrays and .parquet. A .txt or .md file is one document. Raises DataError when the file as a whole cannot be read.
    """
    try:
        yield from READERS[kind_of(path)](path, name)
    except _packing_errors(path) as error:
        _raise(name, f"the packed file is broken: {error}", "copy or download it again", "broken_archive", error)
    except OSError as error:
        _raise(name, f"the file cannot be read: {error.strerror or error}", "check the path and its rights", "unreadable_file", error)


def _packing_errors(path: Path) -> tuple[type[Exception], ...]:
    if path.suffix == ".zst":
        import zstandard

        return (zstandard.ZstdError, EOFError)
    return (zlib.error, gzip.BadGzipFile, EOFError)


def kind_of(path: Path) -> str:
    """The ending that decides the reader: '.jsonl' for 'a.jsonl.gz'."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def parse_row(text: str, key: str) -> Row | Problem:
    """One JSON object from text; the problem names line, column and what stood there."""
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        around = text[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ")
        return Problem(
            key,
            "broken_json",
            f"broken JSON at column {error.pos + 1}: {error.msg}, near {around!r}",
            "mend the line; every line is one JSON object",
        )
    except (_RepeatedKeyError, RecursionError) as error:
        return Problem(key, "broken_json", f"broken JSON: {error}", "mend the line")
    except ValueError as error:
        return Problem(key, "not_a_number", str(error), "write null or a number")
    return _object(value, key, text)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError at NaN, Infinity and at a key that stands twice in one object."""
    return _DECODER.decode(text)


def _object(value: Any, key: str, text: str | None = None) -> Row | Problem:
    if not isinstance(value, dict):
        return Problem(key, "not_an_object", f"the row is {_kind(value)}, not an object: {_short(value)}", 'write {"name": value, ...}')
    wrong = half_character(json.dumps(value, ensure_ascii=False)) if text is None or _ESCAPED_SURROGATE.search(text) else None
    return value if wrong is None else Problem(key, "half_character", wrong, "write the whole character")


def half_character(text: str) -> str | None:
    """What no tokenizer takes: half of a surrogate pair, in words; None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair stands alone: {error.object[error.start : error.end]!r}"
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: Row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise _RepeatedKeyError(f"the key '{twice}' stands twice in one object")
    return row


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_constant)


def _read_jsonl(path: Path, name: str) -> Iterator[Found]:
    number, offset = 0, 0
    with open_bytes(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            key, start = f"{name}:{number}", offset
            offset += len(line)
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                    offset += len(line)
                yield (
                    key,
                    Problem(
                        key,
                        "line_too_long",
                        f"the line has {offset - start:,} bytes; the limit is {LONGEST_LINE:,}",
                        "one row a line; cut it",
                    ),
                )
                continue
            if number == 1:
                _refuse_utf16(line, name)
                line = line.removeprefix(b"\xef\xbb\xbf")
                start = offset - len(line)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield key, _not_utf8(key, line, error, start)
                continue
            if text.strip():
                yield key, parse_row(text.rstrip("\r\n"), key)


def _not_utf8(key: str, data: bytes, error: UnicodeDecodeError, start: int) -> Problem:
    return Problem(
        key,
        "not_utf8",
        f"not UTF-8: byte 0x{data[error.start]:02x} at offset {start + error.start} of the file",
        "save the file as UTF-8 (for example: iconv -f latin1 -t utf-8)",
    )


def _refuse_utf16(head: bytes, name: str) -> None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("the file is UTF-16, not UTF-8", where=name, remedy="save it as UTF-8 (iconv -f utf-16 -t utf-8)", code="not_utf8")


def _text_of(path: Path, name: str) -> str:
    with open_bytes(path) as file:
        data = file.read()
    _refuse_utf16(data, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = _not_utf8(f"{name}:{line}", data, error, 0)
        raise DataError(problem.message, where=problem.key, remedy=problem.remedy, code=problem.code) from error


def _read_json(path: Path, name: str) -> Iterator[Found]:
    text = _text_of(path, name)
    if not text.strip():
        return
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path, name)  # JSON lines under the other name
            return
        around = text[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ")
        message = f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}, near {around!r}"
        _raise(f"{name}:{error.lineno}", message, "mend the file", "broken_json", error)
    except ValueError as error:
        _raise(name, f"broken JSON: {error}", "mend the file", "broken_json", error)
    for number, row in enumerate(_rows_in(value, name), 1):
        key = f"{name}:{number}"
        yield key, _object(row, key)


def _rows_in(value: Any, name: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        # {"data": [rows]} is a wrapped list; {"conversations": [turns]} is one row.
        if len(lists := [word for word in WRAPPERS if isinstance(value.get(word), list)]) == 1:
            return cast(list[Any], value[lists[0]])
        return [value]
    raise DataError(
        f"the file holds {_kind(value)}: {_short(value)}", where=name, remedy="a .json file is a list of objects", code="not_an_object"
    )


def _read_csv(path: Path, name: str) -> Iterator[Found]:
    csv.field_size_limit(LONGEST_LINE)
    text = _text_of(path, name)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header) or not all(header):
            _raise(
                f"{name}:1",
                f"the header names a column twice or not at all: {header}",
                "give every column its own name",
                "bad_header",
                None,
            )
        before = reader.line_num
        for cells in reader:
            key, before = f"{name}:{before + 1}", reader.line_num
            if len(cells) == len(header):
                yield key, dict(zip(header, cells, strict=True))
            elif cells:
                message = f"{len(cells)} cells under a header of {len(header)}: {_short(cells)}"
                yield key, Problem(key, "ragged_row", message, "quote cells that hold commas or line breaks")
    except csv.Error as error:
        _raise(f"{name}:{reader.line_num}", f"broken CSV: {error}", "mend the quotes", "broken_csv", error)


def _read_parquet(path: Path, name: str) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(io.BytesIO(_plain_bytes(path)) if path.suffix in (".gz", ".zst") else path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", without_holes(row)
    except pyarrow.ArrowException as error:
        _raise(name, f"the parquet file is broken: {error}", "write or download it again", "broken_parquet", error)


def _plain_bytes(path: Path) -> bytes:
    with open_bytes(path) as file:
        return file.read()


def without_holes(row: Row) -> Row:
    """The row without the None that Arrow puts into nested structs for keys another row has.

    One schema holds for all rows there, so {"a": 1} becomes {"a": 1, "b": None} beside {"b": 2}; a tool schema with such holes
    is rendered differently from the one that was written.
    """
    return {name: _prune(value) for name, value in row.items()}


def _prune(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _prune(item) for name, item in value.items() if item is not None}
    return [_prune(item) for item in value] if isinstance(value, list) else value


def _read_document(path: Path, name: str) -> Iterator[Found]:
    text = _text_of(path, name)
    if text.strip():
        yield f"{name}:1", {"text": text}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _short(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def _raise(where: str, message: str, remedy: str, code: str, cause: BaseException | None) -> NoReturn:
    raise DataError(message, where=where, remedy=remedy, code=code) from cause


READERS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_document,
    ".md": _read_document,
}
