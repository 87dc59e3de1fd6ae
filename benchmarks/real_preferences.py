"""Real preferences through check, train and score: pairs, labels and the HHH pairs, each row held out once in five folds.

Rows that the base's context cannot hold are left out by the house's own rule and counted. The settings are the same for all of them and
were fixed beforehand. Usage:
python benchmarks/real_preferences.py --base FOLDER --pairs dpo_en_demo.json --labels kto_en_demo.json --hhh hhh_alignment_eval.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from race import machine

from tunesmith.cli.main import main as cli
from tunesmith.evals.stats import Interval, paired, share

FOLDS = 5
SIDES = ("chosen", "rejected")
SETTINGS = ("optim.lr=5e-4", "run.epochs=5", "run.batch.examples=8", "run.eval_every=0", "run.save_every=0", "run.samples=0")
Row = dict[str, Any]
# Prometheus keeps the HHH pairs inside the words of its judge's task.
TASK = re.compile(
    r"###The instruction to evaluate:\n(?P<prompt>.*?)\n\n###Response to evaluate:\n(?P<answer>.*?)\n\n###Score Rubrics:\n", re.DOTALL
)


@dataclass(frozen=True)
class Case:
    """A data set: its rows, what of a row is its prompt, and what is trained: by the policy's own reward, and by a score head."""

    name: str
    rows: list[Row]
    prompt: str
    policy: str
    reward: str


def hhh_rows(path: Path) -> list[Row]:
    """{"prompt", "chosen", "rejected"} of every pair. Raises ValueError for a row of another layout."""
    found = []
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        chosen, rejected = (TASK.search(row[f"{side}_instruction"]) for side in SIDES)
        if chosen is None or rejected is None or chosen["prompt"] != rejected["prompt"]:
            raise ValueError(f"{path}, row {number}: no pair of answers to one instruction")
        found.append({"prompt": chosen["prompt"], "chosen": chosen["answer"], "rejected": rejected["answer"]})
    return found


def cases(options: argparse.Namespace) -> list[Case]:
    """What the command line names."""
    found = []
    if options.pairs:
        found.append(Case("dpo_en_demo", json.loads(options.pairs.read_text(encoding="utf-8")), "conversations", "dpo", "reward"))
    if options.labels:
        rows = json.loads(options.labels.read_text(encoding="utf-8"))
        found.append(Case("kto_en_demo", rows, "messages", "kto", "reward_classes"))
    if options.hhh:
        found.append(Case("HHH", hhh_rows(options.hhh), "prompt", "dpo", "reward"))
    return found


def fold_of(row: Row, prompt: str) -> int:
    """Answers to one prompt are held out together."""
    asked = row[prompt][:-1] if prompt == "messages" else row[prompt]
    return int(sha256(json.dumps(asked).encode()).hexdigest()[:8], 16) % FOLDS


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tunesmith(*words: object, status: Sequence[int] = (0,)) -> list[Row]:
    """The JSON lines that a command prints, run in this process to spare its imports. Raises RuntimeError for another exit status."""
    said, log = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(log):
        ended = cli(list(map(str, words)))
    if ended not in status:
        raise RuntimeError(f"tunesmith {' '.join(map(str, words))}: {log.getvalue()[-2000:]}{said.getvalue()[-500:]}")
    return [json.loads(line) for line in said.getvalue().splitlines() if line.startswith("{")]


def recipe(objective: str, base: Path, template: str, train: Path, held: Path | None, out: Path) -> list[object]:
    """The words that say one run; the score head of labels has no short form of its own, so its objective is set."""
    method = {"reward_classes": "kto"}.get(objective, objective)
    words: list[object] = ["--method", f"{method}-full", "--model", base, "--template", template, "--data", train, "--out", out]
    sets = [f"data.validation={held}" if held else "", f"objective.0.name={objective}" if method != objective else "", *SETTINGS]
    return words + [word for one in sets if one for word in ("--set", one)]


def policy_accuracy(run: Path, result: Row) -> tuple[float, int]:
    """The validation accuracy by the objective's own reward, and of how many pairs or answers."""
    scores = json.loads((run / "report.json").read_text(encoding="utf-8"))["scores"]
    [found] = [one for one in scores if (one["task"], one["metric"]) == ("validation", "accuracy")]
    assert abs(found["value"] - result["metrics"]["eval/accuracy"]) < 1e-9
    return found["value"], found["n"]


