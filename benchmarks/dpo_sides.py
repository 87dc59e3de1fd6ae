"""What benchmarks/dpo.py runs, each in a process of its own: write models and pairs, train with ours, train with TRL.

Both sides take the token ids of our pipeline. What stands behind the last trained token of an answer is left out on both. A pair is
told by three lengths: its front (what both rows begin with alike), and each row up to its last trained token, the front included.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import ALPHA, PRECISIONS, RANK, Result, Setting, answer, clock_of, end_of, gemm_of, now, peak_memory, write_model

BETA = 0.1
LONGEST = 1_024  # tokens of a row
PAIRS = 8
PROMPT, ANSWER = 512, 128  # tokens of the made-up pairs, those of the chat template included
Pairs = list[tuple[Any, Any]]  # Tokens of the chosen and of the rejected answer


@dataclass(frozen=True)
class Case:
    """What is trained on both sides, which settings are tried, and what is `wanted` of the speed ratio."""

    name: str
    model: str
    data: str
    objective: str
    lr: float
    pairs: int
    ours: list[Setting]
    trl: list[Setting]
    beside: list[Setting]
    wanted: float


def recipe_of(case: Case, setting: Setting, out: str) -> dict[str, Any]:
    """Our recipe of a case; `limit` in the setting reads so many pairs only, `dtype` and `fast` replace bf16 and all fast paths."""
    limit = {"limit": setting["limit"]} if "limit" in setting else {}
    adapter = {"rank": RANK, "alpha": ALPHA}
    model = {"base": case.model, "dtype": setting.get("dtype", "bf16"), "fast": setting.get("fast", {}), "adapter": adapter}
    # Every run works its reference out anew.
    method = {"objective": [{"name": "dpo", "beta": BETA}], "reference": {"cache": False}}
    return {
        "model": model,
        "data": {"train": [{"path": case.data, **limit}]},
        "tokens": {"max_length": 4_096},
        "optim": {"lr": case.lr, "schedule": "constant", "warmup": 0, "weight_decay": 0},
        "run": {
            "epochs": 1, "batch": {"examples": case.pairs}, "micro_tokens": setting.get("micro_tokens", 1_024), "out": out, "samples": 0,
            "save_every": 0, "checkpointing": "off",
        },
        **(method if case.objective == "dpo" else {"objective": [{"name": case.objective}]}),
    }  # fmt: skip


def build(work: Path, data: str, quick: bool) -> Result:
    """Write the pairs of all cases, the language model with a tokenizer trained on the pairs, and the same body with a score head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    from tunesmith.core.files import write_jsonl
    from tunesmith.model.flops import count

    rows = file_pairs(data) if data else grammar_pairs(300)
    texts = (message["content"] for row in rows for side in row.values() for message in side)
    model, tokenizer = write_model(work / "model", texts, 2 if quick else None)
    fitting = [row for row in rows if max(len(rendered(tokenizer, row, side)) for side in ("chosen", "rejected")) <= LONGEST]
    wanted = 4 if quick else PAIRS
    # Spread over the whole file: neighbours may be alike.
    chosen = [fitting[place * len(fitting) // wanted] for place in range(wanted)] if len(fitting) > wanted else fitting
    write_jsonl(work / "pairs.jsonl", chosen)
    write_jsonl(work / "long-prompts.jsonl", made_up(tokenizer, wanted))
    config = model.config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    torch.manual_seed(1)
    scorer = LlamaForSequenceClassification(config).to(torch.bfloat16)
    scorer.model.load_state_dict(model.model.state_dict())
    scorer.save_pretrained(work / "scorer")
    tokenizer.save_pretrained(work / "scorer")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    counted = count(get_peft_model(model, lora).get_base_model())
    lengths = [[len(rendered(tokenizer, row, side)) for row in chosen] for side in ("chosen", "rejected")]
    return {
        "pairs": len(chosen), "pairs_of_the_file": len(rows), "pairs_that_fit": len(fitting), "vocabulary": len(tokenizer),
        "mean_tokens": [sum(side) / len(side) for side in lengths],
        "work": {
            "frozen": counted.frozen, "trained": counted.trained, "head": sum(counted.head),
            "attention": sum(width for width, _ in counted.attention), "formula": counted.formula,
        },
    }  # fmt: skip


def rendered(tokenizer: Any, row: dict[str, Any], side: str) -> list[int]:
    """The ids of one side."""
    ids: list[int] = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
    return ids


def file_pairs(path: str) -> list[dict[str, Any]]:
    """All pairs of a file in any of our formats, as prompt, chosen and rejected messages."""
    from tunesmith.core.recipe import Source
    from tunesmith.core.types import Pair
    from tunesmith.data.detect import detect
    from tunesmith.data.formats import FORMATS
    from tunesmith.data.sources import read

    source = Source(path=path)
    found = [(key, row) for key, row in read(source) if isinstance(row, dict)]
    name = detect(found, source)
    pairs = [FORMATS[name].function(row, key) for key, row in found]
    sides = ("prompt", "chosen", "rejected")
    return [{side: [m.as_dict() for m in getattr(pair, side)] for side in sides} for pair in pairs if isinstance(pair, Pair)]


def grammar_pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of the bundled grammar: one to eight tickets to be labelled, the right labels against those of other tickets."""
    from tunesmith.pocket.tickets import training_rows

    tickets = iter(training_rows(count * 9, 0))
    rows = []
    for number in (1 + place * 5 % 8 for place in range(count)):
        ours, others = ([next(tickets)["messages"] for _ in range(number)] for _ in range(2))
        sides = {"prompt": ("user", [part[1] for part in ours]), "chosen": ("assistant", [part[2] for part in ours])}
        sides["rejected"] = ("assistant", [part[1 + place % 2] for place, part in enumerate(others)])
        rows.append({side: [{"role": role, "content": "\n\n".join(m["content"] for m in told)}] for side, (role, told) in sides.items()})
    return rows


def made_up(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Pairs of random words that are one token each: prompts of PROMPT tokens and answers of ANSWER, the chat template's included."""
    single = [word for word in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]+", word)]
    words = sorted(word[1:] for word in single if len(tokenizer(" " + word[1:])["input_ids"]) == 1)
    draw = random.Random(0)

    def turn(role: str, number: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " " + " ".join(draw.choices(words, k=number))}]

    # What the template adds to a prompt; an answer is closed by one trained token.
    around = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=False))
    sizes = {"prompt": ("user", PROMPT - around), "chosen": ("assistant", ANSWER - 1), "rejected": ("assistant", ANSWER - 1)}
    return [{side: turn(role, number) for side, (role, number) in sizes.items()} for _ in range(count)]


