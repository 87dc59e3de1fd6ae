"""Products of few rows: packed as plain, in 8 bits as the formula says, and an engine that samples through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import make_batch, make_model, make_policy

from processors import able
from tunesmith.core.ports import SampleSettings
from tunesmith.core.types import Batch, Segment
from tunesmith.infer.engine import Engine
from tunesmith.model import products
from tunesmith.model.cached import Cache
from tunesmith.model.feed import Prompts
from tunesmith.model.next_token import NextToken
from tunesmith.model.products import Blocked, Int8, Packed, Plain, _exact_kind, product

SHAPES = {"one": [48], "three": [48, 16, 16], "odd": [7, 33]}
INPUTS = 40


def layers(sizes: list[int], dtype: torch.dtype = torch.float32, biases: str = "none"):
    generator = torch.Generator().manual_seed(len(sizes))
    weights = [torch.randn(size, INPUTS, generator=generator).to(dtype) for size in sizes]
    some = [
        torch.randn(size, generator=generator).to(dtype) if biases == "all" or (biases == "last" and place == len(sizes) - 1) else None
        for place, size in enumerate(sizes)
    ]
    return weights, some


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows)).to(dtype)


def truth(x: torch.Tensor, weights, biases) -> torch.Tensor:
    """[N, O] in fp64."""
    return torch.cat([x.double() @ w.double().t() + (0 if b is None else b.double()) for w, b in zip(weights, biases, strict=True)], 1)


@pytest.mark.parametrize("rows", [0, 1, 5, 64, 200])
@pytest.mark.parametrize("biases", ["none", "all", "last"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_packed_is_plain(sizes: list[int], biases: str, rows: int) -> None:
    if not products._packs() and not able("avx512bw"):
        pytest.skip("oneDNN packs no weights in bf16 for this processor")
    weights, some = layers(sizes, torch.bfloat16, biases)
    x = inputs(rows, torch.bfloat16)
    packed = product(weights, some, torch.bfloat16)
    plain = product(weights, some, torch.bfloat16, packed=False)
    assert isinstance(packed, Packed)
    assert isinstance(plain, Plain)
    want, bare = truth(x, weights, some), truth(x, weights, [None] * len(some))
    for way in (packed, plain):
        y = way(x)
        assert (y.shape, y.dtype) == (want.shape, torch.bfloat16)
        # Half a unit of the sum's last place, and once more where the bias is added behind it.
        assert bool(((y.double() - want).abs() <= 2**-8 * (want.abs() + bare.abs()) + 1e-4).all())
    torch.testing.assert_close(packed(x.float()), packed(x), rtol=0, atol=0)


@pytest.mark.parametrize("biases", ["none", "all", "last"])
def test_plain_products_in_fp32_use_the_weights_where_they_are(biases: str) -> None:
    weights, some = layers([48, 16], biases=biases)
    way = product(weights, some, torch.float32)
    assert isinstance(way, Plain)
    assert [w.data_ptr() for w in way.weights] == [w.data_ptr() for w in weights]
    x = inputs(5)
    torch.testing.assert_close(way(x).double(), truth(x, weights, some), atol=1e-4, rtol=0)
    kept = x.clone()
    way(x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def by_hand(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The formula of `Int8`: scales in fp32, whole numbers, and their sum in whole numbers."""

    def rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.maximum(np.abs(rows).max(1) / np.float32(127), np.float32(1e-30)).astype(np.float32)
        return np.rint(rows / scale[:, None]).astype(np.int64), scale.astype(np.float64)

    (qx, sx), (qw, sw) = rounded(x.astype(np.float32)), rounded(weight.astype(np.float32))
    assert max(np.abs(qx).max(initial=0), np.abs(qw).max()) <= 127
    y = (qx @ qw.T) * sx[:, None] * sw[None]
    return y if bias is None else y + bias


def exact(kind: str) -> bool:
    most = torch.full((64, 64), 127, dtype=torch.int8)
    return bool(products._KINDS[kind](most, torch.ones(64))(most).eq(64 * 127**2).all())


