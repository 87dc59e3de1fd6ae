"""Products of training in 8 bits against fp64: those of the rounded numbers exactly, those of the others within about a hundredth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_own_products import BF16, FP32, kernels, near, normal
from tiny_models import gradients, make_batch, make_model
from torch import Tensor

from processors import needs_pairs
from tunesmith.core import adapters, recipe
from tunesmith.core.errors import ModelError
from tunesmith.model import fuse, native
from tunesmith.model.adapter import attach, lora_layers
from tunesmith.model.build import build_policy
from tunesmith.model.compile import settle_int8
from tunesmith.model.copies import Copies
from tunesmith.model.eight import Eight, plain_backward, plain_forward
from tunesmith.model.layer_ops import Linear, linear_added, linears, linears_backward
from tunesmith.model.next_token import NextToken
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle
from tunesmith.model.products import rounded as plain_rounded


def whole(values: Tensor) -> Tensor:
    """Rows in 8 bits as the numbers that they are."""
    return values.double() - 128


@needs_pairs
def test_rows_are_rounded_to_the_nearest_and_parts_together() -> None:
    fast, wide = kernels(), normal(40, 80) * torch.logspace(-3, 2, 40)[:, None].bfloat16()
    parts, times = [wide[:, 16:48], normal(40, 16, seed=1)], [torch.rand(32) + 0.5, torch.rand(16) + 0.5]
    joined = torch.cat([part.float() * factor for part, factor in zip(parts, times, strict=True)], 1)
    values, steps = fast.round_rows(parts, times)
    assert torch.allclose(steps, joined.abs().amax(1) / 127)
    assert float((whole(values) * steps.double()[:, None] - joined.double()).abs().div(steps[:, None]).max()) < 0.5001
    assert values.amax(1).sub(128).abs().maximum(values.amin(1).to(torch.int16).sub(128).abs()).eq(127).all()
    values, steps = fast.round_rows([torch.zeros(3, 16, dtype=torch.bfloat16)])
    assert values.eq(128).all()
    assert (steps > 0).all()


@needs_pairs
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 37, 600])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (64, 48), (576, 96), (96, 208), (32, 400)])
def test_a_product_in_8_bits_is_its_formula(rows: int, inputs: int, outputs: int) -> None:
    fast, x, dy = kernels(), normal(rows, inputs), normal(rows, outputs, seed=1)
    weight = Eight.of(normal(outputs, inputs, seed=2))
    values, steps = fast.round_rows([x])
    truth = whole(values) @ weight.values.double().t() * steps.double()[:, None] * weight.steps.double()
    counts = (steps, weight.steps, weight.shift)
    wide = torch.empty(rows, outputs)
    near(fast.dense([(values, weight.values, False, True)], wide, native.WIDE, steps=counts), truth, FP32)
    bias, small, b, before = (
        normal(outputs, seed=3),
        normal(rows, 4, seed=4),
        normal(outputs, 4, seed=5),
        normal(rows, outputs, seed=6).float(),
    )
    terms = [(values, weight.values, False, True), (small, b, False, True)]
    more = truth + bias.double() + small.double() @ b.double().t()
    near(fast.dense(terms, wide, native.ADDED, bias=bias, before=before, steps=counts), more + before.double(), FP32)
    narrow = torch.empty(rows, outputs, dtype=torch.bfloat16)
    near(fast.dense(terms, narrow, native.NARROW, 0.5, bias, steps=counts), more / 2, BF16)
    back, steps = fast.round_rows([dy], [weight.steps])
    truth = whole(back) @ weight.values.double() * steps.double()[:, None]
    near(
        fast.dense([(back, weight.values, False, False)], torch.empty(rows, inputs), native.WIDE, steps=(steps, None, weight.shift_back)),
        truth,
        FP32,
    )


@needs_pairs
def test_the_largest_sums_do_not_overflow() -> None:
    """Every number 127 or -127 over a depth of 16,384: the sum is 264 million, and what 128 too much adds 266 million more."""
    weight, x = torch.ones(32, 16_384), torch.ones(9, 16_384, dtype=torch.bfloat16)
    weight[::2] = -1
    held, (values, steps) = Eight.of(weight), kernels().round_rows([x])
    out = torch.empty(9, 32)
    kernels().dense([(values, held.values, False, True)], out, native.WIDE, steps=(steps, held.steps, held.shift))
    near(out, x.double() @ weight.double().t(), FP32)


@needs_pairs
def test_a_bad_row_leaves_the_others_alone() -> None:
    x, weight = normal(20, 64), Eight.of(normal(48, 64, seed=1))
    x[3, 5], x[4, 6] = math.nan, math.inf
    values, steps = kernels().round_rows([x])
    out = kernels().dense(
        [(values, weight.values, False, True)], torch.empty(20, 48), native.WIDE, steps=(steps, weight.steps, weight.shift)
    )
    assert out[3:5].isnan().all()
    assert out[:3].isfinite().all()
    assert out[5:].isfinite().all()


def group_of(rank: int | None, eight: bool, dtype: torch.dtype) -> list[Linear]:
    """Three layers on 64 inputs, with biases and adapters."""
    made = []
    for place, outs in enumerate((96, 32, 48)):
        weight = (normal(outs, 64, seed=place).float() / 8).bfloat16()
        a, b = (None, None) if rank is None else (normal(rank, 64, seed=10 + place) / 8, normal(outs, rank, seed=20 + place) / 8)
        a, b = (None if t is None else t.to(dtype) for t in (a, b))
        made.append(
            Linear(
                weight.to(dtype),
                normal(outs, seed=30 + place).to(dtype),
                a,
                b,
                2.0,
                False,
                False,
                eight=Eight.of(weight) if eight else None,
            )
        )
    return made


def everything(rank: int | None, eight: bool, dtype: torch.dtype) -> list[Tensor]:
    x, dys = normal(130, 64).to(dtype), [normal(130, outs, seed=outs).to(dtype) for outs in (96, 32, 48)]
    group, add = group_of(rank, eight, dtype), normal(130, 96, seed=9, dtype=torch.float32)
    outs, small = linears(x, group)
    added, _ = linear_added(x, group[0], add if dtype != torch.float64 else add.double(), in_place=False)
    dx, grads = linears_backward(dys, x, small, group, True)
    assert dx is not None
    return [*outs, added, dx, *(t for grad in grads for t in (grad.a, grad.b) if t is not None)]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_pairs), False])
@pytest.mark.parametrize("rank", [None, 16])
def test_layers_in_8_bits_are_near_those_in_fp64(rank: int | None, compiled: bool) -> None:
    """By rounding alone, and not nearer: then nothing had been rounded. What an adapter learns from is not rounded."""
    with native.switched(compiled):
        ours, plain = (everything(rank, eight, torch.bfloat16) for eight in (True, False))
    for place, (mine, theirs, truth) in enumerate(zip(ours, plain, everything(rank, False, torch.float64), strict=True)):
        far, usual = (float((t.double() - truth).norm() / truth.norm()) for t in (mine, theirs))
        if place < 5:
            assert 0.004 < far < 0.02, (place, far)
        else:
            assert far < 1.5 * usual + 1e-4, (place, far, usual)


@needs_pairs
def test_the_plain_twin_says_the_same() -> None:
    x, dys, group = normal(70, 64), [normal(70, outs, seed=outs) for outs in (96, 32, 48)], group_of(None, True, torch.bfloat16)
    weights = [layer.eight for layer in group if layer.eight is not None]
    bare = [Linear(layer.held, None, None, None, 1.0, False, False, eight=layer.eight) for layer in group]
    outs, _ = linears(x, bare)
    for out, weight in zip(outs, weights, strict=True):
        near(out, plain_forward(x, weight).double(), 2 * BF16)
    dx, _ = linears_backward(dys, x, None, bare, True)
    assert dx is not None
    near(dx, plain_backward(dys, weights).double(), 2 * BF16)


def small_policy(**changes: Any) -> Policy:
    model = make_model(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, **changes)
    policy = Policy(attach(model, adapters.Lora(rank=4), seed=0, base="x").eval(), torch.bfloat16)
    settle(policy, recipe.Fast())
    with torch.no_grad():
        for layer in lora_layers(policy.model):
            layer.lora_B["default"].weight.copy_(torch.randn(layer.lora_B["default"].weight.shape) * 0.02)
    return policy


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_pairs), False])
def test_an_adapted_model_takes_8_bits_and_goes_back(compiled: bool) -> None:
    with native.switched(compiled):
        batch, policy = make_batch(), small_policy()
        plain = policy.score(batch).logp.detach()
        before = gradients(policy.model, policy.score(batch).logp.mean())
        settle_int8(policy)
        ours = policy.score(batch).logp.detach()
        assert 0.001 < float((ours - plain).abs().mean()) < 0.2
        after = gradients(policy.model, policy.score(batch).logp.mean())
        ends = [torch.cat([g[name].flatten() for name in sorted(g)]).double() for g in (before, after)]
        assert float(torch.nn.functional.cosine_similarity(*ends, dim=0)) > 0.98
        with fuse.exact(policy.model):
            assert torch.equal(policy.score(batch).logp.detach(), plain)
        assert torch.equal(policy.score(batch).logp.detach(), ours)
        with policy.steady():  # what is kept from call to call knows which of both it is for
            assert torch.equal(policy.score(batch).logp.detach(), ours)
            with fuse.exact(policy.model):
                assert torch.equal(policy.score(batch).logp.detach(), plain)
            assert torch.equal(policy.score(batch).logp.detach(), ours)


@needs_pairs
def test_sampling_is_compared_with_the_model_that_is_not_rounded() -> None:
    policy = small_policy()
    before = NextToken(policy).gaps()
    settle_int8(policy)
    assert NextToken(policy).gaps() == before
    assert all(layer.tunesmith.rounded for layer in fuse.fused_layers(policy.model))


@needs_pairs
def test_rounding_goes_by_token_so_that_neighbours_change_nothing() -> None:
    """What a row says depends on the others of its pass by the rounding of sums alone."""
    batch, policy = make_batch(), small_policy()
    settle_int8(policy)
    packed = policy.score(batch).logp.detach()
    alone = [make_alone(batch, segment) for segment in batch.segments]
    single = torch.cat([policy.score(one).logp.detach() for one in alone])
    with fuse.exact(policy.model):
        usual = float((policy.score(batch).logp - torch.cat([policy.score(one).logp for one in alone])).detach().abs().mean())
    assert float((packed - single).abs().mean()) <= usual + 0.02


def make_alone(batch: Any, segment: Any) -> Any:
    a, b = segment.start, segment.stop
    return type(batch)(batch.ids[a:b], batch.train[a:b], (type(segment)(0, b - a, segment.key),))


@needs_pairs
def test_a_weight_that_has_moved_is_rounded_anew() -> None:
    batch, policy = make_batch(), small_policy()
    settle_int8(policy)
    before = policy.score(batch).logp.detach()
    with torch.no_grad():
        lora_layers(policy.model)[0].base_layer.weight.mul_(1.5)
    assert not torch.allclose(policy.score(batch).logp.detach(), before, atol=0.01)


@needs_pairs
def test_an_adapter_that_is_merged_is_not_forgotten() -> None:
    """PEFT adds it behind the weight's back, and the rounded copy is that of the weight without it."""
    batch, policy = make_batch(), small_policy()
    with torch.no_grad():
        for layer in lora_layers(policy.model):
            layer.lora_B["default"].weight.mul_(10)
    settle_int8(policy)
    before = policy.score(batch).logp.detach()
    with fuse.exact(policy.model):
        rounding = float((policy.score(batch).logp.detach() - before).abs().mean())
    policy.model.merge_adapter()
    assert float((policy.score(batch).logp.detach() - before).abs().mean()) < 2 * rounding
    policy.model.unmerge_adapter()
    assert float((policy.score(batch).logp.detach() - before).abs().mean()) < rounding


