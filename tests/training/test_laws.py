"""The laws of supervised fine-tuning, for all weights and for LoRA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.core.load import build
from tunesmith.data.prepare import prepare
from tunesmith.model.reread import plain_logprobs
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.objective import methods
from tunesmith.pocket import tickets
from tunesmith.training.parallel import Ranks
from tunesmith.training.receipt import largest_difference
from tunesmith.training.run import train
from tunesmith.training.source import Offline
from tunesmith.training.step import Budget, gradient_step, validate, zero_gradients

KINDS = ["full", "lora"]
WAYS = ["fast", "layers off", "plain"]


def gradients(policy, rows, recipe, micro_tokens):
    zero_gradients(policy)
    result = gradient_step(policy, rows, methods(recipe.objective), Budget(micro_tokens), Ranks())
    return result, {name: p.grad.clone() for name, p in policy.parameters_by_name().items()}


def distance(ours, theirs):
    """|ours - theirs| / |theirs| over all tensors together."""
    assert set(ours) == set(theirs)
    gap = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    return (gap / sum(float(g.square().sum()) for g in theirs.values())) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_many_micro_batches_are_one(parts, kind, way):
    recipe, prepared, policy = parts(kind, way=way)
    rows = [prepared.train[n] for n in range(12)]
    one, whole = gradients(policy, rows, recipe, 100_000)
    for size in (1, 150, 333):
        other, split = gradients(policy, rows, recipe, size)
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert (other.tokens, other.trained_tokens) == (one.tokens, one.trained_tokens)
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "loss_limit", "limit"), [("fp32", 1e-6, 1e-5), ("bf16", 2e-3, 0.02)])
def test_every_way_gives_one_gradient(parts, kind, dtype, loss_limit, limit):
    """Packed, padded and alone, fused and not; in bf16 each of them stays near to fp32 done plainly."""
    recipe, prepared, policy = parts(kind, way="plain")
    rows = [prepared.train[n] for n in range(12)]
    truth, expected = gradients(policy, rows, recipe, 100_000)
    for way in WAYS:
        recipe, _, policy = parts(kind, way=way, dtype=dtype)
        for size in (1, 250, 100_000):
            result, found = gradients(policy, rows, recipe, size)
            assert result.loss == pytest.approx(truth.loss, abs=loss_limit)
            assert {g.dtype for g in found.values()} == {torch.float32}
            assert distance(found, expected) < limit


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_plain_transformers_loss(parts, kind):
    """Sum of token losses over all trained tokens, computed by transformers row by row with labels, divided once."""
    recipe, prepared, policy = parts(kind)
    rows = [prepared.train[n] for n in range(12)]
    result, _ = gradients(policy, rows, recipe, 400)
    policy.train_mode(False)
    total = count = 0.0
    plain = policy.model
    with policy.sampling():
        for row in rows:
            ids = torch.tensor(row.ids, dtype=torch.long)[None]
            labels = torch.where(torch.tensor(row.train)[None] > 0, ids, -100)
            trained = int((labels[:, 1:] != -100).sum())
            total += float(plain(input_ids=ids, labels=labels).loss.detach()) * trained
            count += trained
    assert result.trained_tokens == count
    assert result.loss == pytest.approx(total / count, abs=1e-5)
    assert validate(policy, rows, methods(recipe.objective), Budget(300), Ranks()).loss == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_gradient_norm_are_those_of_trl(tree, kind, tmp_path):
    """One step of TRL's SFTTrainer (its collator, head and division) on the rows and labels of our first step."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings = tree(kind, steps=1, batch={"examples": 8}, eval_every=0)
    settings["optim"] = {"lr": 1e-3, "warmup": 0, "weight_decay": 0.0, "clip": 1.0}
    ours = train(settings)["metrics"]
    base = settings["model"]["base"]
    recipe = build(settings).recipe
    prepared = prepare(recipe, load_tokenizer(base))
    [rows] = Offline(prepared.train, recipe.run).steps(0)
    labels = [[int(i) if t else -100 for i, t in zip(row.ids, row.train, strict=True)] for row in rows]
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        max_length=512,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if kind == "lora" else None
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        peft_config=lora,
        train_dataset=Dataset.from_list([{"input_ids": r.ids.tolist(), "labels": line} for r, line in zip(rows, labels, strict=True)]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    theirs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    if kind == "full":
        # A fresh adapter's A is drawn at random, so only full gradients can be equal.
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_tokens_have_no_gradient_of_their_own(parts, kind):
    """Changing an untrained token that nothing trained follows changes no gradient."""
    recipe, prepared, policy = parts(kind)
    row = next(prepared.train[n] for n in range(40) if prepared.train[n].train[-1] == 0)
    _, before = gradients(policy, [row], recipe, 1000)
    ids = row.ids.copy()
    ids[-1] = (ids[-1] + 7) % policy.vocabulary
    _, after = gradients(policy, [type(row)(ids, row.train, row.key)], recipe, 1000)
    if kind == "full":
        before = {n: g for n, g in before.items() if "embed" not in n}
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype", "weights_limit", "loss_limit"),
    [("full", "fp32", 2e-5, 1e-5), ("lora", "fp32", 2e-5, 1e-5), ("full", "bf16", 2e-4, 2e-3)],
)
def test_two_ranks_are_one(tree, kind, dtype, weights_limit, loss_limit, tmp_path):
    """Micro-batches so small that both ranks have some. In bf16 sums in another order are rounded in another way: means are compared."""
    one = tree(kind, "one", dtype=dtype, steps=4, save_every=0)
    two = tree(kind, "two", dtype=dtype, steps=4, save_every=0, micro_tokens=64)
    train(one)
    recipe = tmp_path / "two.json"
    recipe.write_text(json.dumps(two))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tunesmith",
        "train",
        str(recipe),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = (safetensors.torch.load_file(Path(r["run"]["out"]) / "checkpoints/step-000004/weights.safetensors") for r in (one, two))
    assert any(not torch.equal(left[name], right[name]) for name in left)  # else the second rank had nothing to do
    for name in left:
        if dtype == "fp32":
            torch.testing.assert_close(left[name], right[name], atol=weights_limit, rtol=1e-4)
        assert float((left[name] - right[name]).abs().mean()) < weights_limit
    metrics = [[json.loads(line) for line in (Path(r["run"]["out"]) / "metrics.jsonl").read_text().splitlines()] for r in (one, two)]
    for a, b in zip(*metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=loss_limit)
        assert a["trained_tokens"] == b["trained_tokens"]
        assert a.get("eval/loss") == pytest.approx(b.get("eval/loss"), abs=loss_limit)


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_folder_loads_without_us_and_says_what_the_receipt_says(tree, kind):
    from peft import AutoPeftModelForCausalLM

    result = train(tree(kind))
    final = Path(result["final"])
    receipt = json.loads((Path(result["run"]) / "receipt.json").read_text())
    model = (AutoPeftModelForCausalLM if kind == "lora" else AutoModelForCausalLM).from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template
    assert receipt["probes"]
    assert receipt["max_abs_logprob_diff"] < 1e-4
    assert receipt["max_abs_logprob_change_from_base"] > 1e-3
    for probe in receipt["probes"]:
        ids = torch.tensor([probe["prompt_ids"] + probe["ids"]])
        with torch.no_grad():
            logits = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        for place, (token, logprob) in enumerate(zip(probe["ids"], probe["logprobs"], strict=True)):
            assert float(logits[len(probe["prompt_ids"]) + place - 1, token]) == pytest.approx(logprob, abs=1e-5)


