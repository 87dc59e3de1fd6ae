"""Sampling, ours and its peers in turn: the same model and prompts, as many new tokens on every side; tokens a second, memory.

Every measurement runs in a process of its own (generate_sides.py). Each setting of the peers is tried once, then the best one and ours run
alternately and medians are compared. README.md beside this file says what each figure means.
Usage: python benchmarks/generate.py [--cases single adapters gpu-8b] [--only peers] [--runs 3] [--out records/NAME.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from generate_sides import ADAPTERS, Case, Ids
from race import Bench, ChildError, best_of, named, race, ranged, say, spread, tried
from sides import Result, Setting

NAMES = ("single", "adapters", "gpu-8b")
WANTED = {"bf16": 3.0, "int8": 4.5, "16/1": 0.7, "16/PEFT": 3.0}
FIRST = 8  # new tokens that are compared
HEATS = (0.0, 1.0)
Runs = dict[str, list[Result]]


def rate(run: Result) -> float:
    """New tokens a second, the prompts' processing included."""
    return float(run["new_tokens"] / run["seconds"])


def shown(run: Result) -> str:
    """One line for a measurement."""
    return f"{named(run['setting']):<84}{rate(run):9.1f} new tokens/s {run['memory_gb']:7.2f} GB"


def cases(work: Path, quick: bool) -> dict[str, Case]:
    """What is sampled in the first two cases."""
    rows, new = ((4, 6), (10, 10)) if quick else ((32, 64), (128, 64))
    return {name: Case(name, str(work), rows[place], new[place]) for place, name in enumerate(NAMES[:2])}


def single_peers(quick: bool) -> list[Setting]:
    """What is tried of transformers."""
    sizes = (2,) if quick else (8, 16, 32)
    found: list[Setting] = [
        {"engine": "generate", "batch": size, "cache": cache, "temperature": 0.0} for size in sizes for cache in ("dynamic", "static")
    ]
    # `tokens` go through the model at once; a page of 256 is what transformers takes by itself.
    most, common = sizes[-1], {"engine": "continuous", "temperature": 0.0}
    continuous: list[Setting] = [common | {"batch": size, "page": 256, "tokens": 512} for size in sizes]
    if not quick:
        continuous += [common | {"batch": most, "page": page, "tokens": tokens} for page, tokens in ((32, 512), (256, 4_096))]
        continuous.append(common | {"batch": most, "page": 256, "tokens": 512, "compile": 1})
    return found + continuous


def adapter_peers(quick: bool) -> list[Setting]:
    """What is tried of PEFT's mixed batches."""
    sizes = (6,) if quick else (16, 32, 64)
    common: Setting = {"adapters": 3 if quick else ADAPTERS, "temperature": 0.0}
    return [common | {"batch": size, "cache": cache} for size in sizes for cache in ("dynamic", "static")]


