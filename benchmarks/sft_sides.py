"""What benchmarks/sft.py runs, each in a process of its own: write model and rows, train with ours, train with TRL, profile ours.

Both sides take the token ids and labels that our pipeline makes, so that they train the same tokens. What stands behind a row's last
trained token is left out on both. Rates count a row up to and including that token: TRL feeds it to the model, we do not (it is
a target and no input).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import ALPHA, PRECISIONS, RANK, Result, Setting, answer, clock_of, end_of, gemm_of, peak_memory, write_model

START_ROWS = 1_000


@dataclass(frozen=True)
class Case:
    """What is trained on both sides, which settings are tried, and what is `wanted` (speed ratio: wanted, stretch)."""

    name: str
    model: str
    data: list[str]
    start: str
    lora: bool
    dtype: str
    lr: float
    examples: int
    ours: list[Setting]
    trl: list[Setting]
    beside: list[Setting]
    wanted: tuple[float, float]


def recipe_of(case: Case, setting: Setting, out: str) -> dict[str, Any]:
    """Our recipe of a case; `limit` in the setting reads so many rows only; `dtype`, `fast`, `model` and `optim` replace the case's."""
    model = {"base": case.model, "dtype": setting.get("dtype", case.dtype), "fast": setting.get("fast", {})}
    limit = {"limit": setting["limit"]} if "limit" in setting else {}
    return {
        "model": model | ({"adapter": {"rank": RANK, "alpha": ALPHA}} if case.lora else {}) | setting.get("model", {}),
        "data": {"train": [{"path": path, **limit} for path in case.data]},
        "tokens": {"max_length": 1_024 if case.model == "pocket" else 4_096},  # as much as the bundled base takes
        "optim": {"lr": case.lr, "schedule": "constant", "warmup": 0, "weight_decay": 0, **setting.get("optim", {})},
        "run": {
            "epochs": 1, "batch": {"examples": case.examples}, "micro_tokens": setting.get("micro_tokens", 1_024), "out": out, "samples": 0,
            "save_every": 0, "checkpointing": "off",
        },
    }  # fmt: skip


def build(work: Path, data: str, quick: bool) -> Result:
    """Write the rows of all cases, and the model of SmolLM2-135M's shape with a tokenizer trained on the rows."""
    from tunesmith import pocket
    from tunesmith.core.files import write_jsonl
    from tunesmith.pocket.tickets import training_rows

    rows = file_rows(data) if data else ticket_rows(START_ROWS)
    write_jsonl(work / "rows.jsonl", rows[: 8 if quick else 32])
    write_jsonl(work / "start.jsonl", rows[:START_ROWS])
    write_jsonl(work / "tickets.jsonl", training_rows(48 if quick else 384, 0))
    write_jsonl(work / "many-tickets.jsonl", training_rows(START_ROWS, 0))
    # The demo has one row of general text to six tickets.
    texts = pocket.replay_text().read_text(encoding="utf-8").splitlines()[: 8 if quick else 64]
    write_jsonl(work / "text.jsonl", [json.loads(line) for line in texts])
    words = (message["content"] for row in rows for message in row["messages"])
    _, tokenizer = write_model(work / "model", words, 2 if quick else None)
    return {"rows": len(rows), "vocabulary": len(tokenizer), "start_rows": min(len(rows), START_ROWS)}


def file_rows(path: str) -> list[dict[str, Any]]:
    """All conversations of a file in any of our formats."""
    from tunesmith.core.recipe import Source
    from tunesmith.data.detect import detect
    from tunesmith.data.formats import FORMATS
    from tunesmith.data.sources import read

    source = Source(path=path)
    found = [(key, row) for key, row in read(source) if isinstance(row, dict)]
    name = detect(found, source)
    dialogs = [FORMATS[name].function(row, key) for key, row in found]
    return [{"messages": [message.as_dict() for message in dialog.messages]} for dialog in dialogs if hasattr(dialog, "messages")]