def right(case: Case, scored: Sequence[Row], held: Sequence[Row]) -> tuple[list[float], list[float]]:
    """For each scored row whether the score head is right (ties one half), and whether the case's plain guess is."""
    ours, guessed = [], []
    for row in scored:
        source = held[int(row["key"].rsplit(":", 1)[1]) - 1]
        if case.reward == "reward":
            chosen, rejected = (len(str(source[side]["value"] if case.name == "dpo_en_demo" else source[side])) for side in SIDES)
            ours.append(half(row["chosen"] - row["rejected"]))
            guessed.append(half(chosen - rejected))
        else:
            ours.append(half(row["score"] * (1 if source["label"] else -1)))
            guessed.append(float(source["label"]))
    return ours, guessed


def half(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def measure(case: Case, base: Path, template: str, work: Path) -> Row:
    """Check all rows, then train on four fifths and look at the fifth that was held out, five times."""
    whole = write(work / f"{case.name}.jsonl", case.rows)
    [checked] = tunesmith("check", *recipe(case.policy, base, template, whole, None, work / "never"), "--json", status=(0, 1))
    [part] = checked["ledger"]["parts"]
    reasons = {reason["code"]: reason["count"] for reason in part["reasons"] if reason["fate"] in ("refused", "dropped")}
    parts: list[list[Row]] = [[] for _ in range(FOLDS)]
    for row in case.rows:
        parts[fold_of(row, case.prompt)].append(row)
    points, count, ours, guessed = 0.0, 0, [], []
    for fold, held in enumerate(parts):
        rest = write(work / "train.jsonl", [row for place, part_ in enumerate(parts) if place != fold for row in part_])
        aside = write(work / "held.jsonl", held)
        run = work / f"{case.name}-{fold}"
        [result] = tunesmith("train", *recipe(case.policy, base, template, rest, aside, run), "--json")
        accuracy, n = policy_accuracy(run, result)
        points, count = points + accuracy * n, count + n
        judge = work / f"{case.name}-{fold}-judge"
        tunesmith("train", *recipe(case.reward, base, template, rest, None, judge), "--json")
        found = right(case, tunesmith("score", judge, aside, "--on-bad", "drop"), held)
        ours, guessed = ours + found[0], guessed + found[1]
        print(f"{case.name}, fold {fold + 1} of {FOLDS}: {n} held out", file=sys.stderr, flush=True)
    guess = "every answer is good" if case.policy == "kto" else "the longer answer"
    return {
        "data": case.name,
        "rows": len(case.rows),
        "problems": [problem["code"] for problem in checked["problems"]],
        "used": part["used"],
        "left out": reasons,
        case.policy: asdict(share([points / count] * count)),
        f"{case.reward}, scored": asdict(share(ours)),
        f"guess: {guess}": asdict(share(guessed)),
        "score head less guess": paired(ours, guessed).as_dict(),
    }


def shown(name: str, found: Row) -> str:
    interval = Interval(found["value"], found["low"], found["high"], found["n"])
    return f"  {name:32} {100 * interval.value:5.1f} % [{100 * interval.low:.1f} to {100 * interval.high:.1f}], n {interval.n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--template", default="simple", help="named template, for a base that has none")
    for name in ("pairs", "labels", "hhh"):
        parser.add_argument(f"--{name}", type=Path, help="JSON file of rows")
    parser.add_argument("--out", type=Path, help="record to write; the cases that it holds already and that are not measured now stay")
    options = parser.parse_args()
    record = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    for case in cases(options):
        with tempfile.TemporaryDirectory() as work:
            found = measure(case, options.base, options.template, Path(work))
        print(f"{case.name}: {found['rows']} rows, of which {found['used']} are used; left out: {found['left out']}")
        print("\n".join(shown(name, value) for name, value in found.items() if isinstance(value, dict) and "low" in value))
        record |= {
            "machine": machine(),
            "base": options.base.name,
            "template": options.template,
            "settings": list(SETTINGS),
            "folds": FOLDS,
        }
        record.setdefault("cases", {})[case.name] = found
    if options.out:
        options.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
