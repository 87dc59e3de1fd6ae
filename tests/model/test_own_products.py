"""Our products and attention of training in bf16 against fp64: where the processor multiplies pairs of bf16, they must be there."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_batch, make_model, make_policy
from torch import Tensor

from processors import needs_pairs
from tunesmith.model import head, native
from tunesmith.model import layout as layouts
from tunesmith.model.gradients import direct
from tunesmith.model.head import HeadForm
from tunesmith.model.layer_ops import Linear, LinearGrads, linears, linears_backward
from tunesmith.model.layout import Layout

CPU = torch.device("cpu")


def kernels() -> native.Kernels:
    fast = native.kernels(torch.bfloat16)
    assert fast is not None
    assert fast.pairs
    return fast


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(ours: Tensor, truth: Tensor, steps: float) -> None:
    """Within so many roundings of the largest number."""
    assert ours.isfinite().all()
    assert float((ours.double() - truth).abs().max()) <= steps * float(truth.abs().max()), (ours, truth)


FP32, BF16 = 1e-5, 2**-8


@needs_pairs
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 37, 130, 600])
@pytest.mark.parametrize(("depth", "columns"), [(2, 1), (8, 16), (30, 33), (64, 48), (192, 50), (576, 100), (64, 200)])
def test_a_product_is_its_formula(rows: int, depth: int, columns: int) -> None:
    fast, x, weight, bias = kernels(), normal(rows, depth), normal(columns, depth, seed=1), normal(columns, seed=2)
    truth = x.double() @ weight.double().t()
    wide = torch.empty(rows, columns)
    near(fast.dense([(x, weight, False, True)], wide, native.WIDE), truth, FP32)
    near(fast.dense([(x, weight.float(), False, True)], wide, native.WIDE), truth, FP32)
    near(fast.dense([(x, weight.t().contiguous(), False, False)], wide, native.WIDE), truth, FP32)
    near(fast.dense([(x.t().contiguous(), weight.t().contiguous(), True, False)], wide, native.WIDE), truth, FP32)
    held = wide.fill_(3.0)
    near(fast.dense([(x, weight, False, True)], held, native.ADDED), truth + 3, FP32)
    other = normal(rows, columns, seed=3, dtype=torch.float32)
    near(fast.dense([(x, weight, False, True)], wide, native.ADDED, bias=bias, before=other), truth + bias.double() + other.double(), FP32)
    narrow = torch.empty(rows, columns, dtype=torch.bfloat16)
    near(fast.dense([(x, weight, False, True)], narrow, native.NARROW, 0.5, bias), (truth + bias.double()) / 2, BF16)


@needs_pairs
@pytest.mark.parametrize("tokens", [1, 2, 15, 64, 129])
def test_a_product_over_tokens_takes_any_number_of_them(tokens: int) -> None:
    dy, x = normal(tokens, 70), normal(tokens, 34, seed=1)
    near(kernels().dense([(dy, x, True, False)], torch.empty(70, 34), native.WIDE), dy.double().t() @ x.double(), FP32)


@needs_pairs
def test_terms_add_up_and_may_be_columns_of_wider_rows() -> None:
    fast, x, small = kernels(), normal(37, 64), normal(37, 48, seed=1)
    weight, b = normal(90, 64, seed=2), normal(90, 16, seed=3)
    room = torch.full((37, 100), 7.0, dtype=torch.bfloat16)
    fast.dense([(x, weight, False, True), (small[:, 16:32], b, False, True)], room[:, 5:95], native.NARROW)
    near(room[:, 5:95], x.double() @ weight.double().t() + small[:, 16:32].double() @ b.double().t(), BF16)
    assert room[:, :5].eq(7).all()
    assert room[:, 95:].eq(7).all()


@needs_pairs
def test_one_bad_row_leaves_the_others_alone() -> None:
    x = normal(20, 64)
    x[3, 5] = math.nan
    out = kernels().dense([(x, normal(50, 64, seed=1), False, True)], torch.empty(20, 50), native.WIDE)
    assert out[3].isnan().all()
    assert out[:3].isfinite().all()
    assert out[4:].isfinite().all()


def group_of(ranks: list[int | None], dtype: torch.dtype, **flags: Any) -> list[Linear]:
    """Three layers on 64 inputs with factors of these ranks."""
    made = []
    for place, (rank, outs) in enumerate(zip(ranks, (96, 32, 34), strict=True)):
        weight = normal(outs, 64, seed=place, dtype=torch.float32) / 8
        a, b = (None, None) if rank is None else (normal(rank, 64, seed=10 + place) / 8, normal(outs, rank, seed=20 + place) / 8)
        factors = [None if t is None else t.to(dtype) for t in (a, b)]
        made.append(Linear(weight.to(torch.bfloat16).to(dtype), None, *factors, 2.0, flags.get("weight", False), False, flags.get("own")))
    return made


def numbers(found: tuple[Tensor | None, list[LinearGrads]]) -> list[Tensor]:
    dx, grads = found
    assert dx is not None
    return [dx, *(t for grad in grads for t in (grad.weight, grad.a, grad.b) if t is not None)]


@needs_pairs
@pytest.mark.parametrize("ranks", [[None, None, None], [16, 16, 16], [2, None, 8], [3, 4, 5]])
def test_linear_layers_are_nearer_to_fp64_than_pytorchs(ranks: list[int | None]) -> None:
    """Odd ranks go PyTorch's way, and everything agrees with it."""
    x, dys = normal(130, 64), [normal(130, outs, seed=outs) for outs in (96, 32, 34)]

    def run(dtype: torch.dtype) -> list[Tensor]:
        group = group_of(ranks, dtype, weight=True)
        outs, small = linears(x.to(dtype), group)
        return [*outs, *numbers(linears_backward([dy.to(dtype) for dy in dys], x.to(dtype), small, group, True))]

    truth, ours = run(torch.float64), run(torch.bfloat16)
    with native.switched(False):
        plain = run(torch.bfloat16)
    for right, mine, theirs in zip(truth, ours, plain, strict=True):
        far = float((mine.double() - right).abs().max())
        assert far <= 1.1 * float((theirs.double() - right).abs().max()) + 1e-6