def ticket_rows(count: int) -> list[dict[str, Any]]:
    """Longer rows of the bundled grammar: to write one to eight tickets, each with its label."""
    from tunesmith.pocket.tickets import training_rows

    tickets = iter(training_rows(count * 9 // 2, 0))
    rows = []
    for number in (1 + place * 5 % 8 for place in range(count)):
        parts = [next(tickets)["messages"] for _ in range(number)]
        answer = "\n\n".join(f"{part[1]['content']}\n{part[2]['content']}" for part in parts)
        ask = {"role": "user", "content": f"Write {number} tickets with their labels."}
        rows.append({"messages": [ask, {"role": "assistant", "content": answer}]})
    return rows


def prepared(case: Case, setting: Setting) -> Any:
    """The token set of a case."""
    from tunesmith.core.recipe import Recipe
    from tunesmith.data.prepare import prepare
    from tunesmith.model.load import resolve
    from tunesmith.model.tokenizer import load_tokenizer

    recipe = Recipe(**recipe_of(case, setting, ""))
    return prepare(recipe, load_tokenizer(resolve(case.model), None)).train


def ours(case: Case, setting: Setting) -> Result:
    """One pass of our trainer."""
    import torch

    from tunesmith.core.files import read_json
    from tunesmith.core.recipe import StepBatch
    from tunesmith.data.order import epoch_steps
    from tunesmith.training.run import train
    from tunesmith.training.sinks import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        train(recipe_of(case, setting, f"{folder}/run"))
        steps, receipt = read_metrics(Path(folder, "run", "metrics.jsonl")), read_json(Path(folder, "run", "receipt.json"))
    rows = prepared(case, setting)
    plan = epoch_steps(rows.lengths, rows.repeats, StepBatch(examples=case.examples), 0, 0)
    if [step["tokens"] for step in steps] != [int(rows.lengths[step].sum()) for step in plan]:
        raise SystemExit("the steps did not hold the rows that the order says")
    speed = receipt["speed"]
    return {
        "tokens": [sum(end_of(rows[int(row)]) for row in step) for step in plan],
        "trained": [step["trained_tokens"] for step in steps],
        "seconds": [step["seconds"] for step in steps],
        "flops": [step["tflops"] * 1e12 * step["seconds"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "memory_gb": steps[-1]["memory_gb"],
        "gemm": {"name": speed["gemm"], "flops": speed["gemm_tflops"] * 1e12},
        "formula": speed["formula"],
        "fast_paths": receipt["fast_paths"],
        "state_bytes": receipt["optimizer"]["state_bytes"],
        "trained_share": receipt["optimizer"]["trained_share"],
        "threads": torch.get_num_threads(),
    }


def trl(case: Case, setting: Setting) -> Result:
    """One pass of TRL's SFTTrainer over the same tokens, sorted by length, no checkpointing."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTTrainer

    from tunesmith.model.flops import count
    from tunesmith.model.load import resolve
    from tunesmith.model.tokenizer import load_tokenizer

    weights, autocast = PRECISIONS[setting["precision"]]
    base, rows = resolve(case.model), sorted(prepared(case, setting), key=end_of)
    cut = [(row.ids[: end_of(row)].tolist(), row.train[: end_of(row)]) for row in rows]
    labels = [[word if trained else -100 for word, trained in zip(ids, train, strict=True)] for ids, train in cut]
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in cut], "labels": labels})
    clock, counts = clock_of(), {"tokens": 0, "trained": 0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, weights), **held_as(setting.get("quant"))),
            args=sft_config(folder, case, setting["batch"], autocast, setting.get("peer_optim", "adamw_torch_fused")),
            train_dataset=dataset,
            processing_class=load_tokenizer(base, None),
            peft_config=peft_of(setting.get("peft", "lora")) if case.lora else None,
            callbacks=[clock],
        )
        collate = trainer.data_collator

        def counted(examples: list[Any]) -> Any:
            batch = collate(examples)
            counts["tokens"] += int(batch["attention_mask"].sum())
            counts["trained"] += int((batch["labels"][:, 1:] != -100).sum())
            return batch

        trainer.data_collator = counted
        trainer.train()
    if counts != {"tokens": sum(map(end_of, rows)), "trained": sum(int((row.train != 0).sum()) for row in rows)}:
        raise SystemExit(f"the peer was fed other tokens than were handed to it: {counts}")
    memory = peak_memory()
    steps = [rows[start : start + case.examples] for start in range(0, len(rows), case.examples)]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    if len(clock.seconds) != len(steps) or len(log) != len(steps):
        raise SystemExit(f"the peer made {len(clock.seconds)} steps of {len(steps)}")
    work = count(trainer.model.get_base_model() if case.lora else trainer.model)
    return {
        "tokens": [sum(map(end_of, step)) for step in steps],
        "trained": [sum(int((row.train != 0).sum()) for row in step) for step in steps],
        "seconds": clock.seconds,
        "flops": [work.of(step) for step in steps],
        "losses": [entry["loss"] for entry in log],
        "grad_norms": [entry["grad_norm"] for entry in log],
        "memory_gb": memory,
        "gemm": gemm_of(trainer.args.device, setting["precision"]),
        "formula": work.formula,
        "threads": torch.get_num_threads(),
    }


def peft_of(name: str) -> Any:
    """PEFT's configuration of an adapter, as ours of the same name."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig

    linear: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    makers: dict[str, Callable[[], Any]] = {
        "lora": lambda: LoraConfig(r=RANK, lora_alpha=ALPHA, **linear),
        "dora": lambda: LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, **linear),
        "vera": lambda: VeraConfig(r=256, **linear),
        "ia3": lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
        "prompt": lambda: PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
    }
    return makers[name]()


def held_as(quant: str | None) -> dict[str, Any]:
    """How transformers is to hold the base."""
    import torch
    from transformers import BitsAndBytesConfig

    if quant is None:
        return {}
    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**four, bnb_4bit_compute_dtype=torch.bfloat16) if quant == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}}


