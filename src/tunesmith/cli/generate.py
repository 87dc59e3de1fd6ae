"""`tunesmith generate`: what a model says to prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.main import app, say

EXAMPLE = """
Sample completions: one JSON line per prompt.

[bold]Examples[/]

  tunesmith generate runs/mine --prompt "My card was charged twice." --greedy

  tunesmith generate pocket --raw --prompt "Once upon a time" --max-new-tokens 40 --stop "."

  tunesmith generate runs/mine --prompts prompts.jsonl -n 4 --temperature 0.8 --top-p 0.9

  tunesmith generate pocket --lora a=runs/a --lora b=runs/b --prompts prompts.jsonl   (rows name theirs: "adapter": "a")
"""
LORA = "NAME=FOLDER, again for more: LoRA adapters that rows choose from; the first is the default"


@app.command(help=EXAMPLE)
def generate(
    model: Annotated[str, typer.Argument(help="hub id, folder, run folder or pocket")],
    prompt: Annotated[str | None, typer.Option(help="one prompt")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON lines of {"prompt": ...} or {"messages": [...]}')] = None,
    adapter: Annotated[str | None, typer.Option(help="adapter folder to put on the model, of any kind")] = None,
    lora: Annotated[list[str] | None, typer.Option(help=LORA)] = None,
    template: Annotated[str, typer.Option(help="auto, a named template, or a Jinja file")] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="no chat template: continue the text")] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the likeliest token")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off")] = 1.0,
    frequency_penalty: Annotated[float, typer.Option(min=-2.0, max=2.0)] = 0.0,
    presence_penalty: Annotated[float, typer.Option(min=-2.0, max=2.0)] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="a text that ends an answer, again for more")] = None,
    top_logprobs: Annotated[int, typer.Option(min=0, help="likeliest tokens reported at every place")] = 0,
    n: Annotated[int, typer.Option("-n", min=1, help="completions per prompt")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
    batch: Annotated[int, typer.Option(min=1, help="answers sampled at a time")] = 64,
    int8: Annotated[bool, typer.Option("--int8", help="products in 8 bits: faster on a CPU, coarser")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="transformers' generate in place of the engine, to compare")] = False,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="the output is JSON lines in any case")] = False,
) -> None:
    """Read the prompts, sample, print."""
    from tunesmith.core import log
    from tunesmith.core.errors import RecipeError
    from tunesmith.core.ports import SampleSettings
    from tunesmith.evals.opening import open_model
    from tunesmith.infer.generate import How, read_adapters, read_prompts
    from tunesmith.infer.generate import generate as sample

    del as_json
    log.set_up()
    if (prompt is None) == (prompts is None):
        raise RecipeError("give either --prompt or --prompts", where="tunesmith generate", remedy='e.g. --prompt "Hello"', code="usage")
    if raw and template != "auto":
        raise RecipeError(
            "--raw and --template are given together", where="tunesmith generate", remedy="leave one of them out", code="usage"
        )
    folders = named_folders(lora)
    wanted: list[Any] = [prompt] if prompt is not None else read_prompts(prompts) if prompts is not None else []
    settings = SampleSettings(
        max_new_tokens, 0.0 if greedy else temperature, top_p, top_k, n, seed, min_p, repetition_penalty, frequency_penalty,
        presence_penalty, stop=tuple(stop or ()), top_logprobs=top_logprobs, adapter=next(iter(folders), None),
    )  # fmt: skip
    named = [settings.adapter] if prompts is None else read_adapters(prompts, settings.adapter)
    opened = open_model(model, adapter=adapter, template="none" if raw else template, dtype=dtype, device=device)
    rows = sample(
        opened.policy, opened.tokenizer, opened.template, wanted, settings, raw=raw, adapters=named,
        how=How(max_rows=batch, int8=int8, folders=folders, plain=plain),
    )  # fmt: skip
    for row in rows:
        say(row)


def named_folders(given: list[str] | None) -> dict[str, str]:
    """NAME=FOLDER by name. Raises RecipeError `usage` for anything else."""
    from tunesmith.core.errors import RecipeError

    out = {}
    for text in given or ():
        name, sign, folder = text.partition("=")
        if not (name and sign and folder) or name in out:
            raise RecipeError(
                f"'{text}' is not NAME=FOLDER with a name of its own", where="--lora", remedy="e.g. --lora a=runs/a", code="usage"
            )
        out[name] = folder
    return out