def agreement(one: Ids, other: Ids) -> Result:
    """The share of rows whose first tokens are the same, and how many are the same in the mean row until two differ."""
    pairs = list(zip(one, other, strict=True))
    same = [next((place for place, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    return {f"rows_with_equal_first_{FIRST}": sum(count >= FIRST for count in same) / len(same), "mean_equal_tokens": sum(same) / len(same)}


def distinct(rows: Ids) -> float:
    """Different ones among the first tokens of the mean row: where it is 1, equal tokens would prove little."""
    return sum(len(set(row[:FIRST])) for row in rows) / len(rows)


def apart(one: Iterable[Sequence[float]], other: Iterable[Sequence[float]]) -> float:
    """Mean absolute difference."""
    gaps = [abs(a - b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)]
    return sum(gaps) / len(gaps)


def scored(bench: Bench, case: Case, run: Result, dtype: str, rows: Sequence[int], adapter: int | None) -> list[list[float]]:
    """Log-probabilities of a run's tokens by a forward pass without a cache."""
    file = bench.work / "tokens.json"
    file.write_text(json.dumps(run["tokens"]), encoding="utf-8")
    setting: Setting = {"tokens": str(file), "dtype": dtype, "rows": list(rows), "adapter": adapter}
    found: list[list[float]] = bench.child("score", case, setting)["logprobs"]
    return found


def truth(bench: Bench, case: Case, runs: Runs, adapter: int | None = None, every: int = 1) -> Result:
    """How far our log-probabilities are from those of fp32 weights for the same tokens; beside them, those of a forward pass in bf16.

    `every`: so many adapters are in turn, of which the rows of the first are looked at.
    """
    rows, checked = range(0, case.rows, every), {}
    for name, found in runs.items():
        if not name.startswith("ours"):
            continue
        right = scored(bench, case, found[0], "fp32", rows, adapter)
        said = [found[0]["logprobs"][row] for row in rows]
        checked[name] = {"apart": apart(said, right), "mean": sum(map(sum, right)) / case.new / len(rows)}
        if "int8" not in name:
            checked[name]["bf16_forward_pass_apart"] = apart(scored(bench, case, found[0], "bf16", rows, adapter), right)
        say(f"  log-probabilities, {name}: " + ", ".join(f"{what} {value:.5f}" for what, value in checked[name].items()))
    return checked


def in_turn(bench: Bench, case: Case, sides: dict[str, tuple[str, Setting]], runs: int) -> tuple[Runs, dict[str, str]]:
    """Each of the sides (what runs, its setting) as many times, one after the other; one that fails is out of the race, with its error."""
    found: Runs = {name: [] for name in sides}
    failed: dict[str, str] = {}
    for _ in range(runs):
        for name, (what, setting) in sides.items():
            if name in failed:
                continue
            try:
                found[name].append(bench.child(what, case, setting))
                say(f"  run {name:<22}{shown(found[name][-1])}")
            except ChildError as error:
                failed[name] = str(error)
                say(f"  run {name:<22}FAILED: {str(error).strip().splitlines()[-1]}")
    return {name: results for name, results in found.items() if name not in failed}, failed


def summed(runs: Runs) -> dict[str, Result]:
    """Medians and ranges."""
    return {
        name: {
            "setting": found[0]["setting"],
            "tokens_per_s": spread([rate(run) for run in found]),
            "memory_gb": spread([run["memory_gb"] for run in found]),
        }
        for name, found in runs.items()
    }


def slim(runs: Iterable[Result]) -> list[Result]:
    """Without tokens and their log-probabilities, which would fill the record."""
    return [{name: value for name, value in run.items() if name not in ("tokens", "logprobs")} for run in runs]


def measure(
    bench: Bench, case: Case, what: str, settings: Sequence[Setting], sides: dict[str, Setting], beside: Setting, only: str, runs: int
) -> tuple[Runs, Result]:
    """Try the peers (`what` runs them), then their best and `sides` of ours in turn, at both temperatures; compare tokens.

    `beside` is added to the best peer's setting for one run of another kind.
    """
    peers = tried(bench, what, case, settings, shown) if only != "ours" else []
    best = best_of(peers, "the peer", rate) if peers else None
    racing: dict[str, tuple[str, Setting]] = {}
    for heat in HEATS:
        kind = ", sampled" if heat else ""
        if only != "peers":
            racing |= {f"ours {name}{kind}": ("ours", {**setting, "temperature": heat}) for name, setting in sides.items()}
        if best is not None:
            racing[f"peer{kind}"] = (what, {**best["setting"], "temperature": heat})
    found, failed = in_turn(bench, case, racing, runs)
    others = [{**best["setting"], **more} for more in ({"keep_memory": True}, beside) if more] if best else []
    alone = tried(bench, what, case, others, shown)
    checks: Result = {}
    if best is not None:
        same = [name for name, one in sides.items() if one.get("adapters") == best["setting"].get("adapters")]
        against = {f"ours {name}": found[f"ours {name}"][0] for name in same if f"ours {name}" in found}
        against |= {f"peer, {named(run['setting'])}": run for run in [*peers, *alone] if "error" not in run and run is not best}
        checks["greedy_against_the_best_peer"] = {name: agreement(run["tokens"], best["tokens"]) for name, run in against.items()}
        checks["distinct_among_the_first"] = distinct(best["tokens"])
        for name in against:
            equal = checks["greedy_against_the_best_peer"][name]
            say(f"  rows whose first {FIRST} tokens are the best peer's, {name}: {next(iter(equal.values())):.2f}")
    return found, {
        "rows": case.rows, "new": case.new, "sides": summed(found), "failed": failed, "checks": checks,
        "trials": slim(peers), "runs": {name: slim(results) for name, results in found.items()}, "beside": slim(alone),
    }  # fmt: skip


def single(bench: Bench, case: Case, words: argparse.Namespace, cuda: bool) -> Result:
    """One model for all rows."""
    sides: dict[str, Setting] = {"bf16": {"int8": False}} | ({} if cuda else {"int8": {"int8": True}})
    found, record = measure(bench, case, "peer", single_peers(words.quick), sides, {}, words.only, words.runs)
    record["log_probabilities"] = truth(bench, case, found)
    record["ratios"] = [
        ratio(record["sides"], f"ours {name}{kind}", f"peer{kind}", WANTED[name]) for kind in ("", ", sampled") for name in sides
    ]
    return record


def adapters(bench: Bench, case: Case, words: argparse.Namespace) -> Result:
    """Every row through one of many adapters."""
    settings = adapter_peers(words.quick)
    many = settings[0]["adapters"]
    sides: dict[str, Setting] = {str(count): {"int8": False, "adapters": count} for count in (many, 1)}
    beside: Setting = {"grouped": True}
    found, record = measure(bench, case, "peft", settings, sides, beside, words.only, words.runs)
    ours = f"ours {many}"
    if ours in found:
        record["log_probabilities"] = truth(bench, case, {ours: found[ours]}, 0, many)
        if "ours 1" in found:  # the rows of the first adapter are the same in both
            others = [row for row in range(case.rows) if row % many]
            different = sum(found[ours][0]["tokens"][row] != found["ours 1"][0]["tokens"][row] for row in others)
            record["checks"]["rows_that_another_adapter_changes"] = different / len(others)
        record["beside"] += slim(tried(bench, "ours", case, [{**sides[str(many)], "int8": True, "temperature": 0.0}], shown))
    pairs = [("ours 1", "16/1"), ("peer", "16/PEFT")]
    record["ratios"] = [
        ratio(record["sides"], ours + kind, name + kind, WANTED[wanted]) for kind in ("", ", sampled") for name, wanted in pairs
    ]
    return record


def ratio(sides: dict[str, Result], one: str, other: str, wanted: float) -> Result:
    """The ratio of two medians; None where one of them is missing."""
    medians = [sides[name]["tokens_per_s"]["median"] if name in sides else None for name in (one, other)]
    memory = [sides[name]["memory_gb"]["median"] if name in sides else None for name in (one, other)]
    return {
        "of": one, "to": other, "wanted": wanted, "speed": medians[0] / medians[1] if None not in medians else None,
        "memory": memory[0] / memory[1] if None not in memory else None,
    }  # fmt: skip


def on_gpu(bench: Bench, words: argparse.Namespace, cuda: bool) -> Result:
    """An 8B shape against the bandwidth of its memory; only where there is a GPU."""
    if not cuda:
        say("  not measured: there is no GPU here")
        return {"skipped": "no GPU"}
    found: dict[str, list[Result]] = {}
    for rows in (4,) if words.quick else (64, 256):
        case = replace(cases(bench.work, words.quick)["single"], name="gpu-8b", rows=rows)
        for recorded in (True, False):
            name = f"{rows} rows, {'recorded' if recorded else 'step by step'}"
            found[name] = slim(bench.child("gpu", case, {"quick": words.quick, "recorded": recorded}) for _ in range(words.runs))
            shares, rates = (spread([run[figure] for run in found[name]]) for figure in ("share", "decode_tokens_per_s"))
            say(f"  {name}: {ranged(rates, whole)} tokens/s, {ranged(shares, two)} of what the memory's bandwidth allows")
    return {"runs": found}


def whole(value: float) -> str:
    """Without decimals."""
    return f"{value:,.0f}"


def two(value: float) -> str:
    """With two decimals."""
    return f"{value:.2f}"


def table(case: Case, record: Result) -> None:
    """The case's figures beside what is wanted."""
    say(f"\n{case.name}: {case.rows} rows, {case.new} new tokens each")
    say(f"{'':<24}{'new tokens/s':>26}{'memory, GB':>22}")
    for name, side in record["sides"].items():
        say(f"{name:<24}{ranged(side['tokens_per_s'], whole):>26}{ranged(side['memory_gb'], two):>22}")
    for one in (one for one in record["ratios"] if one["speed"] is not None):
        say(f"{one['of']} / {one['to']}: {one['speed']:.2f}x, wanted {one['wanted']}x; memory {one['memory']:.2f}x")
    for name, side in record["sides"].items():
        say(f"setting of {name}: {named(side['setting'])}")
    for run in (run for run in record["beside"] if "error" not in run):
        say(f"beside, one run: {shown(run)}")
    for name, error in record["failed"].items():
        say(f"{name} FAILED: {error.strip().splitlines()[-1]}")
    say("")


def arguments() -> argparse.Namespace:
    """The command line; there is nothing to read, hence no --data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--only", choices=("ours", "peers"), default="", help="one side alone")
    parser.add_argument("--runs", type=int, default=3, help="alternating runs of the best settings")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two layers, few rows and tokens, few settings, one run")
    parser.add_argument("--anyway", action="store_true", help="measure although the machine is not idle")
    parser.add_argument("--out", type=Path, help="the record, JSON")
    parser.set_defaults(data=None, failed=False)
    words = parser.parse_args()
    words.runs = 1 if words.quick else words.runs
    return words


def main() -> None:
    """Measure the chosen cases, print the tables, write the record."""
    words = arguments()

    def one(bench: Bench, name: str, built: Result) -> Result:
        if name == "gpu-8b":
            return on_gpu(bench, words, built["cuda"])
        case = cases(bench.work, words.quick)[name]
        record = single(bench, case, words, built["cuda"]) if name == "single" else adapters(bench, case, words)
        table(case, record)
        words.failed |= bool(record["failed"])
        return record

    race(words, Path(__file__).with_name("generate_sides.py"), "random ids", one)
    if words.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
