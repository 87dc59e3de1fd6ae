"""An adapter that has learned nothing is left out of fused layers where no gradient is wanted, and only there."""

import contextlib

import pytest
import torch
from tiny_models import make_batch, make_model, make_policy

from tunesmith.core import adapters
from tunesmith.model import adapter, fuse

BATCH = make_batch((19, 5, 44, 2))


@pytest.mark.parametrize("steady", [False, True])
def test_an_adapter_that_has_learned_nothing_costs_nothing_until_it_has(steady, monkeypatch):
    """Without gradient its products are left out; with one, and as soon as a factor has moved, they are there."""
    seen, inner = [], fuse._parts
    monkeypatch.setattr(fuse, "_parts", lambda layer, linears: seen.append(linears) or inner(layer, linears))
    model = adapter.attach(make_model(), adapters.Lora(rank=4, alpha=6, targets="all-linear"), seed=0, base="nowhere").eval()
    policy = make_policy(model)

    def score():
        absent = []
        with policy.steady() if steady else contextlib.nullcontext():
            for gradient in (False, True):
                seen.clear()
                with torch.set_grad_enabled(gradient):
                    logp = policy.score(BATCH).logp
                absent.append(([factors is None for linears in seen for _, factors in linears.values()], logp))
        return absent

    (idle, alone), (working, logp) = score()
    torch.testing.assert_close(alone, logp.detach(), rtol=0, atol=1e-6)
    assert idle == [True] * 14
    assert working == [False] * 14
    logp.sum().backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in adapter.lora_layers(model))
    with torch.no_grad():
        adapter.lora_layers(model)[0].lora_B["default"].weight[3, 1] = 0.5
    (idle, moved), (_, logp) = score()
    torch.testing.assert_close(moved, logp.detach(), rtol=0, atol=1e-6)
    assert not torch.equal(moved, alone)
    assert idle.count(False) == 1