@needs_pairs
def test_gradients_of_trained_weights_add_up_in_place() -> None:
    own = torch.nn.Parameter(normal(96, 64, dtype=torch.float32))
    layer = Linear(own.detach().bfloat16(), None, None, None, 1.0, True, False, own)
    x, dy = normal(33, 64), normal(33, 96, seed=1)
    truth = dy.double().t() @ x.double()
    with direct():
        for count in (1, 2, 3):
            (grad,) = linears_backward([dy], x, None, [layer], False)[1]
            assert grad.weight is None
            assert own.grad is not None
            near(own.grad, count * truth, FP32)
    (grad,) = linears_backward([dy], x, None, [layer], False)[1]
    assert grad.weight is not None
    near(grad.weight, truth, FP32)


def plainly(q: Tensor, k: Tensor, v: Tensor, layout: Layout, keys: int, window: int) -> Tensor:
    """Attention in fp64, a document and a query at a time."""
    width, outs = k.shape[1] // keys, []
    for number, (start, end) in enumerate(layout.spans):
        front, tails = layout.trees.get(number, (0, ()))
        for place in range(end - start):
            own = max((tail for tail in tails if tail <= place), default=0)
            seen = [j for j in range(place + 1) if (j < front or j >= own if own else True) and (not window or place - j < window)]
            rows = start + torch.tensor(seen)
            heads = q[start + place].view(keys, -1, width)
            shares = torch.einsum("kgd,jkd->kgj", heads, k[rows].view(-1, keys, width)).softmax(-1)
            outs.append(torch.einsum("kgj,jkd->kgd", shares, v[rows].view(-1, keys, width)).reshape(-1))
    return torch.stack(outs)


