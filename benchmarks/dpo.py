"""Learning from pairs, ours and TRL's DPOTrainer and RewardTrainer in turn: the same pairs, ids, LoRA and model; pairs a second, memory.

Every measurement runs in a process of its own (dpo_sides.py). Each setting of both sides is tried once, then the best of each runs
alternately and medians are compared. README.md beside this file says what each figure means.
Usage: python benchmarks/dpo.py [--data FILE] [--cases dpo-135m dpo-long-prompt reward-135m] [--out records/NAME.json]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_sides import Case
from race import FAR, MEMORY, Bench, ChildError, add_8_bits, arguments, best_of, ceilings, grid, named, race, ranged, say, spread, tried
from sides import Result, Setting

NAMES = ("dpo-135m", "dpo-long-prompt", "reward-135m")
PRECISIONS = ("fp32 under bf16 autocast", "bf16 under bf16 autocast", "bf16")


def cases(work: Path, quick: bool, short: bool = False) -> dict[str, Case]:
    """The three cases of the table; `short` leaves the settings that came near the best in records/, `quick` one a side."""
    micro: list[Setting] = [{"micro_tokens": size} for size in (512, 1_024, 2_048, 4_096)]
    apart: list[Setting] = [{"micro_tokens": 1_024, "fast": {"front": False}}]
    dpo = Case(
        "dpo-135m", str(work / "model"), str(work / "pairs.jsonl"), "dpo", 1e-5, 2 if quick else 4, micro, grid((1, 2, 4), PRECISIONS),
        apart, 4.0,
    )  # fmt: skip
    long = replace(dpo, name="dpo-long-prompt", data=str(work / "long-prompts.jsonl"), wanted=6.0)
    reward = replace(dpo, name="reward-135m", model=str(work / "scorer"), objective="reward", lr=1e-4, wanted=2.0)
    found = {case.name: case for case in (dpo, long, reward)}
    if short:
        found = {name: replace(case, ours=micro[2:], trl=grid((1,), PRECISIONS[1:]), beside=[]) for name, case in found.items()}
    return {name: replace(case, ours=case.ours[1:2], trl=case.trl[:1], beside=[]) if quick else case for name, case in found.items()}


def tokens(pairs: Sequence[Sequence[int]]) -> int:
    """Tokens of pairs, each row whole: a prompt counts in both, whoever computes it once."""
    return sum(chosen + rejected for _, chosen, rejected in pairs)


def seconds_of_a_pair(run: Result, skip: int = 1) -> float:
    """Seconds of steps for a pair of mean length; `skip` leaves the first step out, which carries what warms up.

    Steps differ in length, and TRL's are sorted, so that time goes by tokens and only the mean of all pairs turns it into pairs.
    """
    every = [pair for step in run["pairs"] for pair in step]
    rest = sum(tokens(step) for step in run["pairs"][skip:])
    return float(sum(run["seconds"][skip:]) / rest * tokens(every) / len(every))


def rate(run: Result) -> float:
    """Pairs a second of one epoch, the reference worked out in it."""
    return 1 / float(seconds_of_a_pair(run) + run["reference_seconds"] / sum(map(len, run["pairs"])))


def step_rate(run: Result) -> float:
    """Pairs a second of steps alone; where the reference is worked out in them it is in here too."""
    return 1 / seconds_of_a_pair(run)


def token_rate(run: Result) -> float:
    """Tokens a second of steps alone."""
    return sum(map(tokens, run["pairs"][1:])) / float(sum(run["seconds"][1:]))


def operations(work: Result, objective: str, run: Result) -> float:
    """What forward and backward pass over the pairs of the steps after the first need: a prompt once, no padding, no reference."""
    before = 1 if objective == "dpo" else 0  # the last token is a target and no input; a reward model reads its state
    found = 0.0
    for step, targets in zip(run["pairs"][1:], run["trained"][1:], strict=True):
        for front, *rows in step:
            inputs = [row - before for row in rows]
            looked = sum(row * (row + 1) // 2 for row in inputs) - front * (front + 1) // 2
            found += (sum(inputs) - front) * (4 * work["frozen"] + 6 * work["trained"]) + 12 * work["attention"] * looked
        if objective == "dpo":
            found += 4 * work["head"] * targets
    return found


def shown(run: Result) -> str:
    """One line for a measurement."""
    return f"{named(run['setting']):<52}{rate(run):8.3f} pairs/s{step_rate(run):8.3f} without reference {run['memory_gb']:7.2f} GB"


def try_all(bench: Bench, case: Case) -> dict[str, list[Result]]:
    """Every setting of both sides once; then TRL's fastest of each precision with its reference worked out beforehand, as ours is."""
    found = {side: tried(bench, side, case, settings, shown) for side, settings in (("ours", case.ours), ("trl", case.trl))}
    if case.objective == "dpo":
        precisions = dict.fromkeys(setting["precision"] for setting in case.trl)
        groups = ([run for run in found["trl"] if run["setting"]["precision"] == precision] for precision in precisions)
        best = [best_of(group, "trl", rate)["setting"] for group in groups if any("error" not in run for run in group)]
        found["trl"] += tried(bench, "trl", case, [setting | {"precompute": True} for setting in best], shown)
    return found


