"""The machinery of the races: each measurement in a process of its own, on a machine that is idle, and what is said and kept of it.

Whoever imports this must not import torch: a child's ru_maxrss begins with what its parent held.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from sides import Result, Setting

# glibc keeps freed memory, as our engine asks it to in its own process (model/allocator.py).
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1), "MALLOC_TOP_PAD_": str(16 << 20)}
FAR = {"fp32": 1e-3, "bf16": 3e-2}  # by so much the losses of the first step may differ
BUSY = 0.1  # cores that others may use while we measure
MEMORY = (0.6, 0.4)  # of the peer's: wanted, stretch
Rate = Callable[[Result], float]


class ChildError(Exception):
    """A measurement ended with an error."""


def grid(batches: Sequence[int], precisions: Sequence[str]) -> list[Setting]:
    """Every batch size with every precision."""
    return [{"batch": batch, "precision": precision} for precision in precisions for batch in batches]


class Bench:
    """Where the measurements of one call lie, and what was seen of the machine meanwhile; `sides` is the script that they run."""

    def __init__(self, work: Path, sides: Path) -> None:
        self.work, self.sides = work, sides
        self.environment = {
            **os.environ, "TUNESMITH_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "hf"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def child(self, what: str, case: Any, setting: Setting, **others: Any) -> Result:
        """One measurement in a process of its own. Raises ChildError."""
        job, result = self.work / "job.json", self.work / "result.json"
        keep = (KEEP if setting.get("keep_memory") else {}) | ({} if setting.get("native", True) else {"TUNESMITH_NATIVE": "0"})
        job.write_text(json.dumps({"what": what, "case": case and asdict(case), "setting": setting, **others}), encoding="utf-8")
        seen = self.run([str(self.sides), str(job), str(result)], keep)
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


def tried(bench: Bench, side: str, case: Any, settings: Sequence[Setting], shown: Callable[[Result], str]) -> list[Result]:
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


IN_8_BITS: Setting = {"fast": {"int8": True}}


def add_8_bits(
    bench: Bench, case: Any, trials: dict[str, list[Result]], best: dict[str, Setting], shown: Callable[[Result], str], rate: Rate
) -> None:
    """A contender with the frozen base in 8 bits, where this processor has such products.

    It is tried with our best setting and with half as many tokens at a time; the faster one within the wanted share of TRL's memory runs.
    """
    ours, room = best["ours"], MEMORY[0] * best_of(trials["trl"], "trl", rate)["memory_gb"]
    sizes = (ours["micro_tokens"], ours["micro_tokens"] // 2)
    trials["int8"] = tried(bench, "ours", case, [ours | {"micro_tokens": size} | IN_8_BITS for size in sizes], shown)
    good = [run for run in trials["int8"] if "error" not in run]
    if good:
        best["int8"] = dict(max([run for run in good if run["memory_gb"] <= room] or good, key=rate)["setting"])


def named(setting: Setting) -> str:
    """A setting in words."""
    return ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in setting.items())


def ceilings(runs: Iterable[Result]) -> dict[str, float]:
    """The fastest square product that any of the runs measured, by its name."""
    found: dict[str, float] = {}
    for run in runs:
        name, flops = run["gemm"]["name"], run["gemm"]["flops"]
        found[name] = max(flops, found.get(name, 0.0))
    return found


def best_of(runs: Sequence[Result], side: str, rate: Rate) -> Result:
    """The fastest. Raises ChildError when none worked."""
    good = [run for run in runs if "error" not in run]
    if not good:
        raise ChildError(f"no setting of {side} works; the last error:\n{runs[-1]['error']}")
    return max(good, key=rate)


def spread(values: Sequence[float]) -> Result:
    """Median and range."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ranged(values: Result, digits: Callable[[float], str]) -> str:
    """A median with its range."""
    return f"{digits(values['median'])} ({digits(values['min'])}-{digits(values['max'])})"


def machine() -> Result:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = round(psutil.virtual_memory().total / 1e9, 1)
    threads = os.environ.get("OMP_NUM_THREADS")
    return {"cpu": name, "cores": cores, "memory_gb": memory, "OMP_NUM_THREADS": threads, "python": platform.python_version()}


def arguments(description: str | None, data: str, cases: Sequence[str], *others: tuple[str, str]) -> argparse.Namespace:
    """The command line of a race; `others` are further switches with their help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--cases", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--runs", type=int, default=3, help="alternating runs of the best settings")
    for name, words in others:
        parser.add_argument(name, action="store_true", help=words)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two layers, few rows, one setting a side, one run")
    parser.add_argument("--anyway", action="store_true", help="measure although the machine is not idle")
    parser.add_argument("--out", type=Path, help="the record, JSON")
    return parser.parse_args()


def race(words: argparse.Namespace, sides: Path, instead: str, one: Callable[[Bench, str, Result], Result]) -> None:
    """Measure each chosen case with `one` (bench, name of the case, what was built), and write the record.

    `instead` says what is trained on when no file is given. Exits with 1 when a case failed.
    """
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")}
    record: Result = {
        "date": time.strftime("%Y-%m-%d"), "machine": machine(), "idle": demand_idle(words.anyway), "versions": versions,
        "data": words.data.stem if words.data else instead, "quick": words.quick, "cases": {}, "failed": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), sides)
        data = str(words.data.resolve()) if words.data else ""
        record["built"] = bench.child("build", None, {}, work=folder, data=data, quick=words.quick)
        for name in words.cases:
            say(name)
            try:
                record["cases"][name] = one(bench, name, record["built"])
            except ChildError as error:
                record["failed"][name] = str(error)
                say(f"{name} FAILED:\n{error}")
    if words.out:
        words.out.parent.mkdir(parents=True, exist_ok=True)
        words.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if record["failed"]:
        raise SystemExit(1)
