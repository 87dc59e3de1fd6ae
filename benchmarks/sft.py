"""Supervised fine-tuning, ours and TRL's SFTTrainer in turn: the same rows, trained tokens, LoRA and model; speed, memory, start.

Every measurement runs in a process of its own (sft_sides.py). Each setting of both sides is tried once, then the best of each runs
alternately and medians are compared. README.md beside this file says what each figure means.
Usage: python benchmarks/sft.py [--data FILE] [--cases lora-135m full-135m pocket] [--curves] [--profile] [--out records/NAME.json]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from race import (
    FAR,
    IN_8_BITS,
    MEMORY,
    Bench,
    ChildError,
    add_8_bits,
    arguments,
    best_of,
    ceilings,
    grid,
    named,
    race,
    ranged,
    say,
    spread,
    tried,
)
from sft_sides import Case, recipe_of
from sides import Result, Setting

PRECISIONS_NEAR = ("bf16 under bf16 autocast", "bf16")  # of LoRA
FAST = ("packed", "head", "lora", "layer")
SHARE, START = (0.60, 0.75), (5.0, 3.0)  # wanted, stretch


def cases(work: Path, quick: bool, short: bool = False) -> dict[str, Case]:
    """The three cases of the table; `short` leaves settings of TRL that came within a fifth of its best in records/, `quick` one a side."""
    micro: list[Setting] = [{"micro_tokens": size} for size in (512, 1_024, 2_048, 4_096)]
    over, shape = "fp32 under bf16 autocast", str(work / "model")
    lora = Case(
        "lora-135m", shape, [str(work / "rows.jsonl")], str(work / "start.jsonl"), True, "bf16", 2e-4, 4 if quick else 8, micro,
        grid((1, 2, 4), (over, "bf16 under bf16 autocast", "bf16")), [], (2.5, 3.5),
    )  # fmt: skip
    # Trained weights in fp32 on both sides; TRL with bf16 weights and optimizer rounds every update away below 1/256 and stands beside.
    full = replace(
        lora, name="full-135m", start="", lora=False, lr=2e-5, trl=grid((1, 2, 4), (over,)), beside=grid((1, 2, 4), ("bf16",)),
        ours=[{"micro_tokens": 384}, *micro], wanted=(2.0, 3.0),
    )  # fmt: skip
    pocket = Case(
        "pocket", "pocket", [str(work / "tickets.jsonl"), str(work / "text.jsonl")], str(work / "many-tickets.jsonl"), True, "fp32", 2e-3,
        16, [size | {"dtype": dtype} for dtype in ("bf16", "fp32") for size in micro], grid((1, 2, 4, 8, 16), ("fp32", over, "bf16")), [],
        (3.0, 5.0),
    )  # fmt: skip
    found = {case.name: case for case in (lora, full, pocket)}
    if short:
        near = {"lora-135m": grid((1, 2), PRECISIONS_NEAR), "full-135m": grid((1, 2), (over,)), "pocket": grid((4, 8, 16), ("fp32",))}
        found = {name: replace(case, trl=near[name], beside=[]) for name, case in found.items()}
    return {name: replace(case, ours=case.ours[1:2], trl=case.trl[1:2], beside=[]) if quick else case for name, case in found.items()}


def rate(run: Result, skip: int = 1) -> float:
    """Tokens a second of steps; `skip` leaves the first out, which carries what warms up."""
    return float(sum(run["tokens"][skip:]) / sum(run["seconds"][skip:]))


def shown(run: Result) -> str:
    """One line for a measurement."""
    return f"{named(run['setting']):<44}{rate(run):9.1f} tokens/s {run['memory_gb']:7.2f} GB"


def contenders(trials: dict[str, list[Result]]) -> dict[str, Setting]:
    """The fastest setting of each side, and ours once more within the wanted share of the memory, where that is another setting."""
    fastest = {side: best_of(found, side, rate) for side, found in trials.items()}
    small = [run for run in trials["ours"] if "error" not in run and run["memory_gb"] <= MEMORY[0] * fastest["trl"]["memory_gb"]]
    chosen = {side: dict(run["setting"]) for side, run in fastest.items()}
    if small and (lean := dict(max(small, key=rate)["setting"])) != chosen["ours"]:
        chosen["lean"] = lean
    return chosen


def compare_first_step(bench: Bench, case: Case, best: dict[str, Setting]) -> Result:
    """Both sides on the rows of one step, which have one order only. Raises ChildError when tokens, operations or losses differ."""
    limit = {"limit": case.examples // len(case.data)}
    runs = {side: bench.child(side, case, best[side] | limit) for side in ("ours", "trl")}
    demand_same(case, runs["ours"], runs["trl"])
    losses = {side: run["losses"][0] for side, run in runs.items()}
    far = abs(losses["ours"] - losses["trl"])
    precise = best["ours"].get("dtype", case.dtype) == "fp32" and best["trl"]["precision"] == "fp32"
    found = {"loss": losses, "grad_norm": {side: run["grad_norms"][0] for side, run in runs.items()}, "difference": far}
    say(f"  first step: loss {losses['ours']:.5f} ours, {losses['trl']:.5f} TRL")
    if far > FAR["fp32" if precise else "bf16"]:
        raise ChildError(f"the losses of the first step differ by {far:.2g}: {found}")
    return found


def demand_same(case: Case, one: Result, other: Result) -> None:
    """The same tokens, trained tokens and operations on both sides, or ChildError."""
    for name, tolerance in (("tokens", 0.0), ("trained", 0.0), ("flops", 1e-6)):
        left, right = sum(one[name]), sum(other[name])
        if abs(left - right) > tolerance * right:
            raise ChildError(f"{case.name}: {name} differ: ours {left}, TRL {right}")
    if one["formula"] != other["formula"]:
        raise ChildError(f"{case.name}: operations are counted differently: {one['formula']} and {other['formula']}")


def measure(bench: Bench, case: Case, runs: int) -> Result:
    """Try, choose, run in turn, compare."""
    trials = {side: tried(bench, side, case, settings, shown) for side, settings in (("ours", case.ours), ("trl", case.trl))}
    best = contenders(trials)
    if case.lora and best["ours"].get("dtype", case.dtype) == "bf16":
        add_8_bits(bench, case, trials, best, shown, rate)
    first = compare_first_step(bench, case, best)
    found: dict[str, list[Result]] = {side: [] for side in best}
    for _ in range(runs):
        for side, results in found.items():
            results.append(bench.child("trl" if side == "trl" else "ours", case, best[side]))
            say(f"  run {side:<5}{shown(results[-1])}")
        demand_same(case, found["ours"][-1], found["trl"][-1])
    every = [run for results in (*trials.values(), *found.values()) for run in results if "error" not in run]
    gemm = ceilings(every)
    sides = {}
    for side, results in found.items():
        sides[side] = {
            "setting": best[side],
            "tokens_per_s": spread([rate(run) for run in results]),
            "tokens_per_s_with_first_step": spread([rate(run, 0) for run in results]),
            "memory_gb": spread([run["memory_gb"] for run in results]),
            "share": spread([sum(run["flops"][1:]) / sum(run["seconds"][1:]) / gemm[run["gemm"]["name"]] for run in results]),
        }
    beside = tried(bench, "trl", case, [*case.beside, best["trl"] | {"keep_memory": True}], shown)
    one = found["ours"][0]
    rows = {"examples_of_a_step": case.examples, "steps": len(one["tokens"]), "tokens": sum(one["tokens"]), "trained": sum(one["trained"])}
    return {
        **rows, "formula": one["formula"], "gemm_tflops": {name: flops / 1e12 for name, flops in gemm.items()}, "sides": sides,
        "first_step": first, "start": started(bench, case, best["ours"], runs) if case.start else None, "trials": trials, "runs": found,
        "beside": beside,
    }  # fmt: skip


def started(bench: Bench, case: Case, setting: Setting, runs: int) -> Result:
    """Seconds from the start of `tunesmith train` to its first step and to that step's end, tokens in the cache (a first run fills it)."""
    begun, ended = [], []
    for number in range(runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            tree = recipe_of(replace(case, data=[case.start]), setting, f"{folder}/run")
            tree["run"] = {**tree["run"], "steps": 1, "epochs": None}
            recipe = Path(folder, "recipe.json")
            recipe.write_text(json.dumps(tree), encoding="utf-8")
            bench.run(["-m", "tunesmith", "train", str(recipe)], {})
            first = json.loads(Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        if number:
            begun.append(first["first_step_seconds"] - first["seconds"])
            ended.append(first["first_step_seconds"])
    return {"to_the_step": spread(begun), "to_its_end": spread(ended), "tokens_of_the_step": first["tokens"]}


def table(case: Case, found: Result) -> None:
    """The case's figures beside what the issue asks for."""
    ours, trl = found["sides"]["ours"], found["sides"]["trl"]
    steps = f"{found['steps']} steps of {case.examples} rows"
    say(f"\n{case.name}, {case.dtype}: {found['tokens']:,} tokens, {found['trained']:,} trained, {steps}")
    say(f"{'':<28}{'ours':>24}{'TRL at its best':>24}{'ratio':>8}{'wanted':>8}{'stretch':>9}")
    lines: list[tuple[str, str, Callable[[float], str], tuple[float, float] | None]] = [
        ("tokens/s", "tokens_per_s", lambda value: f"{value:,.0f}", case.wanted),
        ("with the first step", "tokens_per_s_with_first_step", lambda value: f"{value:,.0f}", None),
        ("peak memory, GB", "memory_gb", lambda value: f"{value:.2f}", MEMORY),
    ]
    for name, key, digits, wanted in lines:
        ratio = ours[key]["median"] / trl[key]["median"]
        marks = f"{wanted[0]:>7}x{wanted[1]:>8}x" if wanted else ""
        say(f"{name:<28}{ranged(ours[key], digits):>24}{ranged(trl[key], digits):>24}{ratio:>7.2f}x{marks}")
    percent: Callable[[float], str] = lambda value: f"{100 * value:.0f} %"  # noqa: E731
    shares = f"{ranged(ours['share'], percent):>24}{ranged(trl['share'], percent):>24}"
    say(f"{'share of the measured GEMM':<28}{shares}{'':>8}{percent(SHARE[0]):>8}{percent(SHARE[1]):>9}")
    if found["start"]:
        begun, ended = (ranged(found["start"][key], lambda value: f"{value:.2f}") for key in ("to_the_step", "to_its_end"))
        say(f"{'start to first step, s':<28}{begun:>24}{'':>32}{START[0]:>8.0f}{START[1]:>9.0f}")
        say(f"{'start to its end, s':<28}{ended:>24}")
    for name, words in (("lean", f"ours within {MEMORY[0]:.1f} of TRL's memory"), ("int8", "ours with the frozen base in 8 bits")):
        if side := found["sides"].get(name):
            ratios = (side[key]["median"] / trl[key]["median"] for key in ("tokens_per_s", "memory_gb"))
            say("{}: {} tokens/s {:.2f}x, memory {:.2f}x, share {}, settings {}".format(
                words, ranged(side["tokens_per_s"], lines[0][2]), *ratios, ranged(side["share"], percent), side["setting"]
            ))  # fmt: skip
    say(f"settings: ours {ours['setting']}, TRL {trl['setting']}; {found['formula']}")
    for run in (run for run in found["beside"] if "error" not in run):
        ratios = ours["tokens_per_s"]["median"] / rate(run), ours["memory_gb"]["median"] / run["memory_gb"]
        say(f"beside, one run: {shown(run)}; ours {ratios[0]:.2f}x the speed, {ratios[1]:.2f}x the memory")
    say("")


def curves(bench: Bench, case: Case, setting: Setting) -> Result:
    """The losses of ours with every fast path on, each off, all off, and no compiled functions: the largest difference from all on."""
    found: Result = {}
    for dtype in ("fp32", "bf16"):
        # Fused layers do their own LoRA, so that `lora` alone decides nothing while they are on.
        fast = [{}, *({name: False} for name in FAST), {"lora": False, "layer": False}, dict.fromkeys(FAST, False)]
        ways: list[Setting] = [*({"fast": one} for one in fast), {"fast": {}, "native": False}]
        if dtype == "bf16" and case.lora:
            ways.append(IN_8_BITS)
        on, *others = tried(bench, "ours", case, [setting | {"dtype": dtype, **way} for way in ways], shown)
        for run in others:
            if "error" in on or "error" in run:
                run["largest_difference"] = None
            else:
                run["largest_difference"] = max(abs(a - b) for a, b in zip(on["losses"], run["losses"], strict=True))
            names = run["setting"]["fast"]
            way = "the base in 8 bits" if names == IN_8_BITS["fast"] else f"{' and '.join(names) or 'compiled functions'} off"
            say(f"  {case.name} {dtype}, {way}: the loss differs by at most {run['largest_difference']} from that with all on")
        found[dtype] = [on, *others]
    return found


def main() -> None:
    """Measure the chosen cases, print the tables, write the record."""
    words = arguments(
        __doc__, "rows in any of our formats; without: longer rows of the bundled grammar", ("lora-135m", "full-135m", "pocket"),
        ("--curves", "instead of the race: loss curves with each fast path off"),
        ("--short", "of TRL's settings only those that came within a fifth of its best in the records"),
        ("--profile", "instead of the race: torch.profiler's table of one pass of ours"),
    )  # fmt: skip

    def one(bench: Bench, name: str, _: Result) -> Result:
        case = cases(bench.work, words.quick, words.short)[name]
        if words.profile:
            found = bench.child("profile", case, {"micro_tokens": 1_024})
            say(found["table"])
        elif words.curves:
            found = curves(bench, case, {"micro_tokens": 1_024})
            if errors := [run["error"] for runs in found.values() for run in runs if "error" in run]:
                raise ChildError(errors[0])
        else:
            found = measure(bench, case, 1 if words.quick else words.runs)
            table(case, found)
        return found

    race(words, Path(__file__).with_name("sft_sides.py"), "tickets of the bundled grammar", one)


if __name__ == "__main__":
    main()
