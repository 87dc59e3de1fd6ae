"""Runs with products in 8 bits: the reference agrees, the receipt is about what is saved, and they can be resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import assert_same_run, losses

from processors import needs_pairs
from tunesmith.core.files import read_json
from tunesmith.core.recipe import Recipe
from tunesmith.core.types import Tokens
from tunesmith.data.pack import pack
from tunesmith.evals.likelihood import row_sums
from tunesmith.model import fuse
from tunesmith.model.build import build_policy
from tunesmith.training.receipt import live_numbers
from tunesmith.training.run import train

pytestmark = needs_pairs


def in_8_bits(tree):
    tree["model"] |= {"dtype": "bf16", "fast": {"int8": True}}
    return tree


def test_a_stopped_run_goes_on_bit_for_bit(tree, lose_at_five):
    whole, cut = (in_8_bits(tree("lora", name, batch={"tokens": 300})) for name in ("whole", "cut"))
    train(whole)
    lose_at_five(cut)
    train(cut)
    assert_same_run(Path(whole["run"]["out"]), Path(cut["run"]["out"]))
    other = tree("lora", "other", batch={"tokens": 300})
    other["model"]["dtype"] = "bf16"
    train(other)
    ours, exact = (torch.tensor([loss for _, loss, _ in losses(Path(run["run"]["out"]))]) for run in (whole, other))
    assert 1e-5 < float((ours - exact).abs().max()) < 0.05
    proofs = [read_json(Path(run["run"]["out"]) / "receipt.json") for run in (whole, other)]
    assert all(proof["passed"] for proof in proofs)
    assert ["8 bits" in " ".join(proof["fast_paths"]["notes"]) for proof in proofs] == [True, False]
    # The saved model is read in full precision, and so is the live one beside it: no further apart than without 8 bits.
    assert proofs[0]["max_abs_logprob_diff"] <= 2 * proofs[1]["max_abs_logprob_diff"] + 0.01


def test_policy_and_reference_are_rounded_alike(wish):
    made = in_8_bits(wish("dpo", "lora", "run", steps=4, eval_every=2))
    result = train(made)
    assert result["start"]["eval/loss"] == pytest.approx(0.6931471805599453, abs=1e-6)


def test_a_reference_of_its_own_is_rounded_as_well(wish):
    made = in_8_bits(wish("dpo", "lora", "run", steps=1))
    made["reference"] = {"model": made["model"]["base"]}
    assert train(made)["start"]["eval/loss"] == pytest.approx(0.6931471805599453, abs=1e-6)


def test_receipt_and_evaluation_read_the_model_without_rounding(tree):
    made = in_8_bits(tree("lora", "run"))
    policy = build_policy(Recipe(**made).model, "cpu", seed=0)
    row = Tokens(np.arange(3, 40, dtype=np.int32), np.ones(37, np.float32), "one")
    row.train[0] = 0
    (said,) = live_numbers(policy, [row])
    with fuse.exact(policy.model):
        (exact,) = live_numbers(policy, [row])
    (rounded,) = [policy.score(batch).logp.tolist() for batch in pack([row], 1024)]
    assert row_sums(policy, [row])[0][0] == pytest.approx(-sum(exact), abs=1e-9)
    assert said == exact
    assert said != rounded