def test_copies_say_what_they_take() -> None:
    copies, weight = Copies(), torch.nn.Parameter(torch.randn(32, 16), requires_grad=False)
    copies.of(weight, torch.bfloat16)
    copies.in_8_bits(weight)
    assert copies.bytes() == 2 * 512 + 512 + 4 * (32 + 32 + 16)


@needs_pairs
def test_small_gradients_are_rounded_as_large_ones_are() -> None:
    """An objective of little weight sends back numbers far below one, at which no step may end."""
    rows = normal(9, 64)
    (values, steps), (small, less) = (kernels().round_rows([(rows.float() * factor).bfloat16()]) for factor in (1.0, 2.0**-80))
    assert torch.equal(values, small)
    assert torch.equal(steps * 2.0**-80, less)
    for factor in (1.0, 2.0**-80):
        assert torch.equal(plain_rounded((rows.float() * factor).bfloat16())[0], whole(values).to(torch.int8))


def test_models_whose_layers_are_not_one_function_are_refused() -> None:
    policy = Policy(attach(make_model("gpt_neox", dtype=torch.bfloat16), adapters.Lora(rank=4), seed=0, base="x").eval(), torch.bfloat16)
    settle(policy, recipe.Fast())
    with pytest.raises(ModelError, match="have to run as one function") as caught:
        settle_int8(policy)
    assert caught.value.code == "no_int8"