def test_merged_is_unmerged_and_the_disabled_adapter_is_the_base(tree):
    from peft import AutoPeftModelForCausalLM

    settings = tree("lora")
    result = train(settings)
    receipt = json.loads((Path(result["run"]) / "receipt.json").read_text())
    prompts, answers = zip(*((probe["prompt_ids"], probe["ids"]) for probe in receipt["probes"]), strict=True)
    tuned = AutoPeftModelForCausalLM.from_pretrained(result["final"]).eval()
    said = plain_logprobs(tuned, prompts, answers)
    with tuned.disable_adapter():
        off = plain_logprobs(tuned, prompts, answers)
    base = plain_logprobs(AutoModelForCausalLM.from_pretrained(settings["model"]["base"]).eval(), prompts, answers)
    merged = plain_logprobs(tuned.merge_and_unload(), prompts, answers)
    assert largest_difference(merged, said) < 1e-4 < largest_difference(said, base)
    assert largest_difference(off, base) < 1e-6


def losses(settings):
    train(settings)
    lines = (Path(settings["run"]["out"]) / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_curves_of_all_ways_lie_on_each_other(tree, kind, tmp_path):
    """Twenty steps on the bundled base and its tickets. Fast and plain differ by 1e-5 in fp32, by 0.10 (full) and 0.01 (LoRA) in bf16."""
    rows = tmp_path / "tickets.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tickets.training_rows(80, 0)))
    curves = {}
    for way in ("plain", "fast"):
        for dtype in ("fp32", "bf16"):
            settings = tree(kind, f"{way}-{dtype}", dtype=dtype, way=way, steps=20, eval_every=0, save_every=0)
            settings["model"]["base"] = "pocket"
            settings["data"] = {"train": str(rows)}
            settings["optim"] = {"lr": 5e-4 if kind == "full" else 2e-3, "warmup": 2}
            curves[way, dtype] = losses(settings)
    truth = curves["plain", "fp32"]
    assert len(truth) == 20
    assert truth[-5:].mean() < 0.7 * truth[:5].mean()
    assert np.abs(curves["fast", "fp32"] - truth).max() < 1e-4
    # Adam's first steps follow the sign of gradients near zero: rounding alone moves bf16 away from fp32, the plain way as far as ours.
    assert np.abs(curves["fast", "bf16"] - curves["plain", "bf16"]).max() < 0.2
