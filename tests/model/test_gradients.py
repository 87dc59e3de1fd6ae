"""Gradients added in place: the same numbers as through autograd, in the strides of their weights."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_batch, make_model, make_policy

from tunesmith.model.gradients import direct

BATCH = make_batch((40, 10, 3))


def collected(policy, in_place):
    for p in policy.parameters_by_name().values():
        p.grad = None
    for _ in range(2):
        with direct() if in_place else contextlib.nullcontext():
            outputs = policy.score(BATCH)
            (-(outputs.logp * outputs.train).sum()).backward()
    return {name: p.grad for name, p in policy.parameters_by_name().items()}


@pytest.mark.parametrize("adapted", [True, False])
def test_gradients_in_place_are_those_of_autograd_in_the_strides_of_the_weights(adapted):
    model = make_model(dtype=torch.bfloat16 if adapted else torch.float32)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    policy = make_policy(model)
    assert policy.layers == "fused"
    for name, p in policy.parameters_by_name().items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    ours, theirs = collected(policy, True), collected(policy, False)
    for name, p in policy.parameters_by_name().items():
        assert ours[name].stride() == p.stride(), name
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2 if adapted else 1e-5, atol=1e-4 if adapted else 1e-6)
