"""Supervised fine-tuning, ours and TRL's SFTTrainer in turn: the same rows, trained tokens, LoRA and model; speed, memory, start.

Every measurement runs in a process of its own (sft_sides.py). Each setting of both sides is tried once, then the best of each runs
alternately and medians are compared. README.md beside this file says what each figure means.
Usage: python benchmarks/sft.py [--data FILE] [--cases lora-135m full-135m pocket] [--curves] [--profile] [--out records/NAME.json]
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from sft_sides import Case, Result, Setting, recipe_of

# This process never imports torch: a child's ru_maxrss begins with what its parent held.
# glibc keeps freed memory, as our engine asks it to in its own process (model/allocator.py).
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1), "MALLOC_TOP_PAD_": str(16 << 20)}
FAST = ("packed", "head", "lora", "layer")
FAR = {"fp32": 1e-3, "bf16": 3e-2}  # by so much the losses of the first step may differ
BUSY = 0.1  # cores that others may use while we measure
MEMORY, SHARE, START = (0.6, 0.4), (0.60, 0.75), (5.0, 3.0)  # wanted, stretch


class ChildError(Exception):
    """A measurement ended with an error."""


def grid(batches: Sequence[int], precisions: Sequence[str]) -> list[Setting]:
    """Every batch size with every precision."""
    return [{"batch": batch, "precision": precision} for precision in precisions for batch in batches]


def cases(work: Path, quick: bool) -> dict[str, Case]:
    """The three cases of the table; `quick` leaves one setting a side."""
    micro: list[Setting] = [{"micro_tokens": size} for size in (512, 1_024, 2_048)]
    over, shape = "fp32 under bf16 autocast", str(work / "model")
    lora = Case(
        "lora-135m", shape, [str(work / "rows.jsonl")], str(work / "start.jsonl"), True, "bf16", 2e-4, 4 if quick else 8, micro,
        grid((1, 2, 4), (over, "bf16 under bf16 autocast", "bf16")), [], (2.5, 3.5),
    )  # fmt: skip
    # Trained weights in fp32 on both sides; TRL with bf16 weights and optimizer rounds every update away below 1/256 and stands beside.
    full = replace(
        lora, name="full-135m", start="", lora=False, lr=2e-5, trl=grid((1, 2, 4), (over,)), beside=grid((1, 2, 4), ("bf16",)),
        wanted=(2.0, 3.0),
    )  # fmt: skip
    pocket = Case(
        "pocket", "pocket", [str(work / "tickets.jsonl"), str(work / "text.jsonl")], str(work / "many-tickets.jsonl"), True, "fp32", 2e-3,
        16, [size | {"dtype": dtype} for dtype in ("bf16", "fp32") for size in micro], grid((1, 2, 4, 8, 16), ("fp32", over, "bf16")), [],
        (3.0, 5.0),
    )  # fmt: skip
    found = {case.name: case for case in (lora, full, pocket)}
    return {name: replace(case, ours=case.ours[1:2], trl=case.trl[1:2], beside=[]) if quick else case for name, case in found.items()}


class Bench:
    """Where the measurements of one call lie, and what was seen of the machine meanwhile."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.environment = {
            **os.environ, "TUNESMITH_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "hf"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def child(self, what: str, case: Case | None, setting: Setting, **others: Any) -> Result:
        """One measurement in a process of its own. Raises ChildError."""
        job, result = self.work / "job.json", self.work / "result.json"
        keep = KEEP if setting.get("keep_memory") else {}
        job.write_text(json.dumps({"what": what, "case": case and asdict(case), "setting": setting, **others}), encoding="utf-8")
        seen = self.run([str(Path(__file__).with_name("sft_sides.py")), str(job), str(result)], keep)
        return {"setting": setting, **json.loads(result.read_text(encoding="utf-8")), **seen}

    def run(self, words: Sequence[str], environment: dict[str, str]) -> Result:
        """A Python process; returns the load before it and the cores that others used meanwhile. Raises ChildError."""
        load, began, before = os.getloadavg()[0], time.perf_counter(), others_seconds()
        done = subprocess.run([sys.executable, *words], env=self.environment | environment, capture_output=True, text=True, check=False)
        others = max(0.0, others_seconds() - before) / (time.perf_counter() - began)
        if done.returncode:
            raise ChildError(done.stderr[-3_000:])
        if others > BUSY:
            say(f"WARNING: other processes used {others:.2f} cores during this measurement")
        return {"load": round(load, 2), "others_cores": round(others, 3)}


def say(words: str) -> None:
    """A line to the terminal at once."""
    print(words, flush=True)


def others_seconds() -> float:
    """Processor seconds of everything but this process and its finished children, those stolen by other guests of the host included."""
    times = psutil.cpu_times()
    used = sum(getattr(times, kind, 0.0) for kind in ("user", "system", "nice", "steal", "irq", "softirq"))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        used -= usage.ru_utime + usage.ru_stime
    return float(used)


