"""Every way to hold and change the weights, with every kind of objective: what must hold for each cell, and the table of what does.

Usage: python tests/training/cells.py [docs/matrix.md]    (make matrix)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tunesmith.core.errors import TunesmithError
from tunesmith.core.load import build
from tunesmith.data.prepare import prepare
from tunesmith.evals.opening import open_model
from tunesmith.model.build import build_policy
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.objective import OBJECTIVES as ROWS
from tunesmith.objective import methods, wanted
from tunesmith.training import loop
from tunesmith.training.parallel import Ranks
from tunesmith.training.reference import References
from tunesmith.training.run import train
from tunesmith.training.step import Budget, gradient_step, zero_gradients

ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"adapter": None},
    "frozen": {"adapter": None, "freeze": ["embed_tokens", "layers.0"]},
    "lisa": {"adapter": None, "lisa": {"layers": 1, "every": 3}},
    "lora": {"adapter": {"name": "lora", "rank": 4}},
    "qlora nf4": {"adapter": {"name": "lora", "rank": 4}, "quant": "nf4"},
    "int8 lora": {"adapter": {"name": "lora", "rank": 4}, "quant": "int8"},
    "dora": {"adapter": {"name": "dora", "rank": 4}},
    "vera": {"adapter": {"name": "vera", "rank": 16}},
    "ia3": {"adapter": {"name": "ia3"}},
    "prefix": {"adapter": {"name": "prefix", "tokens": 4}},
    "prompt": {"adapter": {"name": "prompt", "tokens": 4}},
    "p_tuning": {"adapter": {"name": "p_tuning", "tokens": 4, "width": 16}},
    "bottleneck": {"adapter": {"name": "bottleneck", "width": 8}},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adafactor": {"name": "adafactor"},
    "lion": {"name": "lion", "lr": 1e-3},
    "muon": {"name": "muon"},
    "galore": {"name": "galore", "rank": 8, "refresh": 3, "scale": 1.0},
    "apollo": {"name": "apollo", "rank": 8, "refresh": 3},
    "schedule_free": {"name": "schedule_free"},
}
REFUSED = {"adamw_8bit": {"name": "adamw_8bit"}, "paged_adamw": {"name": "paged_adamw"}}
OBJECTIVES = {"sft": "nll", "dpo": "dpo", "reward": "reward"}
RATES = {"full": 5e-3, "frozen": 5e-3, "lisa": 5e-3, "ia3": 5e-2, "vera": 5e-2, "prefix": 0.5, "prompt": 5e-2, "p_tuning": 1e-2}
STEPS = 8


def cells() -> dict[str, dict[str, Any]]:
    """Name of a cell -> the parts of its recipe."""
    found = {}
    for objective, row in OBJECTIVES.items():
        for name, model in ADAPTERS.items():
            found[f"{name} x {objective}"] = {"model": model, "objective": row, "optim": {"lr": RATES.get(name, 2e-2)}}
        for name, optim in OPTIMIZERS.items():
            found[f"{name} x {objective}"] = {"model": ADAPTERS["full"], "objective": row, "optim": {"lr": 5e-3, **optim}}
    return found


def recipe_of(cell: dict[str, Any], base: Path, folder: Path, out: str, **run: Any) -> dict[str, Any]:
    """The recipe of a cell on the small base."""
    settings = {
        "batch": {"examples": 8},
        "steps": STEPS,
        "save_every": 2,
        "eval_every": 0,
        "samples": 0,
        "device": "cpu",
        "use_best": False,
    }
    optim = {"warmup": 1, "schedule": "constant", **cell["optim"]}
    return {
        "model": {"base": str(base), "dtype": "fp32", **cell["model"]},
        "data": {"train": str(rows(folder, cell["objective"]))},
        "objective": [{"name": cell["objective"]}],
        **({"reference": {"cache": False}} if "reference" in ROWS[cell["objective"]].needs else {}),
        "tokens": {"max_length": 256, "cache": False},
        "optim": optim,
        "run": {**settings, **run, "out": str(folder / out)},
    }


def rows(folder: Path, objective: str) -> Path:
    """Rows that a small model learns in a few steps: one kind of answer is always the wanted one."""
    path = folder / f"{objective}.jsonl"
    if not path.exists():
        found = []
        for n in range(16):
            prompt = f"What is {n} plus {n % 7}?" + " Please." * (n % 3)
            good, bad = f"It is {n + n % 7}.", f"No idea about {n}. Go away."
            found.append(
                {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]}
                if objective == "nll"
                else {"prompt": prompt, "chosen": good, "rejected": bad}
            )
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def learns(cell: dict[str, Any], base: Path, folder: Path) -> None:
    """The loss of the last steps is well below that of the first."""
    del base  # small parts of a model learn little from random features: the bundled base stands in
    train(recipe_of(cell, Path("pocket"), folder, "learns", steps=12))
    losses = [row["loss"] for row in metrics(folder / "learns")]
    assert min(losses[-2:]) < 0.85 * losses[0], losses


def resumes(cell: dict[str, Any], base: Path, folder: Path) -> None:
    """A process killed by SIGKILL behind its fifth step goes on to the same weights, bit for bit, with noise in the embeddings."""
    whole, cut = (recipe_of(cell, base, folder, out, neftune_alpha=2.0) for out in ("whole", "cut"))
    train(whole)
    child = os.fork()
    if not child:
        honest = loop._one_step

        def step(job: Any, *arguments: Any, **named: Any) -> None:
            honest(job, *arguments, **named)
            if job.progress.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        loop._one_step = step
        try:
            train(cut)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (folder / "cut/final").exists()
    train(cut)
    last = f"checkpoints/step-{STEPS:06d}/weights.safetensors"
    left, right = (safetensors.torch.load_file(folder / out / last) for out in ("whole", "cut"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [row["loss"] for row in metrics(folder / "whole")] == [row["loss"] for row in metrics(folder / "cut")]


def splits(cell: dict[str, Any], base: Path, folder: Path) -> None:
    """One micro-batch or many, one loss and one gradient."""
    recipe = build(recipe_of(cell, base, folder, "splits")).recipe
    terms = methods(recipe.objective)
    needs = {word for term in terms for word in term.needs}
    tokenizer = load_tokenizer(recipe.model.base)
    prepared = prepare(recipe, tokenizer, wanted=wanted(terms))
    policy = build_policy(recipe.model, "cpu", seed=0, head="score" if "score" in needs else "language")
    train_rows = prepared.train
    if "reference" in needs:
        train_rows = References(recipe, policy, "", tokenizer, Budget(1000), Ranks()).fill(train_rows, train_rows.lengths > 0)
    policy.train_mode(True)
    move(policy)
    found = []
    for size in (100_000, 1):
        zero_gradients(policy)
        result = gradient_step(policy, list(train_rows), terms, Budget(size), Ranks())
        found.append((result.loss, {n: p.grad.clone() for n, p in policy.parameters_by_name().items() if p.grad is not None}))
    (loss, truth), (other, slopes) = found
    assert abs(loss - other) < 2e-6 * max(1.0, abs(loss))
    size = sum(float(g.double().square().sum()) for g in truth.values()) ** 0.5
    assert sum(float((truth[n] - slopes[n]).double().square().sum()) for n in truth) ** 0.5 <= 1e-4 * size


def is_kept(cell: dict[str, Any], base: Path, folder: Path) -> None:
    """What is saved is read back by plain libraries and by us as it was (the receipt), and is evaluated."""
    out = folder / "learns"
    if not (out / "final").exists():
        train(recipe_of(cell, Path("pocket"), folder, "learns", steps=12))
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["passed"], receipt["max_abs_logprob_diff"]
    recipe = build(recipe_of(cell, Path("pocket"), folder, "learns")).recipe
    opened = open_model(str(out))
    prepared = prepare(recipe, opened.tokenizer, wanted=wanted(methods(recipe.objective)))
    from tunesmith.training.step import validate

    if cell["objective"] == "dpo":
        return  # its loss needs the reference, which is the run's
    found = validate(opened.policy, list(prepared.train), methods(recipe.objective), Budget(1000), Ranks())
    assert found.loss < metrics(out)[0]["loss"]


def switched_off(cell: dict[str, Any], base: Path, folder: Path) -> None:
    """With its adapter switched off the model is its base, and on again it is what it was."""
    recipe = build(recipe_of(cell, base, folder, "off")).recipe
    prepared = prepare(recipe, load_tokenizer(recipe.model.base), wanted=wanted(methods(recipe.objective)))
    head = "score" if cell["objective"] == "reward" else "language"
    policy = build_policy(recipe.model, "cpu", seed=0, head=head)
    bare = build_policy(recipe.model.model_copy(update={"adapter": None, "quant": None}), "cpu", seed=0, head=head, training=False)
    if recipe.model.quant is not None:
        bare = build_policy(recipe.model, "cpu", seed=0, head=head)  # freshly adapted, and so the quantised base
    from tunesmith.data.pack import pack

    batch = pack(list(prepared.train)[:6], 100_000)[0]

    def said(one: Any) -> torch.Tensor:
        outputs = one.rate(batch) if one.scalar else one.score(batch)
        return (outputs.logp if outputs.score is None else outputs.score).detach()

    move(policy)
    moved = said(policy)
    with policy.adapter_disabled():
        assert float((said(policy) - said(bare)).abs().max()) < 1e-5
    assert torch.equal(said(policy), moved)
    assert float((moved - said(bare)).abs().max()) > 1e-4


CHECKS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "learns": learns,
    "resumes after SIGKILL": resumes,
    "micro-batches": splits,
    "saved = loaded": is_kept,
    "off = base": switched_off,
}


def applies(name: str, check: str) -> bool:
    """Whether there is something to check: all weights cannot be switched off."""
    return check != "off = base" or name.split(" x ")[0] not in ("full", "frozen", "lisa", *OPTIMIZERS)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def move(policy: Any) -> None:
    """Every trained weight off its start, the same way each time."""
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters_by_name().values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05)


def small_base(folder: Path) -> Path:
    """A two-layer model with pocket's tokenizer, random weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tunesmith import pocket

    tokenizer = AutoTokenizer.from_pretrained(pocket.folder())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table(out: Path | None) -> int:
    """Run everything, print the table (and write it to `out`); returns how many checks failed."""
    warnings.simplefilter("ignore")
    lines, failed = [f"| | {' | '.join(CHECKS)} |", f"|---|{'---|' * len(CHECKS)}"], 0
    with tempfile.TemporaryDirectory() as place:
        base = small_base(Path(place) / "base")
        for number, (name, cell) in enumerate(cells().items()):
            folder = Path(place) / str(number)
            folder.mkdir()
            row = []
            for check, function in CHECKS.items():
                if not applies(name, check):
                    row.append("-")
                    continue
                try:
                    function(cell, base, folder)
                    row.append("yes")
                except (AssertionError, RuntimeError, TunesmithError) as error:
                    traceback.print_exception(error, limit=-2, file=sys.stderr)
                    failed += 1
                    row.append("**no**")
            lines.append(f"| {name} | {' | '.join(row)} |")
            print(lines[-1], flush=True)
        for name, optim in REFUSED.items():
            cell = {"model": ADAPTERS["full"], "objective": "nll", "optim": optim}
            try:
                train(recipe_of(cell, base, Path(place), "refused"))
                failed += 1
            except TunesmithError as error:
                lines.append(f"| {name} | refused on a CPU: {error.message} | | | | |")
                print(lines[-1], flush=True)
    if out is not None:
        out.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    return failed


HEAD = """# Every way to hold and change the weights

Written by `make matrix` on two CPU cores: fp32, each cell trained for real, on a two-layer model with random weights where nothing else is
said.

- **learns**: twelve steps on sixteen rows bring the loss of the bundled base below 0.85 of its start.
- **resumes after SIGKILL**: a process killed behind its fifth step goes on from its fourth to the same weights and losses, bit for bit.
- **micro-batches**: one of all rows or many of one row, one loss and one gradient (1e-4 of its length).
- **saved = loaded**: the final folder read by plain transformers, PEFT or bitsandbytes gives the live model's numbers, and is evaluated.
- **off = base**: with the adapter switched off every number is the base's (1e-5); on again, what it was.

"""

if __name__ == "__main__":
    sys.exit(min(1, table(Path(sys.argv[1]) if len(sys.argv) > 1 else None)))
