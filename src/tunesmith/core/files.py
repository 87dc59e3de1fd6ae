"""Files that are complete or absent: atomic writes, hashes, JSON lines."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.core.errors import CapacityError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_folder() -> Path:
    """Where things are kept that can be made again: $TUNESMITH_CACHE, or ~/.cache/tunesmith."""
    given = os.environ.get("TUNESMITH_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "tunesmith"


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder to fill beside `final`; it takes the final name only when the block ends well.

    Every file is flushed to disk before the rename, so a reader sees the whole folder or none. When the block fails,
    what was written is removed and an older folder of that name stays as it was.
    Raises CapacityError when the disk is full.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        # Some writers (safetensors) make files that only their owner may read, whatever the user's mask says.
        readable = aside.stat().st_mode & 0o666
        for path in sorted(aside.rglob("*")):
            if path.is_file():
                path.chmod(readable)
                _sync(path)
        _sync(aside)
        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        if final.exists():
            final.rename(old)
        aside.rename(final)
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if _is_full(error):
            raise full_disk(final) from error
        raise


def full_disk(path: Path) -> CapacityError:
    """The error to raise when nothing more can be written at `path`."""
    return CapacityError(
        f"the disk is full: could not write {path.name}",
        where=str(path),
        remedy="nothing older was touched; free some space (or choose another run.out) and run the same command again",
        code="disk_full",
    )


def _is_full(error: BaseException) -> bool:
    # safetensors and torch wrap the operating system's error in their own and keep its text.
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    text = str(error)
    return any(word in text for word in ("No space left", "Disk quota exceeded", "File too large", "unexpected pos"))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if _is_full(error):
            raise full_disk(path) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_hash(folder: Path, suffixes: tuple[str, ...]) -> str:
    """SHA-256 over names and bytes of the files in `folder` that end in one of `suffixes`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(suffixes)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + file_hash(path).encode())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