@pytest.mark.parametrize("wrong", [["onednn"], ["onednn", "pytorch"]])
def test_a_product_in_8_bits_that_overflows_is_not_taken(wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors without VNNI, whose sums of two products in 16 bits stop at 32,767."""
    saturated = {name: lambda _weight, _scale: lambda x: torch.full((len(x), 64), 32.0 * 32767) for name in wrong}
    monkeypatch.setattr(products, "_KINDS", products._KINDS | saturated)
    _exact_kind.cache_clear()
    try:
        assert _exact_kind("cpu") == ("fp32" if len(wrong) == 2 or not exact("pytorch") else "pytorch")
    finally:
        _exact_kind.cache_clear()


@pytest.mark.parametrize("kind", ["onednn", "pytorch", "fp32"])
@pytest.mark.parametrize("rows", [1, 5, 64, 200])
@pytest.mark.parametrize("biases", ["none", "all", "last"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_int8_is_its_formula(sizes: list[int], biases: str, rows: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, some = layers(sizes, biases=biases)
    if kind != _exact_kind("cpu"):
        if kind != "fp32" and not exact(kind) and not able("avx512_vnni", "avx_vnni"):
            pytest.skip("this processor does not multiply 8 bits exactly in this way")
        monkeypatch.setattr(products, "_exact_kind", lambda _: kind)
    way = product(weights, some, torch.float32, int8=True)
    assert isinstance(way, Int8)
    assert way.kind == kind
    x = inputs(rows)
    x[0] = 0
    bias = None if biases == "none" else torch.cat([torch.zeros(len(w)) if b is None else b for w, b in zip(weights, some, strict=True)])
    want = by_hand(x.numpy(), torch.cat(weights).numpy(), None if bias is None else bias.double().numpy())
    y = way(x)
    assert y.dtype == torch.float32
    assert float(np.abs(y.double().numpy() - want).max()) <= 1e-6 * float(np.abs(want).max() + 1)
    coarse = truth(x, weights, some)
    gap = float((y.double() - coarse).norm() / coarse.norm())
    assert 1e-4 < gap < 0.03 or rows == 1


def test_int8_of_no_rows_and_of_rows_of_zeros() -> None:
    weights, some = layers([16, 8], biases="all")
    weights[0][3] = 0
    way = product(weights, some, torch.float32, int8=True)
    assert way(inputs(0)).shape == (0, 24)
    torch.testing.assert_close(way(torch.zeros(3, INPUTS)), torch.cat(some).expand(3, -1))
    assert bool(torch.isfinite(way(inputs(4) * 1e30)).all())


def scored(policy, prompt, ids) -> torch.Tensor:
    train = np.array([0] * len(prompt) + [1] * len(ids), np.float32)
    return policy.score(Batch(np.array([*prompt, *ids], np.int32), train, (Segment(0, len(train), "row"),))).logp.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_in_8_bits_is_near_the_trainer_and_not_it(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype, hidden_size=64, intermediate_size=128).requires_grad_(False)
    policy = make_policy(model)
    prompts = [make_batch((n,), seed=n).ids.tolist() for n in (5, 20, 33, 9)]
    settings = SampleSettings(24, 1.0, n=2, seed=3)
    gaps = {}
    for int8 in (False, True, False):
        engine = Engine(policy, _Silent(), int8=int8)
        rows = engine.sample(prompts, settings)
        each = [
            (torch.tensor(one.logprobs) - scored(policy, prompt, one.ids)).abs()
            for prompt, row in zip(prompts, rows, strict=True) for one in row
        ]  # fmt: skip
        gap = float(torch.cat(each).mean())
        assert gap == gaps.setdefault(int8, gap), "8 bits leave nothing behind"
    print(f"mean |dlogp| of {dtype}: {gaps}")
    assert gaps[False] < (1e-5 if dtype == torch.float32 else 0.02)
    assert max(1e-3, gaps[False]) < gaps[True] < 0.05


class _Silent:
    """A tokenizer for tests that read no text."""

    def decode(self, ids, **_: object) -> str:
        return ""


def test_8_bits_reach_the_head_and_every_layer() -> None:
    policy = make_policy(make_model().requires_grad_(False))
    exact, coarse = NextToken(policy), NextToken(policy, int8=True)
    logits = []
    for one in (exact, coarse):
        cache = Cache()
        cache.add(0, 9)
        with one.ready():
            feed = Prompts(cache, [(0, list(range(3, 12)), 0)], policy.device)
            logits.append(one.logits(feed, feed.last))
            ready = [layer.tunesmith.ready for layer in policy.causal.model.layers]
            ways = [part.product for r in ready for part in r.parts] + [one._head]
        assert {isinstance(way, Int8) or (isinstance(way, Blocked) and way.int8) for way in ways} == {one is coarse}
    assert 1e-4 < float((logits[0] - logits[1]).abs().max()) < 1
