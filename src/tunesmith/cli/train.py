"""`tunesmith train`: one recipe, its stages, or a method's short form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.main import app, say

EXAMPLE = """
Train a model as a recipe says; an interrupted run goes on by itself.

[bold]Examples[/]

  tunesmith train recipes/sft-lora.yaml --set optim.lr=1e-4

  tunesmith train --method sft --model pocket --data rows.jsonl --out runs/mine

  tunesmith train --method dpo --model runs/mine --data pairs.jsonl --out runs/preferred

  tunesmith train --method sft --model Qwen/Qwen3-0.6B --data rows.jsonl --out runs/mine --print-recipe
"""


@app.command(help=EXAMPLE)
def train(
    recipe: Annotated[Path | None, typer.Argument(help="recipe file (YAML or JSON)")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="put a value into the recipe; may be repeated")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start anew; an earlier run in the folder is moved aside")] = False,
    method: Annotated[
        str | None,
        typer.Option(help="short form: sft, dpo, ipo, simpo, orpo, cpo, kto, reward, prm (LoRA), NAME-qlora (4 bits), NAME-full"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="short form: hub id, folder, run folder or pocket")] = None,
    data: Annotated[str | None, typer.Option(help="short form: file, folder or hub id of rows")] = None,
    out: Annotated[str | None, typer.Option(help="short form: run folder")] = None,
    template: Annotated[str | None, typer.Option(help="short form: named template, Jinja file, auto or none")] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="print the recipe with the origin of each value, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Parse the words, train, and say where the result is."""
    from tunesmith.cli.short_form import load_words
    from tunesmith.core import log
    from tunesmith.core.load import dump_yaml

    log.set_up()
    loaded = load_words(recipe, sets or [], method=method, model=model, data=data, out=out, template=template)
    if print_recipe:
        from tunesmith.objective import methods
        from tunesmith.training.door import within_context  # torch: what the base takes is a part of what is run

        for stage in loaded:
            methods(stage.recipe.objective)  # settings of objectives are no part of the recipe's own checks
        typer.echo("\n".join(dump_yaml(within_context(stage)) for stage in loaded), nl=False)
        return
    from tunesmith.cli.imports import heavy_imports

    with heavy_imports():
        if any(stage.recipe.model.adapter is not None for stage in loaded):
            import peft  # noqa: F401  brings the rest of transformers, which every run needs
        from tunesmith.training.run import train_stages
        from tunesmith.training.speed import process_start

    result = train_stages(loaded, fresh=fresh, began=process_start())
    if not log.first_rank():
        return
    if as_json:
        say(result)
        return
    for stage in result.get("stages", [result]):
        _tell(stage)


def _tell(result: dict[str, Any]) -> None:
    metrics = result["metrics"]
    words = f"done: {result['steps']} steps in {result['seconds']:.1f} s, loss {metrics['loss']:.4f}"
    if "eval/loss" in metrics:
        start = (result["start"] or {}).get("eval/loss")
        words += f", validation loss {f'{start:.4f} -> ' if start is not None else ''}{metrics['eval/loss']:.4f}"
    typer.echo(words)
    if "mfu" in result.get("speed", {}):  # a run that an earlier version trained has none
        typer.echo(f"speed    {_speed(result['tokens_per_s'], result['speed'])}")
    typer.echo(f"model    {result['final']}")
    typer.echo(f"report   {result['report']}")
    receipt = result["receipt"]
    measure = receipt.get("measure", "log-probabilities")  # an earlier version did not say
    typer.echo(f"receipt  read back from disk: {measure} differ by at most {receipt['max_abs_logprob_diff']:.1e}")


def _speed(mean: float, speed: dict[str, Any]) -> str:
    """Tokens a second, over all steps and of the median one where that differs; the share of the measured GEMM, and what is counted."""
    median = speed["median_tokens_per_s"]
    words = f"{mean:.0f} tokens/s" + (f" (median step {median:.0f})" if abs(median - mean) > 0.02 * mean else "")
    return f"{words}, {speed['mfu']:.2f} of a {speed['gemm_tflops']:.3g} TFLOP/s GEMM ({speed['gemm']}; {speed['formula']})"
