"""What the processor of this machine can do, read from the system and not from the code that is tested."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from tunesmith.model import native, native_library

COMPILER = shutil.which(os.environ.get("CXX") or "g++") is not None
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler here")
BLOCKS = {torch.float32: "avx512f", torch.bfloat16: "avx512_bf16", torch.int8: "avx512_vnni"}


def able(*features: str) -> bool:
    """Whether the processor has one of these features, and oneDNN is not told to do without some."""
    return "ONEDNN_MAX_CPU_ISA" not in os.environ and any(feature.encode() in native_library.processor().split() for feature in features)


def blocks(dtype: torch.dtype) -> bool:
    """Whether products of blocks must be there: where the processor has what they take, their absence is a failure."""
    return native.multiplier(dtype) is not None or able(BLOCKS[dtype])


PAIRS = COMPILER and native._on and able("avx512_bf16") and not able("amx_bf16")  # by the system's word: then our products must be there
needs_pairs = pytest.mark.skipif(not PAIRS, reason="this processor multiplies no pairs of bf16, or has a matrix unit that does")