def prepared(case: Case, setting: Setting) -> list[Pairs]:
    """The pairs of a case, those of each step of our trainer together."""
    from tunesmith.core.recipe import Recipe
    from tunesmith.core.types import Wanted
    from tunesmith.data.prepare import prepare
    from tunesmith.model.load import resolve
    from tunesmith.model.tokenizer import load_tokenizer
    from tunesmith.training.source import Offline

    recipe = Recipe(**recipe_of(case, setting, ""))
    wanted = Wanted("pairs", "answers" if case.objective == "dpo" else "ends")
    rows = prepare(recipe, load_tokenizer(resolve(case.model), None), wanted=wanted).train
    steps = []
    for step in Offline(rows, recipe.run).steps(0):
        if [row.role for row in step] != ["chosen", "rejected"] * (len(step) // 2):
            raise SystemExit("the rows do not come in pairs")
        steps.append(list(zip(step[::2], step[1::2], strict=True)))
    return steps


def lengths(pair: tuple[Any, Any]) -> tuple[int, int, int]:
    """Front, chosen, rejected: tokens."""
    from tunesmith.core.groups import common_front

    ends = [end_of(row) for row in pair]
    return min(common_front([row.ids for row in pair]), min(ends) - 1), ends[0], ends[1]


def trained(pairs: Sequence[tuple[Any, Any]]) -> list[int]:
    """Trained tokens of the chosen and of the rejected answers."""
    return [sum(int((row.train != 0).sum()) for row in side) for side in zip(*pairs, strict=True)]


def ours(case: Case, setting: Setting) -> Result:
    """One epoch of our trainer; the reference, which is worked out before the first step, is timed apart."""
    import torch

    from tunesmith.core.files import read_json
    from tunesmith.training.reference import STREAM, References
    from tunesmith.training.run import train
    from tunesmith.training.sinks import read_metrics

    fill, proof = timed(References, "fill"), timed(References, "prove")
    with tempfile.TemporaryDirectory() as folder:
        train(recipe_of(case, setting, f"{folder}/run"))
        steps, receipt = read_metrics(Path(folder, "run", "metrics.jsonl")), read_json(Path(folder, "run", "receipt.json"))
    plan, speed = prepared(case, setting), receipt["speed"]
    if [step["tokens"] for step in steps] != [sum(len(row) for pair in pairs for row in pair) for pairs in plan]:
        raise SystemExit("the steps did not hold the rows that the order says")
    said = None
    if fill.results:
        sums = {"chosen": 0.0, "rejected": 0.0}
        for row in fill.results[0]:
            sums[row.role] += float(row.streams[STREAM][row.train != 0].sum())
        counts = trained([pair for pairs in plan for pair in pairs])
        said = {side: total / number for (side, total), number in zip(sums.items(), counts, strict=True)}
    return {
        "pairs": [[lengths(pair) for pair in pairs] for pairs in plan],
        "trained": [sum(trained(pairs)) for pairs in plan],
        "seconds": [step["seconds"] for step in steps],
        "reference_seconds": fill.seconds,
        "proof_seconds": proof.seconds,
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "logp": said,
        "memory_gb": steps[-1]["memory_gb"],
        "gemm": {"name": speed["gemm"], "flops": speed["gemm_tflops"] * 1e12},
        "fast_paths": receipt["fast_paths"],
        "threads": torch.get_num_threads(),
    }


@dataclass
class Timed:
    """Seconds spent in a method, and what it returned."""

    seconds: float
    results: list[Any]


def timed(owner: Any, name: str) -> Timed:
    """Time every call of a method from now on."""
    found, method = Timed(0.0, []), getattr(owner, name)

    def wrapped(*words: Any, **named: Any) -> Any:
        began = now()
        result = method(*words, **named)
        found.seconds += now() - began
        found.results.append(result)
        return result

    setattr(owner, name, wrapped)
    return found


def trl(case: Case, setting: Setting) -> Result:
    """One epoch of TRL's DPOTrainer or RewardTrainer over the same tokens, sorted by length, no checkpointing."""
    import torch
    from datasets import Dataset

    from tunesmith.model.load import resolve
    from tunesmith.model.tokenizer import load_tokenizer

    ordered = sorted((pair for pairs in prepared(case, setting) for pair in pairs), key=lambda pair: max(map(end_of, pair)))
    base, clock = resolve(case.model), clock_of()
    columns, make = (dpo_rows, dpo_trainer) if case.objective == "dpo" else (reward_rows, reward_trainer)
    with tempfile.TemporaryDirectory() as folder:
        model, reference = make(
            case, setting, base, load_tokenizer(base, None), Dataset.from_list([columns(pair) for pair in ordered]), clock, folder
        )
        collate, counts = model.data_collator, {"tokens": 0, "trained": 0}

        def counted(examples: list[Any]) -> Any:
            batch = collate(examples)
            counts["tokens"] += int(batch["attention_mask"].sum())
            counts["trained"] += int(batch["completion_mask"][:, 1:].sum()) if "completion_mask" in batch else len(batch["input_ids"])
            return batch

        model.data_collator = counted
        model.train()
    whole = {"tokens": sum(end_of(row) for pair in ordered for row in pair), "trained": sum(trained(ordered))}
    if counts != whole:
        raise SystemExit(f"the peer was fed other tokens than were handed to it: {counts} and {whole}")
    memory = peak_memory()
    steps = [ordered[start : start + case.pairs] for start in range(0, len(ordered), case.pairs)]
    log = [entry for entry in model.state.log_history if "loss" in entry]
    if len(clock.seconds) != len(steps) or len(log) != len(steps):
        raise SystemExit(f"the peer made {len(clock.seconds)} steps of {len(steps)}")
    said = None
    if "logps/chosen" in log[0]:  # means over the pairs of the step
        each = zip(("chosen", "rejected"), trained(steps[0]), strict=True)
        said = {side: log[0][f"logps/{side}"] * len(steps[0]) / number for side, number in each}
    return {
        "pairs": [[lengths(pair) for pair in pairs] for pairs in steps],
        "trained": [sum(trained(pairs)) for pairs in steps],
        "seconds": clock.seconds,
        "reference_seconds": reference.seconds if reference else 0.0,
        "losses": [entry["loss"] for entry in log],
        "grad_norms": [entry["grad_norm"] for entry in log],
        "logp": said,
        "memory_gb": memory,
        "gemm": gemm_of(model.args.device, setting["precision"]),
        "threads": torch.get_num_threads(),
    }


def dpo_rows(pair: tuple[Any, Any]) -> dict[str, list[int]]:
    """What TRL's collator reads: the prompt is all before the first trained token."""
    chosen, rejected = (row.ids[: end_of(row)].tolist() for row in pair)
    start = int(pair[0].train.nonzero()[0][0])
    return {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}


def reward_rows(pair: tuple[Any, Any]) -> dict[str, list[int]]:
    """Both conversations whole, up to the token that is scored."""
    return {f"{side}_ids": row.ids[: end_of(row)].tolist() for side, row in zip(("chosen", "rejected"), pair, strict=True)}


Made = tuple[Any, Timed | None]


def dpo_trainer(case: Case, setting: Setting, base: str, tokenizer: Any, rows: Any, clock: Any, folder: str) -> Made:
    """DPOTrainer; with `precompute` it works out the reference of all pairs as it is made, in batches of `reference_batch`."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        """Its rows are ids already; DPOTrainer, unlike RewardTrainer, would tokenise them once more."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    reference = timed(Tokenised, "_precompute_ref_logps")
    trainer = Tokenised(
        AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, PRECISIONS[setting["precision"]][0])),
        args=DPOConfig(
            **common(case, setting, folder),
            beta=BETA,
            precompute_ref_log_probs=setting.get("precompute", False),
            precompute_ref_batch_size=setting.get("reference_batch"),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    return trainer, reference


def reward_trainer(case: Case, setting: Setting, base: str, tokenizer: Any, rows: Any, clock: Any, folder: str) -> Made:
    """RewardTrainer; the score head is trained whole beside the adapters, as PEFT does for classifiers."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(base, dtype=getattr(torch, PRECISIONS[setting["precision"]][0])),
        args=RewardConfig(**common(case, setting, folder)),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS"),
        callbacks=[clock],
    )
    return trainer, None


def common(case: Case, setting: Setting, folder: str) -> dict[str, Any]:
    """TRL's settings: the same optimizer and steps as ours."""
    import torch

    return {
        "output_dir": folder, "per_device_train_batch_size": setting["batch"],
        "gradient_accumulation_steps": max(1, case.pairs // setting["batch"]),
        "num_train_epochs": 1, "learning_rate": case.lr, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "bf16": PRECISIONS[setting["precision"]][1], "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False,
        "max_length": None, "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip


if __name__ == "__main__":
    answer(__doc__, build, Case, {"ours": ours, "trl": trl})
