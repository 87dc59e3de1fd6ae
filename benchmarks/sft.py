"""Supervised fine-tuning, ours and TRL's SFTTrainer in turn: same rows, same trained tokens, same LoRA, tokens per second and peak memory.

Each setting runs in a process of its own, one after the other. The peer is tried at several settings and its best one counts.
Usage: python benchmarks/sft.py [--model FOLDER] [--data FILE] [--rows 32] [--out records/sft.json]
Without --model: the shape of SmolLM2-135M with random weights (the speed does not depend on their values) and the bundled tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32
PEER_SETTINGS = [{"batch": 1}, {"batch": 2}, {"batch": 4}]
OUR_SETTINGS = [{"micro_tokens": 512}, {"micro_tokens": 1024}]


def shaped_model(folder: Path) -> None:
    """SmolLM2-135M's shape with seeded random weights, and the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tunesmith import pocket

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
        rope_theta=100_000.0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pocket.folder()).save_pretrained(folder)


def rows_of(path: Path | None, count: int) -> list[list[dict[str, str]]]:
    """The first rows as message lists: the user's file in any of our formats, or support tickets."""
    if path is None:
        from tunesmith.pocket.tickets import training_rows

        return [row["messages"] for row in training_rows(count, 0)]
    from tunesmith.core.recipe import Source
    from tunesmith.data.prepare import examples

    found = [example for example in examples(Source(path=str(path), limit=count)) if hasattr(example, "messages")]
    return [[message.as_dict() for message in example.messages] for example in found]


def ours(model: str, data: str, micro_tokens: int) -> dict[str, Any]:
    """One pass of our loop over the rows."""
    from tunesmith.training.run import train

    out = Path(tempfile.mkdtemp()) / "run"
    recipe = {
        "model": {"base": model, "dtype": "bf16", "adapter": {"rank": RANK, "alpha": ALPHA}},
        "data": {"train": [{"path": data}]},
        "tokens": {"max_length": 4_096, "cache": False},
        "run": {"epochs": 1, "batch": {"examples": 8}, "micro_tokens": micro_tokens, "out": str(out), "samples": 0, "save_every": 0},
    }
    train(recipe)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = steps[1:]
    return {
        "tokens": sum(step["tokens"] for step in timed),
        "trained_tokens": sum(step["trained_tokens"] for step in timed),
        "seconds": sum(step["seconds"] for step in timed),
        "memory_gb": timed[-1]["memory_gb"],
        "losses": [round(step["loss"], 4) for step in steps],
    }


def peer(model: str, data: str, batch: int) -> dict[str, Any]:
    """One pass of TRL's SFTTrainer over the same rows, sorted by length, no checkpointing, bf16 autocast."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line)["messages"] for line in Path(data).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows.sort(key=lambda messages: sum(len(message["content"]) for message in messages))
    dataset = Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows])
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=max(1, 8 // batch),
        num_train_epochs=1,
        learning_rate=2e-4,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        max_length=4_096,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataset_num_proc=1,
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    trainer = SFTTrainer(network, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()])
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    trainer.train()
    # The first step carries warm-up costs, for both sides alike.
    return {
        "tokens": sum(lengths[8:]),
        "seconds": marks[-1] - marks[0],
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }


def child(who: str, model: str, data: str, setting: dict[str, int]) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", who, "--model", model, "--data", data, "--setting", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{who} {setting} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"who": who, "setting": setting, **found, "tokens_per_s": found["tokens"] / found["seconds"]}


def main() -> None:
    """Run both sides, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("records/bench-sft.json"))
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        run = ours if words.child == "ours" else peer
        print(json.dumps(run(words.model, str(words.data), **words.setting)))
        return
    with tempfile.TemporaryDirectory() as work:
        model = words.model or str(Path(work) / "model")
        if not words.model:
            shaped_model(Path(model))
        data = Path(work) / "rows.jsonl"
        data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows_of(words.data, words.rows)))
        plan = [("trl", setting) for setting in PEER_SETTINGS] + [("ours", setting) for setting in OUR_SETTINGS]
        results = []
        for who, setting in plan:
            results.append(child(who, model, str(data), setting))
            last = results[-1]
            print(f"{who:5} {setting!s:24} {last['tokens_per_s']:8.1f} tokens/s {last['memory_gb']:7.2f} GB", flush=True)
    best = {who: max((r for r in results if r["who"] == who), key=lambda r: r["tokens_per_s"]) for who in ("trl", "ours")}
    ratio = best["ours"]["tokens_per_s"] / best["trl"]["tokens_per_s"]
    memory = best["ours"]["memory_gb"] / best["trl"]["memory_gb"]
    print(f"ours at its best setting is {ratio:.2f} times as fast as TRL at its best, in {memory:.2f} of its memory")
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "rows": words.rows,
        "model": words.model or "SmolLM2-135M shape, random weights",
        "results": results,
        "speed_ratio": ratio,
        "memory_ratio": memory,
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