def demand_idle(anyway: bool) -> Result:
    """Look for two seconds at what else runs; refuse to measure beside it unless `anyway`."""
    began, before = time.perf_counter(), others_seconds()
    spent = {process: cpu_seconds(process) for process in psutil.process_iter(["name"]) if process.pid != os.getpid()}
    time.sleep(2)
    wall = time.perf_counter() - began
    others = round((others_seconds() - before) / wall, 3)
    cores = {f"{process.info['name']} ({process.pid})": (cpu_seconds(process) - old) / wall for process, old in spent.items()}
    busy = {name: round(used, 2) for name, used in cores.items() if used > BUSY / 2}
    found: Result = {"load": [round(value, 2) for value in os.getloadavg()], "others_cores": others, "busy": busy}
    if others > BUSY or busy:
        say(f"WARNING: the machine is not idle: {found}")
        if not anyway:
            raise SystemExit("stop what else runs, or measure in spite of it with --anyway")
    return found


def cpu_seconds(process: psutil.Process) -> float:
    """Processor seconds of a process so far; 0 when it is gone."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def rate(run: Result, skip: int = 1) -> float:
    """Tokens a second of steps; `skip` leaves the first out, which carries what warms up."""
    return float(sum(run["tokens"][skip:]) / sum(run["seconds"][skip:]))


def shown(run: Result) -> str:
    """One line for a measurement."""
    words = ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in run["setting"].items())
    return f"{words:<44}{rate(run):9.1f} tokens/s {run['memory_gb']:7.2f} GB"


def tried(bench: Bench, side: str, case: Case, settings: Sequence[Setting]) -> list[Result]:
    """Each setting once; one that fails is kept with its error."""
    found = []
    for setting in settings:
        try:
            found.append(bench.child(side, case, setting))
            say(f"  try {side:<5}{shown(found[-1])}")
        except ChildError as error:
            found.append({"setting": setting, "error": str(error)})
            say(f"  try {side:<5}{setting} FAILED: {str(error).strip().splitlines()[-1]}")
    return found


def best_of(runs: Sequence[Result], side: str) -> Setting:
    """The setting of the fastest. Raises ChildError when none worked."""
    good = [run for run in runs if "error" not in run]
    if not good:
        raise ChildError(f"no setting of {side} works; the last error:\n{runs[-1]['error']}")
    return dict(max(good, key=rate)["setting"])


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


def spread(values: Sequence[float]) -> Result:
    """Median and range."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def measure(bench: Bench, case: Case, runs: int) -> Result:
    """Try, choose, run in turn, compare."""
    trials = {side: tried(bench, side, case, settings) for side, settings in (("ours", case.ours), ("trl", case.trl))}
    best = {side: best_of(found, side) for side, found in trials.items()}
    first = compare_first_step(bench, case, best)
    found: dict[str, list[Result]] = {"ours": [], "trl": []}
    for _ in range(runs):
        for side, results in found.items():
            results.append(bench.child(side, case, best[side]))
            say(f"  run {side:<5}{shown(results[-1])}")
        demand_same(case, found["ours"][-1], found["trl"][-1])
    every = [run for results in (*trials.values(), *found.values()) for run in results if "error" not in run]
    gemm: dict[str, float] = {}
    for run in every:
        name, flops = run["gemm"]["name"], run["gemm"]["flops"]
        gemm[name] = max(flops, gemm.get(name, 0.0))
    sides = {}
    for side, results in found.items():
        sides[side] = {
            "setting": best[side],
            "tokens_per_s": spread([rate(run) for run in results]),
            "tokens_per_s_with_first_step": spread([rate(run, 0) for run in results]),
            "memory_gb": spread([run["memory_gb"] for run in results]),
            "share": spread([sum(run["flops"][1:]) / sum(run["seconds"][1:]) / gemm[run["gemm"]["name"]] for run in results]),
        }
    beside = tried(bench, "trl", case, [*case.beside, best["trl"] | {"keep_memory": True}])
    one = found["ours"][0]
    rows = {"examples_of_a_step": case.examples, "steps": len(one["tokens"]), "tokens": sum(one["tokens"]), "trained": sum(one["trained"])}
    return {
        **rows, "formula": one["formula"], "gemm_tflops": {name: flops / 1e12 for name, flops in gemm.items()}, "sides": sides,
        "first_step": first, "start": started(bench, case, best["ours"], runs) if case.start else None, "trials": trials, "runs": found,
        "beside": beside,
    }  # fmt: skip