def contenders(trials: dict[str, list[Result]]) -> dict[str, Setting]:
    """The fastest setting of each side, and where they are other ones: TRL's fastest without the reference, and ours in little memory."""
    fastest = {side: best_of(found, side, rate) for side, found in trials.items()}
    chosen = {side: dict(run["setting"]) for side, run in fastest.items()}
    ready = [run for run in trials["trl"] if run["setting"].get("precompute") and "error" not in run]
    if ready and (other := dict(max(ready, key=step_rate)["setting"])) != chosen["trl"]:
        chosen["trl-ready"] = other
    small = [run for run in trials["ours"] if "error" not in run and run["memory_gb"] <= MEMORY[0] * fastest["trl"]["memory_gb"]]
    if small and (lean := dict(max(small, key=rate)["setting"])) != chosen["ours"]:
        chosen["lean"] = lean
    return chosen


def side_of(name: str) -> str:
    """What runs for a contender."""
    return "trl" if name.startswith("trl") else "ours"


def demand_same(case: Case, one: Result, other: Result) -> None:
    """The same pairs and as many trained tokens on both sides, or ChildError."""
    left, right = (sorted(map(tuple, (pair for step in run["pairs"] for pair in step))) for run in (one, other))
    if left != right or sum(one["trained"]) != sum(other["trained"]):
        raise ChildError(f"{case.name}: the pairs differ: ours {left}, {sum(one['trained'])}, TRL {right}, {sum(other['trained'])}")


def compare_first_step(bench: Bench, case: Case, best: dict[str, Setting]) -> Result:
    """Both sides on the pairs of one step, which have one order only. Raises ChildError when pairs, losses or log-probabilities differ.

    The loss of DPO begins at log 2 whatever the model says; its log-probabilities, a trained token, are what tells models apart.
    """
    runs = {side: bench.child(side, case, best[side] | {"limit": case.pairs}) for side in ("ours", "trl")}
    demand_same(case, runs["ours"], runs["trl"])
    values = {side: {"loss": run["losses"][0], **(run["logp"] or {})} for side, run in runs.items()}
    far = {name: abs(value - values["trl"][name]) for name, value in values["ours"].items()}
    say("  first step: " + "; ".join(f"{side} " + ", ".join(f"{n} {v:.5f}" for n, v in found.items()) for side, found in values.items()))
    if max(far.values()) > FAR["bf16"]:
        raise ChildError(f"the first step differs by {far}: {values}")
    return {**values, "grad_norm": {side: run["grad_norms"][0] for side, run in runs.items()}, "difference": far}


def measure(bench: Bench, case: Case, work: Result, runs: int) -> Result:
    """Try, choose, run in turn, compare."""
    trials = try_all(bench, case)
    best = contenders(trials)
    add_8_bits(bench, case, trials, best, shown, rate)
    first = compare_first_step(bench, case, best)
    found: dict[str, list[Result]] = {name: [] for name in best}
    for _ in range(runs):
        for name, results in found.items():
            results.append(bench.child(side_of(name), case, best[name]))
            say(f"  run {name:<10}{shown(results[-1])}")
        demand_same(case, found["ours"][-1], found["trl"][-1])
    gemm = ceilings(run for results in (*trials.values(), *found.values()) for run in results if "error" not in run)
    sides = {}
    for name, results in found.items():
        shares = (operations(work, case.objective, run) / sum(run["seconds"][1:]) / gemm[run["gemm"]["name"]] for run in results)
        sides[name] = {
            "setting": best[name],
            "pairs_per_s": spread([rate(run) for run in results]),
            "pairs_per_s_of_steps": spread([step_rate(run) for run in results]),
            "pairs_per_s_of_steps_with_first": spread([1 / seconds_of_a_pair(run, 0) for run in results]),
            "tokens_per_s_of_steps": spread([token_rate(run) for run in results]),
            "reference_seconds": spread([run["reference_seconds"] for run in results]),
            "memory_gb": spread([run["memory_gb"] for run in results]),
            "share": spread(list(shares)),
        }
    beside = tried(bench, "ours", case, case.beside, shown) + tried(bench, "trl", case, [best["trl"] | {"keep_memory": True}], shown)
    pairs = [pair for step in found["ours"][0]["pairs"] for pair in step]
    return {
        "pairs": len(pairs), "pairs_of_a_step": case.pairs, "tokens": tokens(pairs), "front_tokens": sum(front for front, _, _ in pairs),
        "trained": sum(found["ours"][0]["trained"]), "formula": f"{work['formula']}; what a pair begins with counts once",
        "gemm_tflops": {name: flops / 1e12 for name, flops in gemm.items()}, "sides": sides, "first_step": first, "trials": trials,
        "runs": found, "beside": beside,
    }  # fmt: skip