def sft_config(folder: str, case: Case, batch: int, autocast: bool, optim: str) -> Any:
    """TRL's settings: the same optimizer and steps as ours."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=max(1, case.examples // batch),
        num_train_epochs=1, learning_rate=case.lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, bf16=autocast,
        optim=optim, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, max_length=None,
        train_sampling_strategy="sequential",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip


@contextmanager
def named_functions() -> Iterator[None]:
    """While open, torch.profiler sees our compiled functions, which it would take for time of their callers."""
    import torch

    from tunesmith.model.native import Kernels

    def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*given: Any, **others: Any) -> Any:
            with torch.profiler.record_function(name):
                return function(*given, **others)

        return call

    plain = {name: f for name, f in vars(Kernels).items() if callable(f) and not name.startswith("_")}
    for name, function in plain.items():
        setattr(Kernels, name, named(function, f"compiled {name}"))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(Kernels, name, function)


def profile(case: Case, setting: Setting) -> Result:
    """torch.profiler's table of one pass of ours, after another one to warm up."""
    import torch

    from tunesmith.core.recipe import Recipe
    from tunesmith.model.build import build_policy
    from tunesmith.objective import methods
    from tunesmith.training.optim import build_optimizer
    from tunesmith.training.parallel import Ranks
    from tunesmith.training.step import Budget, gradient_step, zero_gradients

    recipe, rows = Recipe(**recipe_of(case, setting, "")), list(prepared(case, setting))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = build_policy(recipe.model, device, seed=0)
    policy.train_mode(True)
    optimizer = build_optimizer(recipe.optim, case.lr, policy.parameters_by_name(), policy.model)
    ranks, terms = Ranks(), methods(recipe.objective)

    def once() -> None:
        for start in range(0, len(rows), case.examples):
            gradient_step(policy, rows[start : start + case.examples], terms, Budget(setting["micro_tokens"]), ranks)
            torch.nn.utils.clip_grad_norm_(policy.parameters_by_name().values(), 1.0)
            optimizer.step()
            zero_gradients(policy)

    once()
    with named_functions(), torch.profiler.profile() as profiler:
        once()
    order = f"self_{device}_time_total"
    return {"table": profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=45)}


if __name__ == "__main__":
    answer(__doc__, build, Case, {"ours": ours, "trl": trl, "profile": profile})
