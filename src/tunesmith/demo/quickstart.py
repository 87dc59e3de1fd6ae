"""The quickstart: LoRA fine-tuning of the bundled base on support tickets, measured before and after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import pocket
from tunesmith.core.files import read_json, write_jsonl, write_text
from tunesmith.core.log import logger
from tunesmith.pocket import tickets

if TYPE_CHECKING:
    from tunesmith.evals.run import Report

TRAIN, VALID, TEST = 1800, 60, 200
RUN: dict[str, Any] = {"epochs": 1, "batch": {"examples": 16}, "save_every": 0, "eval_every": 50, "samples": 0}
# The answer is one JSON object that has both keys: any other JSON is not what was asked for.
WELL_FORMED: dict[str, Any] = {"name": "json_valid", "label": "valid_json", "keys": ["category", "urgency"]}
ACCURACY: dict[str, Any] = {"name": "json_fields", "label": "accuracy", "every": True}


def demo(out: str | Path = "demo", *, fresh: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train, evaluate before and after, and report in `out`; under a minute on two cores.

    The task is to give a ticket's {"category", "urgency"} as JSON; no sentence and no sentence frame of the test occurs in training.
    Returns {"before", "after", "intervals", "samples", "seconds", "report", "run"}: valid_json (one JSON object with both keys)
    and accuracy (both fields right) on 200 tickets, and general_perplexity on text of other kinds, which shows what was forgotten.
    """
    from tunesmith.evals.opening import open_model
    from tunesmith.evals.run import DISABLED, evaluate_policy
    from tunesmith.training.run import train

    started = time.perf_counter()
    out = Path(out)
    tree = write_data(out / "data", seed)
    tree["run"] = {**RUN, "seed": seed, "out": str(out / "run")}
    result = train(tree, fresh=fresh)
    opened = open_model(result["run"])
    logger.info("evaluating %d held-out tickets and general text, with the adapter off and on", TEST)
    tasks = evaluate_policy(
        opened, [WELL_FORMED, ACCURACY], out / "data" / "test.jsonl", base=DISABLED, seed=seed, max_new_tokens=32, samples=6
    )
    general = evaluate_policy(
        opened, [{"name": "perplexity", "label": "general_perplexity"}], pocket.general_text(), base=DISABLED, seed=seed
    )
    seconds = time.perf_counter() - started
    report = _report(out, tasks, general, result, seconds)
    names = {
        "valid_json": tasks.get("valid_json"),
        "accuracy": tasks.get("accuracy"),
        "general_perplexity": general.get("general_perplexity"),
    }
    return {
        "before": {name: found.score.base_value for name, found in names.items()},
        "after": {name: found.score.value for name, found in names.items()},
        "intervals": {name: found.as_dict() for name, found in names.items()},
        "samples": tasks.samples,
        "seconds": seconds,
        "report": str(report),
        "run": result["run"],
    }


def write_data(folder: Path, seed: int) -> dict[str, Any]:
    """Write the demo's rows and return the recipe without its run section."""
    rows = tickets.training_rows(TRAIN + VALID, seed)
    write_jsonl(folder / "train.jsonl", rows[:TRAIN])
    write_jsonl(folder / "valid.jsonl", rows[TRAIN:])
    write_jsonl(folder / "test.jsonl", tickets.test_rows(TEST, seed))
    write_text(folder / "general.jsonl", pocket.replay_text().read_text(encoding="utf-8"))
    from tunesmith.model.load import choose_device, multiplies_bf16

    return {
        # The base is stored in bf16; where the processor multiplies in it, training takes half the time.
        "model": {
            "base": "pocket",
            "dtype": "bf16" if multiplies_bf16(choose_device("auto")) else "fp32",
            "adapter": {"name": "lora", "rank": 16},
        },
        "data": {
            "train": [
                {"path": str(folder / "train.jsonl"), "format": "messages"},
                # Some general text against forgetting; the text that forgetting is measured on is another.
                {"path": str(folder / "general.jsonl"), "format": "text"},
            ],
            "validation": str(folder / "valid.jsonl"),
        },
        "tokens": {"max_length": 512},
        "optim": {"lr": 2e-3},
    }


def _report(out: Path, tasks: Report, general: Report, result: dict[str, Any], seconds: float) -> Path:
    from tunesmith.evals.report import environment, write_report
    from tunesmith.training.sinks import read_metrics

    run = Path(result["run"])
    metrics = read_metrics(run / "metrics.jsonl")
    if result["start"]:
        metrics.insert(0, {"step": 0, **result["start"]})
    return write_report(
        out,
        title="Support tickets to JSON",
        subtitle="the bundled base before and after LoRA fine-tuning; test tickets share no sentence with the training tickets",
        facts={"training rows": TRAIN, "steps": result["steps"], "seconds": round(seconds, 1)},
        scores=[*tasks.results, *general.results],
        metrics=metrics,
        samples=tasks.samples,
        ledger=read_json(run / "ledger.json"),
        recipe_yaml=(run / "recipe.yaml").read_text(encoding="utf-8"),
        receipt=read_json(run / "receipt.json"),
        environment=environment(),
        notes=[*tasks.notes, *general.notes],
    )


def print_demo(result: dict[str, Any]) -> None:
    """The table of before and after, two samples side by side, and where the report is."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title="Support tickets to JSON", title_justify="left", box=None, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("", "before", "after", "95 % interval", "n"):
        table.add_column(name, justify="left" if not name else "right")
    for name, found in result["intervals"].items():
        low, high, before, after = (_shown(name, found[key]) for key in ("low", "high", "base_value", "value"))
        table.add_row(name.replace("_", " "), before, f"[bold green]{after}[/]", f"{low} to {high}", str(found["n"]))
    console.print(table)
    sides = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", show_edge=False)
    for name, width in (("ticket", 44), ("before", 30), ("after", 44)):
        sides.add_column(name, width=width, overflow="fold")
    for sample in result["samples"][:3]:
        ticket = sample["prompt"].split("\n", 1)[-1].strip()
        sides.add_row(ticket[-120:], f"[dim]{_plain(sample['base'][:60])}[/]", f"[green]{_plain(sample['tuned'])}[/]")
        sides.add_row()
    console.print(sides)
    console.print(f"report   {result['report']}\nmodel    {result['run']}/final\n{result['seconds']:.0f} seconds in all", soft_wrap=True)


def _shown(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "general_perplexity" else f"{100 * value:.1f} %"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