@pytest.mark.parametrize(("hidden", "adapter"), [(40, {"rank": 4}), (64, {"rank": 3}), (64, {"rank": 4, "dropout": 0.1})])
def test_layers_that_would_go_another_way_in_training_are_refused(hidden: int, adapter: dict[str, Any]) -> None:
    """Sides that are no sixteens, a rank that our products do not take, dropout that sends layers through PEFT."""
    model = make_model(dtype=torch.bfloat16, hidden_size=hidden, intermediate_size=128)
    policy = Policy(attach(model, adapters.Lora(**adapter), seed=0, base="x").eval(), torch.bfloat16)
    settle(policy, recipe.Fast())
    assert policy.layers == "fused"
    with pytest.raises(ModelError, match="have to run as one function"):
        settle_int8(policy)
    assert not any(layer.tunesmith.rounded for layer in fuse.fused_layers(policy.model))


@needs_pairs
def test_an_adapter_with_biases_of_its_own_is_refused() -> None:
    """Its layers look fused and go PEFT's way at every step."""
    from peft import LoraConfig, get_peft_model

    model = make_model(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    policy = Policy(get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_bias=True)).eval(), torch.bfloat16)
    settle(policy, recipe.Fast())
    with pytest.raises(ModelError, match="have to run as one function"):
        settle_int8(policy)


