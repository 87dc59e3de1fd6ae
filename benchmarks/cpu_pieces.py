"""The single operations behind our choices on a CPU, timed alone: best of some repetitions, in milliseconds.

Attention of packed documents against PyTorch's own one document at a time (forward and backward, bf16, 9 query and 3 key heads of
64), with glibc keeping freed memory or not; an addition in fp32 and bf16; RMSNorm by plain operations and by PyTorch's function;
products with weights as they are, packed by oneDNN, and in int8.
Usage: python benchmarks/cpu_pieces.py [--default-malloc] [--out records/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.model.allocator import keep_freed_memory
from tunesmith.model.bucket_attention import bucket_attention
from tunesmith.model.layer_ops import rms_norm
from tunesmith.model.layout import Layout

REPEATS = 15


def best(work: Callable[[], object]) -> float:
    """The fastest of REPEATS runs, in milliseconds."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return round(1e3 * min(seconds), 3)


def attention(lengths: list[int]) -> dict[str, float]:
    """Forward and backward pass of all documents, ours and scaled_dot_product_attention one by one."""
    layout = Layout(lengths, torch.device("cpu"))
    q, k, v = (torch.randn(layout.total, heads, 64).bfloat16().requires_grad_() for heads in (9, 3, 3))
    slope = torch.randn(layout.total, 9, 64).bfloat16()

    def ours() -> None:
        torch.autograd.grad(bucket_attention(q, k, v, layout, 0.125, 0), (q, k, v), slope)

    def theirs() -> None:
        outs = []
        for a, b in layout.spans:
            one = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
            outs.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        torch.autograd.grad(torch.cat(outs), (q, k, v), slope[: layout.real])

    return {"blocks": best(ours), "sdpa": best(theirs)}


def products() -> dict[str, float]:
    """[512, 576] x [576, 1536]."""
    x, weight = torch.randn(512, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 512)
    narrow, eighth = (torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((512, 576), (576, 1536)))
    scales = torch.rand(1536)

    def scaled() -> Tensor:
        size = x.abs().amax(1, keepdim=True).float() / 127
        rounded = (x / size).round().to(torch.int8)
        return (torch._int_mm(rounded, eighth).float() * size * scales).bfloat16()

    return {
        "bf16": best(lambda: x @ weight.t()),
        "bf16, packed by oneDNN": best(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")),
        "int8": best(lambda: torch._int_mm(narrow, eighth)),
        "int8 with rounding and scales": best(scaled),
    }


def elementwise() -> dict[str, float]:
    """[1024, 576]."""
    wide = torch.randn(1024, 576)
    narrow, weight = wide.bfloat16(), torch.ones(576)
    return {
        "addition fp32": best(lambda: wide + wide),
        "addition bf16": best(lambda: narrow + narrow),
        "RMSNorm, plain operations": best(lambda: rms_norm(wide, weight, 1e-5)),
        "RMSNorm, PyTorch's function": best(lambda: F.rms_norm(wide, (576,), weight, 1e-5)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's memory settings as they are")
    parser.add_argument("--out", type=Path, help="the record, JSON")
    words = parser.parse_args()
    if not words.default_malloc:
        keep_freed_memory()
    found = {
        "threads": torch.get_num_threads(),
        "keeps freed memory": not words.default_malloc,
        **{f"attention {name}": attention(lengths) for name, lengths in (("1024", [1024]), ("2048", [2048]), ("4 x 256", [256] * 4))},
        "products": products(),
        "elementwise": elementwise(),
    }
    print(json.dumps(found, indent=2))
    if words.out:
        words.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