@needs_pairs
@pytest.mark.parametrize("held_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", [HeadForm(), HeadForm(0.5, 4.0)])
def test_a_head_is_read_as_it_is(form: HeadForm, biased: bool, held_in: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TILE_BYTES", 2 * 64 * 210), ("DEEP", 64), ("VOCABULARY_STRIP", 100)):
        monkeypatch.setattr(head, name, value)  # several tiles and strips, the last ones short
    weight, hidden = (normal(210, 64, seed=1, dtype=torch.float32) / 8).to(held_in), normal(150, 64, dtype=torch.float32)
    bias = normal(210, seed=2, dtype=torch.float32) if biased else None
    held = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    targets, incoming = torch.arange(150) % 210, normal(150, seed=3, dtype=torch.float32)
    assert head.reads(held[1], torch.bfloat16) is not None
    exact = [t.to(torch.bfloat16).double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = (exact[0] @ exact[1].t() + (exact[2] if biased else 0)) * form.scale
    if form.cap is not None:
        logits = form.cap * (logits / form.cap).tanh()
    truth = torch.log_softmax(logits, -1)[torch.arange(150), targets]
    (truth * incoming.double()).sum().backward()
    with direct():
        for times in (1, 2):  # the second pass adds to the first one's gradients
            ours = head.token_logprobs(held[0], held[1], held[2] if biased else None, targets, form, torch.bfloat16)
            (ours * incoming).sum().backward()
            near(ours.detach(), truth.detach(), BF16)
            for mine, theirs in zip(held, exact, strict=True):
                near(mine.grad / times, theirs.grad, (2 if mine.dtype == torch.float32 else 4) * BF16)


CASES = [
    ([70, 33, 8, 1], {}, 2, 3, 64, 0),
    ([130, 100], {0: (60, [90, 111]), 1: (50, [70])}, 1, 2, 32, 0),
    ([150, 60, 49], {}, 2, 1, 128, 20),
    ([120, 97], {0: (101, [110])}, 1, 3, 96, 0),
    ([333], {0: (140, [200, 290])}, 1, 3, 64, 0),  # one long document: threads share its queries
    ([410], {}, 3, 1, 32, 150),
]


@needs_pairs
@pytest.mark.parametrize(("lengths", "trees", "keys", "group", "width", "window"), CASES)
def test_attention_by_documents(lengths: list[int], trees: Any, keys: int, group: int, width: int, window: int) -> None:
    layout, fast = Layout(lengths, CPU, trees), kernels()
    q = normal(layout.total, keys * group * width) * (2 * width**-0.5)
    k, v = (normal(layout.total, keys * width, seed=seed) for seed in (1, 2))
    dy = normal(*q.shape, seed=3)
    out, logs = fast.attend_documents(q, k, v, layout.documents, keys, window)
    grads = fast.attend_documents(q, k, v, layout.documents, keys, window, (dy, out, logs))
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    truth = plainly(*leaves, layout, keys, window)
    real = layout.real
    near(out[:real], truth.detach(), 2 * BF16)
    for ours, right in zip(grads, torch.autograd.grad(truth, leaves, dy[:real].double()), strict=True):
        near(ours[:real], right[:real], 3 * BF16)
        assert not ours[real:].any()
    assert not out[real:].any()


@needs_pairs
@pytest.mark.parametrize(("lengths", "trees", "keys", "group", "width", "window"), CASES)
def test_attention_of_the_queries_that_are_read_alone(
    lengths: list[int], trees: Any, keys: int, group: int, width: int, window: int
) -> None:
    """One in five; of the first of several documents none but its last."""
    layout, fast = Layout(lengths, CPU, trees), kernels()
    asked = [lengths[0] - 1, *range(lengths[0], layout.real, 5)] if len(lengths) > 1 else [*range(7, layout.real, 5)]
    layout.only(torch.tensor(asked[::-1] + asked[:1]))
    read = layout.read
    assert read is not None
    assert read.tolist() == asked
    q = normal(layout.total, keys * group * width) * (2 * width**-0.5)
    k, v = (normal(layout.total, keys * width, seed=seed) for seed in (1, 2))
    some, dy = q[read], normal(len(read), q.shape[1], seed=3)
    out, logs = fast.attend_documents(some, k, v, layout.read_documents, keys, window)
    dq, dk, dv = fast.attend_documents(some, k, v, layout.read_documents, keys, window, (dy, out, logs))
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    truth = plainly(*leaves, layout, keys, window)[read]
    near(out, truth.detach(), 2 * BF16)
    right = torch.autograd.grad(truth, leaves, dy.double())
    for mine, its in ((dq, right[0][read]), (dk, right[1]), (dv, right[2])):
        near(mine, its, 3 * BF16)


def test_all_tokens_are_done_where_nearly_all_are_read() -> None:
    layout = Layout([64], CPU)
    layout.only(torch.arange(50).repeat(2))
    assert layout.read is not None
    assert layout.read.tolist() == list(range(50))
    with pytest.raises(ValueError, match="other tokens"):
        layout.only(torch.arange(49))
    layout = Layout([64], CPU)
    layout.only(torch.arange(60))
    assert layout.read is None


@needs_pairs
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["k_proj"], None])
def test_the_last_layer_does_what_is_read(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and all gradients, norms and embeddings among them, with few tokens read, are those of a last layer that does all."""
    batch = make_batch((90, 61, 40), weights=(0.0, 1.0))
    batch.train[5:70] = 0
    found, rows, attend = [], [], native.Kernels.attend_documents

    def counted(fast: native.Kernels, q: Tensor, *others: Any) -> tuple[Tensor, ...]:
        rows.append(len(q))
        return attend(fast, q, *others)

    for most in (0.9, 0.0):
        monkeypatch.setattr(layouts, "MOST_READ", most)
        model = make_model("qwen3", dtype=torch.bfloat16, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
        if targets is not None:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        policy = make_policy(model)
        with monkeypatch.context() as patch:
            patch.setattr(native.Kernels, "attend_documents", counted)
            logp = policy.score(batch).logp
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()  # type: ignore[no-untyped-call]
        found.append((logp.detach(), {n: p.grad.float() for n, p in policy.parameters_by_name().items() if p.grad is not None}))
    assert rows[1] < rows[0] == rows[2] == rows[3]
    (ours, grads), (whole, others) = found
    assert float((ours - whole).abs().max()) <= 0.05 * float(whole.abs().max())
    assert set(grads) == set(others)
    for name, other in others.items():
        assert float((grads[name] - other).norm()) <= 0.05 * float(other.norm()) + 1e-6, name


@needs_pairs
@pytest.mark.parametrize("adapted", [False, True])
def test_a_whole_policy_agrees_with_pytorchs_operations(adapted: bool) -> None:
    """Scores and gradients in bf16 with our functions and without, heads wide enough for them."""
    found = []
    for on in (True, False):
        with native.switched(on):
            model = make_model(dtype=torch.bfloat16, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
            if adapted:
                model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
            policy = make_policy(model)
            assert policy.layers == "fused"
            logp = policy.score(make_batch((40, 33, 20))).logp
            logp.sum().backward()  # type: ignore[no-untyped-call]
            found.append((logp.detach(), [p.grad.float() for p in policy.parameters_by_name().values() if p.grad is not None]))
    (ours, grads), (theirs, others) = found
    assert 0 < float((ours - theirs).abs().max()) < 0.1 * float(theirs.abs().max())
    for mine, other in zip(grads, others, strict=True):
        assert float((mine - other).norm()) <= 0.1 * float(other.norm()) + 1e-6


GUARDED = """
import ctypes, mmap, torch
from tunesmith.model import head, native
page, size = mmap.PAGESIZE, 40 * mmap.PAGESIZE
held = mmap.mmap(-1, size + page)
at = ctypes.addressof(ctypes.c_char.from_buffer(held))
assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(at + size), page, 0) == 0
fast = native.kernels(torch.bfloat16)
for dtype in (torch.bfloat16, torch.float32):
    for rows, columns in ((65, 34), (9, 50), (33, 64)):
        last = size - rows * columns * dtype.itemsize
        b = torch.frombuffer(held, dtype=dtype, count=rows * columns, offset=last).view(rows, columns).fill_(1)
        a = torch.ones(rows, 8, dtype=torch.bfloat16)
        assert fast.dense([(a, b, True, False)], torch.empty(8, columns), native.WIDE).eq(rows).all()
        a = torch.ones(8, columns, dtype=torch.bfloat16)
        assert fast.dense([(a, b, False, True)], torch.empty(8, rows), native.WIDE).eq(columns).all()
    if dtype == torch.bfloat16:
        assert fast.dense([(b, torch.ones(8, 64, dtype=dtype), False, True)], torch.empty(33, 8), native.WIDE).eq(64).all()
print("fine")
"""


@needs_pairs
def test_no_product_reads_beyond_its_factors() -> None:
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
