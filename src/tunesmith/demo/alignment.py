"""The quickstart's second half: preferences, rewards and process rewards on the bundled base, each measured on held-out rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.core.errors import RecipeError, did_you_mean
from tunesmith.core.files import write_jsonl
from tunesmith.core.log import logger
from tunesmith.pocket import answers, chains

if TYPE_CHECKING:
    from tunesmith.core.types import Tokens
    from tunesmith.evals.stats import Interval
    from tunesmith.model.policy import Policy

PAIRS, RATED, LABELS, CHAINS, TEST = 3_000, 4_000, 4_000, 20_000, 200
BINS = 5  # of predicted probability, in the table of calibration


@dataclass(frozen=True)
class Stage:
    """One run: the objective, the rows it learns from, and settings beside those that all share."""

    name: str
    objective: dict[str, Any]
    data: str = "pairs"
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: bool = True


STAGES = (
    Stage("dpo", {"name": "dpo"}),
    Stage("ipo", {"name": "ipo"}),
    Stage("simpo", {"name": "simpo"}),
    Stage("orpo", {"name": "orpo", "beta": 3.0}),
    Stage("kto", {"name": "kto"}, data="labels"),
    # All weights learn faster than an adapter which words turn a sentence round; with a loss at every token seeds differ less.
    Stage(
        "reward",
        {"name": "reward", "token_weight": 1.0},
        data="rated",
        adapter=False,
        settings={"optim": {"lr": 1e-3}, "run": {"batch": {"examples": 32}}},
    ),
    # The base cannot add; that it learns to after some 1,000 steps, and quickly then, is why this takes longer than the others together.
    Stage(
        "prm",
        {"name": "prm"},
        data="steps",
        adapter=False,
        settings={"optim": {"lr": 1e-3}, "run": {"epochs": 3, "batch": {"examples": 32}}},
    ),
)


def align(out: str | Path = "demo", *, fresh: bool = False, seed: int = 0, only: Sequence[str] = ()) -> dict[str, Any]:
    """Train the stages on rows that our own grammar writes and measure each before and after on held-out rows; a few minutes on two cores.

    dpo, ipo, simpo, orpo and kto are to prefer helpful answers to rude ones, and so is the reward model; the process-reward model is to
    find the first wrong step of a sum. No sentence of the held-out answers and no held-out sum occurs in training. `only` names stages;
    raises RecipeError for a name that is none.
    Returns {"stages": [{"name", "measure", "before", "after", "low", "high", "n", "seconds", "run"}], "calibration": [{"low", "high",
    "n", "predicted", "right"}], "seconds", "report"}.
    """
    from tunesmith.training.run import train

    started, out = time.perf_counter(), Path(out)
    files = write_data(out / "data", seed)
    rows: list[dict[str, Any]] = []
    calibration: list[dict[str, Any]] = []
    for stage in _chosen(only):
        logger.info("%s", stage.name)
        began = time.perf_counter()
        result = train(recipe_of(stage, files, out / "align" / stage.name, seed), fresh=fresh)
        before, after, bins = measure(stage, result, files)
        calibration = bins or calibration
        rows.append({
            "name": stage.name,
            "measure": "first wrong step found" if stage.data == "steps" else "preference accuracy",
            "before": before,
            "after": after.value,
            "low": after.low,
            "high": after.high,
            "n": after.n,
            "seconds": time.perf_counter() - began,
            "run": result["run"],
        })  # fmt: skip
    seconds = time.perf_counter() - started
    return {"stages": rows, "calibration": calibration, "seconds": seconds, "report": str(_report(out, rows, calibration, seconds, seed))}


def _chosen(only: Sequence[str]) -> list[Stage]:
    names = {stage.name: stage for stage in STAGES}
    for name in only:
        if name not in names:
            raise RecipeError(
                f"the demo has no stage '{name}'{did_you_mean(name, names)}",
                where="--only",
                remedy=f"use one of: {', '.join(names)}",
                code="unknown_name",
            )
    return [stage for stage in STAGES if not only or stage.name in only]


def write_data(folder: Path, seed: int) -> dict[str, Path]:
    """Write the rows of every kind, training and held-out."""
    made = {
        "pairs": answers.preference_rows(PAIRS, seed),
        "pairs.test": answers.held_out_rows(TEST, seed),
        "rated": answers.preference_rows(RATED, seed),
        "rated.test": answers.held_out_rows(TEST, seed),
        "labels": answers.labelled_rows(LABELS, seed),
        "steps": chains.chain_rows(CHAINS, seed),
        "steps.test": chains.held_out_chains(TEST, seed),
    }
    files = {}
    for name, rows in made.items():
        files[name] = folder / f"{name}.jsonl"
        write_jsonl(files[name], rows)
    return files


def recipe_of(stage: Stage, files: dict[str, Path], run: Path, seed: int) -> dict[str, Any]:
    """The stage as a recipe."""
    from tunesmith.model.load import choose_device, multiplies_bf16

    held_out = files.get(f"{stage.data}.test")
    return {
        "model": {
            "base": "pocket",
            "dtype": "bf16" if multiplies_bf16(choose_device("auto")) else "fp32",
            "adapter": {"name": "lora", "rank": 16} if stage.adapter else None,
        },
        "data": {"train": str(files[stage.data]), **({"validation": str(held_out)} if held_out else {})},
        "objective": stage.objective,
        "tokens": {"max_length": 512},
        "optim": {"lr": 2e-3, **stage.settings.get("optim", {})},
        "run": {
            "epochs": 1, "batch": {"examples": 16}, "save_every": 0, "eval_every": 0, "samples": 0, "use_best": False, "seed": seed,
            **stage.settings.get("run", {}), "out": str(run),
        },
    }  # fmt: skip


def measure(stage: Stage, result: dict[str, Any], files: dict[str, Path]) -> tuple[float, Interval, list[dict[str, Any]]]:
    """The figure before and after training on the held-out rows, and for the reward model how far its probabilities hold."""
    from tunesmith.core.load import build
    from tunesmith.data.prepare import prepare
    from tunesmith.evals.opening import open_model
    from tunesmith.evals.stats import share
    from tunesmith.model.build import build_policy
    from tunesmith.objective import methods, wanted

    kind = stage if stage.name != "kto" else STAGES[0]  # labels are learned, and pairs are what shows it
    recipe = build(recipe_of(kind, {kind.data: files[f"{kind.data}.test"]}, Path(result["run"]), 0)).recipe
    opened = open_model(result["run"])
    prepared = prepare(recipe, opened.tokenizer, wanted=wanted(methods(recipe.objective)))
    rows = list(prepared.train)
    if stage.data == "steps":
        return _first_slips(opened.policy, rows)
    if stage.name == "kto":
        fresh = build_policy(recipe.model, str(opened.policy.device), seed=0)
        return float(np.mean(_preferred(fresh, rows))), share(_preferred(opened.policy, rows)), []
    n, start, end = len(rows) // 2, result["start"]["eval/accuracy"], result["metrics"]["eval/accuracy"]
    after = share([1.0] * round(end * n) + [0.0] * (n - round(end * n)))
    return start, after, _calibration(opened.policy, rows) if stage.name == "reward" else []


def _preferred(policy: Policy, rows: Sequence[Tokens]) -> list[float]:
    """For each pair, whether training has raised the chosen answer's log-probability by more than the rejected one's.

    One half where the difference may be rounding, as the objectives have it: a model before training prefers nothing.
    """
    from tunesmith.evals.likelihood import row_sums
    from tunesmith.objective.sequences import TIE

    tuned, _ = row_sums(policy, rows)
    with policy.adapter_disabled():
        base, _ = row_sums(policy, rows)
    gain = (base - tuned).reshape(-1, 2)  # sums of negative log-likelihoods, chosen and rejected in turn
    margin = gain[:, 0] - gain[:, 1]
    margin[np.abs(margin) <= TIE * np.abs(tuned).reshape(-1, 2).max(1)] = 0
    return [float(value) for value in np.sign(margin) / 2 + 0.5]


def _scores(policy: Policy, rows: Sequence[Tokens]) -> list[list[float]]:
    """What a reward model reads in each row."""
    from tunesmith.training.receipt import live_numbers

    policy.train_mode(False)
    return live_numbers(policy, rows)


def _first_slips(policy: Policy, rows: Sequence[Tokens]) -> tuple[float, Interval, list[dict[str, Any]]]:
    """How often the first step that the model calls wrong is the first wrong one, or none is and none is called so.

    Before training: what calling every step right would get.
    """
    from tunesmith.evals.stats import share

    found, sound = [], []
    for row, scores in zip(rows, _scores(policy, rows), strict=True):
        values = row.streams["value"][np.flatnonzero(row.train)]
        slip = next((place for place, value in enumerate(values) if value < 0.5), None)
        called = next((place for place, score in enumerate(scores) if score < 0), None)
        found.append(float(called == slip))
        sound.append(float(slip is None))
    return float(np.mean(sound)), share(found), []


def _calibration(policy: Policy, rows: Sequence[Tokens]) -> list[dict[str, Any]]:
    """Pairs by the probability that the model gives the answer it prefers, beside how often that answer is the better one."""
    # With a loss at every token there is a score at each; the answer's own is the last one.
    scores = np.array([score[-1] for score in _scores(policy, rows)]).reshape(-1, 2)
    margin = scores[:, 0] - scores[:, 1]
    sure = 1 / (1 + np.exp(-np.abs(margin)))
    bins = []
    for number in range(BINS):
        low, high = 0.5 + number / (2 * BINS), 0.5 + (number + 1) / (2 * BINS)
        own = (sure >= low) & ((sure < high) | (number == BINS - 1))
        if own.any():
            said, right = float(sure[own].mean()), float((margin[own] > 0).mean())
            bins.append({"low": low, "high": high, "n": int(own.sum()), "predicted": said, "right": right})
    return bins


def _report(out: Path, rows: Sequence[dict[str, Any]], calibration: Sequence[dict[str, Any]], seconds: float, seed: int) -> Path:
    from tunesmith.core.types import Score
    from tunesmith.evals.report import environment, write_report

    scores = [Score(row["name"], "accuracy", row["after"], row["n"], row["low"], row["high"], seed, row["before"]) for row in rows]
    notes = [
        f"reward model: of {bin_['n']} pairs where it is {100 * bin_['predicted']:.0f} % sure, {100 * bin_['right']:.0f} % are right"
        for bin_ in calibration
    ]
    return write_report(
        out / "align",
        title="Preferences, rewards, steps",
        subtitle="the bundled base before and after each objective, on held-out rows that share no sentence and no sum with training",
        facts={"pairs": PAIRS, "rated pairs": RATED, "labels": LABELS, "chains": CHAINS, "seconds": round(seconds, 1)},
        scores=scores,
        environment=environment(),
        notes=notes,
    )


def print_align(result: dict[str, Any]) -> None:
    """The table of stages, the reward model's calibration, and where the report is."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title="Preferences, rewards, steps", title_justify="left", box=None, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("", "measure", "before", "after", "95 % interval", "n", "seconds"):
        table.add_column(name, justify="left" if name in ("", "measure") else "right")
    for row in result["stages"]:
        shown = [f"{100 * row[key]:.1f} %" for key in ("before", "after", "low", "high")]
        interval = f"{shown[2]} to {shown[3]}"
        table.add_row(row["name"], row["measure"], shown[0], f"[bold green]{shown[1]}[/]", interval, str(row["n"]), f"{row['seconds']:.0f}")
    console.print(table)
    if result["calibration"]:
        bins = Table(
            title="\nIs the reward model as right as it is sure?", title_justify="left", box=None, padding=(0, 3, 0, 0), header_style="dim"
        )
        for name in ("sure", "right", "pairs"):
            bins.add_column(name, justify="right")
        for bin_ in result["calibration"]:
            bins.add_row(f"{100 * bin_['predicted']:.0f} %", f"{100 * bin_['right']:.0f} %", str(bin_["n"]))
        console.print(bins)
    console.print(f"\nreport   {result['report']}\n{result['seconds']:.0f} seconds in all", soft_wrap=True)
