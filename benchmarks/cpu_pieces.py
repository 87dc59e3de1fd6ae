"""The single operations behind our choices on a CPU, timed alone: best of some repetitions, in milliseconds.

Attention of packed documents against PyTorch's own one document at a time (forward and backward, bf16, 9 query and 3 key heads of
64), with glibc keeping freed memory or not; an addition in fp32 and bf16; norms, gates, log-probabilities, attention and draws by our
compiled functions and by PyTorch's operations; products with weights as they are, packed by oneDNN, and in int8; our products of training
in bf16 and in 8 bits, both ways, in TFLOP/s; a sampling step of 32
rows with 164 tokens each on the shape of SmolLM2-135M in one compiled function and by PyTorch's operations, and its products alone in large
and small pages.
Usage: python benchmarks/cpu_pieces.py [--default-malloc] [--out records/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.ports import SampleSettings
from tunesmith.core.recipe import Fast
from tunesmith.infer.draw import Asked, draw
from tunesmith.model import huge_pages, native
from tunesmith.model.allocator import keep_freed_memory
from tunesmith.model.bucket_attention import bucket_attention
from tunesmith.model.cached import Cache
from tunesmith.model.eight import Eight
from tunesmith.model.feed import NextTokens
from tunesmith.model.head import HeadForm, token_logprobs
from tunesmith.model.layer_ops import Linear, gate, gate_backward, input_gradient, linears, rms_norm, rms_norm_backward
from tunesmith.model.layout import Layout
from tunesmith.model.next_token import NextToken
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle
from tunesmith.model.products import Blocked

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
        "RMSNorm, PyTorch's function": best(lambda: F.rms_norm(wide, (576,), weight, 1e-5)),
    }


def compiled() -> dict[str, dict[str, float]]:
    """Our functions and PyTorch's operations.

    Norm [1024, 576], gate [1024, 1536], log-probabilities [128, 49152] with their gradients, attention of 16 documents of 100 tokens
    without and with its gradients, and the draw of 32 tokens from 49,152 at two temperatures.
    """
    x, weight, dy = torch.randn(1024, 576), torch.ones(576).bfloat16(), torch.randn(1024, 576).bfloat16()
    _, unit, inverse = rms_norm(x, weight, 1e-5)
    inner, up, d = (torch.randn(1024, 1536).bfloat16() for _ in range(3))
    hidden, head = torch.randn(128, 576).bfloat16().requires_grad_(), torch.randn(49152, 576).bfloat16()
    targets = torch.randint(0, 49152, (128,))
    layout = Layout([100] * 16, torch.device("cpu"))
    qkv = [torch.randn(layout.total, heads, 64).bfloat16().requires_grad_() for heads in (9, 3, 3)]
    slope, logits, uniform = torch.randn(layout.total, 9, 64).bfloat16(), 3 * torch.randn(32, 49152), torch.rand(32).tolist()

    def look_back(backwards: bool) -> None:
        out = bucket_attention(qkv[0], qkv[1], qkv[2], layout, 0.125, 0)
        if backwards:
            torch.autograd.grad(out, qkv, slope)

    works: dict[str, Callable[[], object]] = {
        "norm": lambda: rms_norm(x, weight, 1e-5),
        "norm's gradient": lambda: rms_norm_backward(dy, unit, inverse, weight, False),
        "gate": lambda: gate(inner, up),
        "gate's gradient": lambda: gate_backward(d, inner, up),
        "log-probabilities": lambda: token_logprobs(hidden, head, None, targets, HeadForm(), torch.bfloat16),
        "attention": lambda: look_back(False),
        "attention and its gradients": lambda: look_back(True),
        **{f"draw at temperature {heat}": partial(draw, logits, [Asked(SampleSettings(1, heat))] * 32, uniform) for heat in (0.0, 0.7)},
    }
    found: dict[str, dict[str, float]] = {name: {} for name in works}
    for on in (True, False):
        with native.switched(on):
            for name, work in works.items():
                found[name]["compiled" if on else "PyTorch's operations"] = best(work)
    return found


def step() -> dict[str, float]:
    """A token more for 32 rows that have 164 each: all layers, norm and head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, vocab_size=49152,
        tie_word_embeddings=True,
    )  # fmt: skip
    policy = Policy(LlamaForCausalLM(shape).to(torch.bfloat16).eval().requires_grad_(False), torch.bfloat16)
    settle(policy, Fast())
    found = {}
    for name, on, int8 in (("bf16", True, False), ("int8", True, True), ("bf16, PyTorch's operations", False, False)):
        cache, tokens = Cache(), dict.fromkeys(range(32), (7, 163))
        for row in tokens:
            cache.add(row, 164)

        one = NextToken(policy, int8=int8)

        def once(cache: Cache = cache, tokens: dict[int, tuple[int, int]] = tokens, one: NextToken = one) -> None:
            feed = NextTokens(cache, tokens, policy.device)
            one.logits(feed, feed.last)

        with native.switched(on), one.ready():
            once()  # makes ready what each layer reads
            found[name] = best(once)
        one.forget()
    return found


def in_turn(ways: list[Blocked], rows: dict[int, Tensor]) -> None:
    """One product after the other."""
    for way in ways:
        way(rows[way.inputs])


def pages() -> dict[str, float]:
    """The products of a step for 32 rows, one after the other, in large pages and in pages of 4 kB; gigabytes of weights a second."""
    shapes = [(960, 576), (576, 576), (3072, 576), (576, 1536)] * 30 + [(49152, 576)]
    rows = {width: torch.randn(32, width).bfloat16() for width in (576, 1536)}
    size = sum(2 * outputs * inputs for outputs, inputs in shapes) / 1e6
    found = {}
    for name, advise in (("large", huge_pages.advise), ("small", lambda *_: 0)):
        huge_pages.WEIGHTS = huge_pages.Area()
        with mock.patch.object(huge_pages, "advise", advise):
            ways = [Blocked([torch.randn(*shape).bfloat16()], None, torch.bfloat16) for shape in shapes]
        found[name] = round(size / best(partial(in_turn, ways, rows)), 1)
    return found


def training() -> dict[str, float]:
    """x W^T and dy W for 1,024 tokens on the shapes of SmolLM2-135M's layers, rounding included: in TFLOP/s."""
    fast, found = native.kernels(torch.bfloat16), {}
    if fast is None or not fast.pairs:
        return {}
    for inputs, outputs in ((576, 576), (576, 1536), (1536, 576)):
        x, weight, dy = (torch.randn(*shape).bfloat16() for shape in ((1024, inputs), (outputs, inputs), (1024, outputs)))
        eight = Eight.of(weight)
        linear = Linear(weight, None, None, None, 1.0, False, False)
        for name, one in (("bf16", linear), ("8 bits", replace(linear, eight=eight))):
            ways = {"there": partial(linears, x, [one]), "back": partial(input_gradient, [dy], None, [one])}
            for way, work in ways.items():
                found[f"{inputs} x {outputs}, {name}, {way}"] = round(2 * 1024 * inputs * outputs / 1e9 / best(work), 3)
    return found


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
        "products of training, TFLOP/s": training(),
        "elementwise": elementwise(),
        "compiled functions": compiled(),
        "a sampling step": step(),
        "gigabytes a second": pages(),
    }
    print(json.dumps(found, indent=2))
    if words.out:
        words.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
