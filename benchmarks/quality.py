"""The demo's task under every adapter, quantised base and optimizer: accuracy, forgetting, trained share, memory, time; three seeds.

Every run is a process of its own. The learning rate of each method was chosen beforehand and is in the table; nothing else differs.
Usage: python benchmarks/quality.py [--seeds 0 1 2] [--only lora full] [--out records/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from race import machine, say

LORA = {"name": "lora", "rank": 16}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"model": {"adapter": LORA}, "optim": {"lr": 2e-3}},
    "lora, products in 8 bits": {"model": {"adapter": LORA, "dtype": "bf16", "fast": {"int8": True}}, "optim": {"lr": 2e-3}},
    "lora nf4": {"model": {"adapter": LORA, "quant": "nf4"}, "optim": {"lr": 2e-3}},
    "lora nf4, loftq": {"model": {"adapter": {**LORA, "init": "loftq"}, "quant": "nf4"}, "optim": {"lr": 2e-3}},
    "lora int8": {"model": {"adapter": LORA, "quant": "int8"}, "optim": {"lr": 2e-3}},
    "lora, rank-stabilised": {"model": {"adapter": {**LORA, "rank_stabilised": True}}, "optim": {"lr": 1e-3}},
    "lora+": {"model": {"adapter": {**LORA, "lr_ratio": 8.0}}, "optim": {"lr": 1e-3}},
    "lora, frozen A": {"model": {"adapter": {**LORA, "freeze_a": True}}, "optim": {"lr": 4e-3}},
    "pissa": {"model": {"adapter": {**LORA, "init": "pissa"}}, "optim": {"lr": 1e-3}},
    "olora": {"model": {"adapter": {**LORA, "init": "olora"}}, "optim": {"lr": 1e-3}},
    "dora": {"model": {"adapter": {"name": "dora", "rank": 16}}, "optim": {"lr": 2e-3}},
    "vera": {"model": {"adapter": {"name": "vera"}}, "optim": {"lr": 2e-2}},
    "ia3": {"model": {"adapter": {"name": "ia3"}}, "optim": {"lr": 2e-2}},
    "prefix": {"model": {"adapter": {"name": "prefix"}}, "optim": {"lr": 0.5}},
    "prefix, projected": {"model": {"adapter": {"name": "prefix", "projection": True}}, "optim": {"lr": 1e-2}},
    "prompt": {"model": {"adapter": {"name": "prompt"}}, "optim": {"lr": 5e-2}},
    "p_tuning": {"model": {"adapter": {"name": "p_tuning"}}, "optim": {"lr": 1e-2}},
    "bottleneck": {"model": {"adapter": {"name": "bottleneck"}}, "optim": {"lr": 2e-3}},
    "bottleneck, houlsby": {"model": {"adapter": {"name": "bottleneck", "position": "houlsby"}}, "optim": {"lr": 2e-3}},
    "full, adamw": {"model": {"adapter": None}, "optim": {"lr": 1e-3}},
    "full, lisa": {"model": {"adapter": None, "lisa": {"layers": 2, "every": 10}}, "optim": {"lr": 1e-3}},
    **{
        f"full, {name}": {"model": {"adapter": None}, "optim": {"name": name, "lr": lr}}
        for name, lr in {"adafactor": 1e-3, "lion": 2e-4, "muon": 1e-3, "apollo": 1e-3, "schedule_free": 2e-3}.items()
    },
    "full, galore": {"model": {"adapter": None}, "optim": {"name": "galore", "lr": 1e-3, "scale": 2.0, "refresh": 50}},
}


def run(method: str, seed: int) -> dict[str, Any]:
    """Train and measure; the result's last row is what a child prints."""
    from tunesmith import pocket
    from tunesmith.core.files import read_json
    from tunesmith.demo import quickstart
    from tunesmith.evals.opening import open_model
    from tunesmith.evals.run import evaluate_policy
    from tunesmith.training.loop import memory_gb
    from tunesmith.training.run import train

    with tempfile.TemporaryDirectory() as folder:
        tree = quickstart.write_data(Path(folder) / "data", seed)
        tree["model"] = {**tree["model"], **METHODS[method]["model"]}
        tree["optim"] = METHODS[method]["optim"]
        tree["run"] = {**quickstart.RUN, "eval_every": 0, "seed": seed, "out": f"{folder}/run"}
        began = time.perf_counter()
        result = train(tree)
        seconds, memory = time.perf_counter() - began, memory_gb()
        opened = open_model(result["run"])
        test = Path(folder) / "data" / "test.jsonl"
        tasks = evaluate_policy(opened, [quickstart.WELL_FORMED, quickstart.ACCURACY], test, seed=seed, max_new_tokens=32, samples=0)
        general = evaluate_policy(opened, [{"name": "perplexity", "label": "general_perplexity"}], pocket.general_text(), seed=seed)
        receipt = read_json(Path(result["run"]) / "receipt.json")
    return {
        "valid_json": tasks.get("valid_json").score.value,
        "accuracy": tasks.get("accuracy").score.value,
        "general_perplexity": general.get("general_perplexity").score.value,
        "trained_share": receipt["optimizer"]["trained_share"],
        "state_mb": receipt["optimizer"]["state_bytes"] / 1e6,
        "memory_gb": memory,
        "seconds": seconds,
    }


def main() -> None:
    """Run every method with every seed in processes of their own, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        print(json.dumps(run(words.child, words.seeds[0])))
        return
    found: dict[str, Any] = {}
    for seed in words.seeds:
        for method in words.only:
            done = subprocess.run(
                [sys.executable, __file__, "--child", method, "--seeds", str(seed)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                say(f"{method:<24}seed {seed} FAILED: {done.stderr.strip().splitlines()[-1][:200]}")
                continue
            one = json.loads(done.stdout.strip().splitlines()[-1])
            found.setdefault(method, []).append({"seed": seed, **one})
            say(f"{method:<24}seed {seed}  " + "  ".join(f"{name} {value:.4g}" for name, value in one.items()))
            if words.out:
                record = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "threads": os.environ.get("OMP_NUM_THREADS")}
                rates = {name: {**settings["optim"]} for name, settings in METHODS.items()}
                words.out.write_text(json.dumps({**record, "n": 200, "optim": rates, "runs": found}, indent=2) + "\n", encoding="utf-8")
    say(f"{'':<24}{'valid JSON':>14}{'accuracy':>20}{'perplexity':>12}{'trained':>9}{'state MB':>10}{'GB':>7}{'s':>6}")
    for method, runs in found.items():
        accuracies = [100 * one["accuracy"] for one in runs]
        means = {name: mean(one[name] for one in runs) for name in runs[0]}
        say(
            f"{method:<24}{100 * means['valid_json']:>12.1f} %{mean(accuracies):>8.1f} ({min(accuracies):.1f}-{max(accuracies):.1f})"
            f"{means['general_perplexity']:>12.2f}{100 * means['trained_share']:>7.2f} %{means['state_mb']:>10.2f}"
            f"{means['memory_gb']:>7.2f}{means['seconds']:>6.0f}"
        )


if __name__ == "__main__":
    main()
