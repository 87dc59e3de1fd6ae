"""Rows of every kind, and the objectives that learn from them."""

import json
from functools import cache
from pathlib import Path

from tunesmith.core.files import write_json
from tunesmith.training import finish, speed

THROUGHOUT = {
    "reward throughout": {"name": "reward", "token_weight": 0.5},
    "classes throughout": {"name": "reward_classes", "token_weight": 1},
}


def objective(name):
    """An objective of the table, or one that learns from every token of an answer."""
    return THROUGHOUT.get(name, {"name": name})


def prompt(n):
    return f"What is {n} plus {n % 7}?" + " Tell me, please." * (n % 5)


def write(path: Path, kind: str, count: int, start: int = 0) -> Path:
    rows = []
    for n in range(start, start + count):
        good, bad = f"It is {n + n % 7}." + " Really so." * (n % 4), f"No idea about {n}." + " Go away." * (n % 3)
        if kind == "pairs":
            rows.append({"prompt": prompt(n), "chosen": good, "rejected": bad, "margin": n % 3})
        elif kind == "labels":
            rows.append({"prompt": prompt(n), "completion": good if n % 3 else bad, "label": bool(n % 3)})
        elif kind == "dialogs":
            rows.append({"prompt": prompt(n), "completion": good})
        else:
            steps = [f"{n} + {k} = {n + k + (k >= n % 4)}." for k in range(1, 4)]
            rows.append({"prompt": prompt(n), "completions": steps, "labels": [k < n % 4 for k in range(1, 4)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only_steps(patch=setattr):
    """Runs of this process end behind their last checkpoint and measure the machine once: laws of steps need no receipt and no report."""
    patch(finish, "finish", lambda loaded, job, *_: write_json(job.run / "result.json", {}))
    patch(speed, "measure_gemm", cache(speed.measure_gemm))