def test_8_bits_are_refused_where_they_cannot_be(tmp_path: Any) -> None:
    fast = recipe.Fast(int8=True)
    with native.switched(False), pytest.raises(ModelError, match="VNNI") as caught:
        build_policy(recipe.Model(base=str(tmp_path), dtype="bf16", adapter=adapters.Lora(), fast=fast), "cpu", seed=0)
    assert caught.value.code == "no_int8"
    for changes, words in (
        ({"adapter": None}, "frozen base"),
        ({"dtype": "fp32"}, "goes with bf16"),
        ({"dtype": "auto"}, "auto is fp32"),
        ({"quant": "nf4"}, "fast.int8"),
        ({"stream": True}, "fast.int8"),
        ({"adapter": adapters.Lora(dropout=0.1)}, "dropout"),
        ({"adapter": adapters.Lora(rank=3)}, "even rank"),
        ({"adapter": adapters.Lora(ranks={"q_proj": 5})}, "even rank"),
        ({"adapter": adapters.Dora()}, "dora"),
        ({"adapter": adapters.Prefix()}, "prefix"),
        ({"fast": recipe.Fast(int8=True, layer=False)}, "fused layers"),
        ({"fast": recipe.Fast(int8=True, compile=True)}, "fused layers"),
    ):
        with pytest.raises(ValidationError, match=words):
            recipe.Model(**{"base": "x", "dtype": "bf16", "adapter": adapters.Lora(), "fast": fast, **changes})
