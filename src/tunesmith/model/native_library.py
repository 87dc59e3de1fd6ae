"""The shared library of our C++ functions (see native.py): made once for a machine, by its own compiler, and kept."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tunesmith.core.files import cache_folder
from tunesmith.core.log import logger

SOURCES = Path(__file__).parent / "cpp"
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-Wno-psabi",
    "-fPIC",
)
SECONDS = 300  # that the compiler may take


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The compiled file, made now if this machine has none of this source yet."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if sys.platform != "linux" or compiler is None:
        logger.info("no C++ compiler (g++) is found: elementwise passes go through PyTorch's operations, which is slower")
        return None
    try:
        folder = cache_folder() / "native"
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
        sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
        known = [*sources, version, " ".join(FLAGS).encode(), torch.__version__.encode(), processor()]
        place = folder / f"{hashlib.sha256(b'|'.join(known)).hexdigest()[:16]}.so"
        if not place.exists():
            _compile(compiler, place)
        return ctypes.CDLL(str(place))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: nobody knows a home folder
        output = getattr(error, "stderr", None) or b""
        said = " ".join((output.decode(errors="replace") or str(error)).split())[:300]
        logger.warning("our compiled functions cannot be used, PyTorch's operations take their place, which is slower: %s", said)
        return None


def _compile(compiler: str, place: Path) -> None:
    """In a folder of its own first: other processes may be doing the same, and none of them finds half a file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        parts = [(path, Path(folder) / f"{path.stem}.o") for path in sorted(SOURCES.glob("*.cpp"))]
        commands = [[compiler, *FLAGS, "-c", str(path), "-o", str(part)] for path, part in parts]
        # The OpenMP that PyTorch brings, under whatever name: with another one beside it two teams of threads would fight for the cores.
        openmp = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")] or ["-lgomp"]
        made = Path(folder) / place.name
        run = functools.partial(subprocess.run, capture_output=True, check=True, timeout=SECONDS)
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, commands))
        run([compiler, "-shared", *(str(part) for _, part in parts), *openmp, "-o", str(made)])
        made.replace(place)


def processor() -> bytes:
    """What this processor can do: a home folder may be shared by machines of several kinds."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return "".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags", "Features")).encode()