def started(bench: Bench, case: Case, setting: Setting, runs: int) -> Result:
    """Seconds from the start of `tunesmith train` to the end of its first step, tokens in the cache (the first run fills it)."""
    seconds = []
    for number in range(runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            tree = recipe_of(replace(case, data=[case.start]), setting, f"{folder}/run")
            tree["run"] = {**tree["run"], "steps": 1, "epochs": None}
            recipe = Path(folder, "recipe.json")
            recipe.write_text(json.dumps(tree), encoding="utf-8")
            bench.run(["-m", "tunesmith", "train", str(recipe)], {})
            first = json.loads(Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        if number:
            seconds.append(first["first_step_seconds"])
    return {**spread(seconds), "tokens_of_the_step": first["tokens"], "seconds_of_the_step": first["seconds"]}


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
        seconds = ranged(found["start"], lambda value: f"{value:.2f}")
        say(f"{'start to first step, s':<28}{seconds:>24}{'':>32}{START[0]:>8.0f}{START[1]:>9.0f}")
    say(f"settings: ours {ours['setting']}, TRL {trl['setting']}; {found['formula']}")
    for run in (run for run in found["beside"] if "error" not in run):
        ratios = ours["tokens_per_s"]["median"] / rate(run), ours["memory_gb"]["median"] / run["memory_gb"]
        say(f"beside, one run: {shown(run)}; ours {ratios[0]:.2f}x the speed, {ratios[1]:.2f}x the memory")
    say("")


def ranged(values: Result, digits: Callable[[float], str]) -> str:
    """A median with its range."""
    return f"{digits(values['median'])} ({digits(values['min'])}-{digits(values['max'])})"


def curves(bench: Bench, case: Case, setting: Setting) -> Result:
    """The losses of ours with every fast path on, each one off, and all off: the largest difference from all on."""
    found: Result = {}
    for dtype in ("fp32", "bf16"):
        # Fused layers do their own LoRA, so that `lora` alone decides nothing while they are on.
        ways = [{}, *({name: False} for name in FAST), {"lora": False, "layer": False}, dict.fromkeys(FAST, False)]
        on, *others = tried(bench, "ours", case, [setting | {"dtype": dtype, "fast": fast} for fast in ways])
        for run in others:
            if "error" in on or "error" in run:
                run["largest_difference"] = None
            else:
                run["largest_difference"] = max(abs(a - b) for a, b in zip(on["losses"], run["losses"], strict=True))
            off = " and ".join(run["setting"]["fast"])
            say(f"  {case.name} {dtype}, {off} off: the loss differs by at most {run['largest_difference']} from that with all on")
        found[dtype] = [on, *others]
    return found


def machine() -> Result:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = round(psutil.virtual_memory().total / 1e9, 1)
    threads = os.environ.get("OMP_NUM_THREADS")
    return {"cpu": name, "cores": cores, "memory_gb": memory, "OMP_NUM_THREADS": threads, "python": platform.python_version()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows in any of our formats; without: longer rows of the bundled grammar")
    parser.add_argument("--cases", nargs="+", choices=["lora-135m", "full-135m", "pocket"], default=["lora-135m", "full-135m", "pocket"])
    parser.add_argument("--runs", type=int, default=3, help="alternating runs of the best settings")
    parser.add_argument("--curves", action="store_true", help="instead of the race: loss curves with each fast path off")
    parser.add_argument("--profile", action="store_true", help="instead of the race: torch.profiler's table of one pass of ours")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two layers, few rows, one setting a side, one run")
    parser.add_argument("--anyway", action="store_true", help="measure although the machine is not idle")
    parser.add_argument("--out", type=Path, help="the record, JSON")
    return parser.parse_args()


def main() -> None:
    """Measure the chosen cases, print the tables, write the record."""
    words = arguments()
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")}
    record: Result = {
        "date": time.strftime("%Y-%m-%d"), "machine": machine(), "idle": demand_idle(words.anyway), "versions": versions,
        "data": words.data.stem if words.data else "tickets of the bundled grammar", "quick": words.quick, "cases": {}, "failed": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bench = Bench(work)
        data = str(words.data.resolve()) if words.data else ""
        record["built"] = bench.child("build", None, {}, work=folder, data=data, quick=words.quick)
        for case in (cases(work, words.quick)[name] for name in words.cases):
            say(case.name)
            try:
                if words.profile:
                    record["cases"][case.name] = bench.child("profile", case, {"micro_tokens": 1_024})
                    say(record["cases"][case.name]["table"])
                elif words.curves:
                    record["cases"][case.name] = curves(bench, case, {"micro_tokens": 1_024})
                    errors = [run["error"] for runs in record["cases"][case.name].values() for run in runs if "error" in run]
                    if errors:
                        raise ChildError(errors[0])
                else:
                    record["cases"][case.name] = measure(bench, case, 1 if words.quick else words.runs)
                    table(case, record["cases"][case.name])
            except ChildError as error:
                record["failed"][case.name] = str(error)
                say(f"{case.name} FAILED:\n{error}")
    if words.out:
        words.out.parent.mkdir(parents=True, exist_ok=True)
        words.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if record["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
