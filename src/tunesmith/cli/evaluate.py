"""`tunesmith eval`: scores with intervals on one's own held-out rows, the base beside the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.main import app, say

EXAMPLE = """
Score a model on held-out rows, its base beside it, with intervals.

Tasks: perplexity, exact_match, contains, regex, numeric, json_valid, json_fields, choice, choice_answer;
each with n, seed and a 95 % interval.
The base of a run is scored beside it on the same rows.

[bold]Examples[/]

  tunesmith eval runs/mine --tasks perplexity,exact_match --data held-out.jsonl

  tunesmith eval Qwen/Qwen3-0.6B --tasks json_valid --data held-out.jsonl --limit 200 --json
"""


@app.command("eval", help=EXAMPLE)
def evaluate(
    model: Annotated[str, typer.Argument(help="hub id, folder, run folder or pocket")],
    data: Annotated[Path, typer.Option(help="held-out rows in any format; the last assistant turn is the truth")],
    tasks: Annotated[str, typer.Option(help="comma-separated names, see above")] = "perplexity",
    base: Annotated[str | None, typer.Option(help="model to score beside it; default: the base that the run records; none: alone")] = None,
    template: Annotated[str, typer.Option(help="auto, a named template, a Jinja file, or none")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="use at most this many rows")] = None,
    seed: Annotated[int, typer.Option(help="seed of the intervals")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Evaluate and print the table."""
    from tunesmith.core import log
    from tunesmith.evals.run import evaluate as run_evaluation
    from tunesmith.evals.terminal import print_scores

    log.set_up()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    report = run_evaluation(
        model, names, data, base=base, template=template, limit=limit, seed=seed, max_new_tokens=max_new_tokens, device=device
    )
    if as_json:
        say(report.as_dict())
    else:
        print_scores(report)