def table(case: Case, found: Result) -> None:
    """The case's figures beside what is wanted."""
    sides = found["sides"]
    ours, trl, ready = sides["ours"], sides["trl"], sides.get("trl-ready", sides["trl"])
    size = f"{found['tokens']:,} tokens ({found['front_tokens']:,} in prompts, counted twice), {found['trained']:,} trained"
    say(f"\n{case.name}: {found['pairs']} pairs, {case.pairs} a step, {size}")
    say(f"{'':<34}{'ours':>24}{'TRL at its best':>24}{'ratio':>8}{'wanted':>8}")
    pairs: Callable[[float], str] = lambda value: f"{value:.3f}"  # noqa: E731
    whole: Callable[[float], str] = lambda value: f"{value:,.0f}"  # noqa: E731
    dpo = case.objective == "dpo"
    lines = [
        ("pairs/s, reference included" if dpo else "pairs/s", "pairs_per_s", pairs, trl, f"{case.wanted:.0f}x"),
        ("memory, GB", "memory_gb", lambda value: f"{value:.2f}", trl, f"{MEMORY[0]}x"),
        ("pairs/s, reference at hand", "pairs_per_s_of_steps", pairs, ready, f"{case.wanted:.0f}x"),
        ("tokens/s of steps", "tokens_per_s_of_steps", whole, ready, ""),
        ("share of the measured GEMM", "share", lambda value: f"{100 * value:.1f} %", ready, ""),
    ]
    for name, key, digits, peer, wanted in lines if dpo else [line for line in lines if line[1] != "pairs_per_s_of_steps"]:
        ratio = ours[key]["median"] / peer[key]["median"]
        say(f"{name:<34}{ranged(ours[key], digits):>24}{ranged(peer[key], digits):>24}{ratio:>7.2f}x{wanted:>8}")
    for name, words in (("lean", f"ours within {MEMORY[0]:.1f} of TRL's memory"), ("int8", "ours with the frozen base in 8 bits")):
        if side := sides.get(name):
            peers = {"pairs_per_s": trl, "pairs_per_s_of_steps": ready, "memory_gb": trl}
            ratios = [side[key]["median"] / peer[key]["median"] for key, peer in peers.items()]
            speed = f"{ranged(side['pairs_per_s'], pairs)} pairs/s, {ratios[0]:.2f}x"
            more = f", reference at hand {ranged(side['pairs_per_s_of_steps'], pairs)}, {ratios[1]:.2f}x" if dpo else ""
            say(f"{words}: {speed}{more}, memory {ratios[2]:.2f}x")
    say("settings: " + "; ".join(f"{name} {named(side['setting'])}" for name, side in sides.items()))
    for run in (run for run in found["beside"] if "error" not in run):
        ratios = [ours["pairs_per_s"]["median"] / rate(run), ours["memory_gb"]["median"] / run["memory_gb"]]
        say(f"beside, one run: {shown(run)}; ours {ratios[0]:.2f}x the speed, {ratios[1]:.2f}x the memory")
    say("")


def main() -> None:
    """Measure the chosen cases, print the tables, write the record."""
    words = arguments(
        __doc__, "pairs in any of our formats; without: pairs of the bundled grammar", NAMES,
        ("--short", "only settings that came near the best of their side in the records"),
    )  # fmt: skip

    def one(bench: Bench, name: str, built: Result) -> Result:
        case = cases(bench.work, words.quick, words.short)[name]
        found = measure(bench, case, built["work"], 1 if words.quick else words.runs)
        table(case, found)
        return found

    race(words, Path(__file__).with_name("dpo_sides.py"), "tickets of the bundled grammar", one)


if __name__ == "__main__":
    main()
