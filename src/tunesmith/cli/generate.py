"""`tunesmith generate` and `tunesmith chat`: what a model says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.main import app, say

EXAMPLE = """
Sample completions: one JSON line per prompt.

[bold]Examples[/]

  tunesmith generate runs/mine --prompt "My card was charged twice." --greedy

  tunesmith generate pocket --raw --prompt "Once upon a time" --max-new-tokens 40

  tunesmith generate runs/mine --prompts prompts.jsonl -n 4 --temperature 0.8
"""

CHAT = """
Talk with a model in the terminal; an empty line or Ctrl-D ends it.

[bold]Example[/]

  tunesmith chat runs/mine
"""


@app.command(help=EXAMPLE)
def generate(
    model: Annotated[str, typer.Argument(help="hub id, folder, run folder or pocket")],
    prompt: Annotated[str | None, typer.Option(help="one prompt")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON lines of {"prompt": ...} or {"messages": [...]}')] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter folder to put on the model")] = None,
    template: Annotated[str, typer.Option(help="auto, a named template, or a Jinja file")] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="no chat template: continue the text")] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the likeliest token")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    n: Annotated[int, typer.Option("-n", min=1, help="completions per prompt")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="the output is JSON lines in any case")] = False,
) -> None:
    """Read the prompts, sample, print."""
    from tunesmith.core import log
    from tunesmith.core.errors import RecipeError
    from tunesmith.core.ports import SampleSettings
    from tunesmith.evals.opening import open_model
    from tunesmith.infer.generate import generate as sample
    from tunesmith.infer.generate import read_prompts

    del as_json
    log.set_up()
    if (prompt is None) == (prompts is None):
        raise RecipeError("give either --prompt or --prompts", where="tunesmith generate", remedy='e.g. --prompt "Hello"', code="usage")
    wanted: list[Any] = [prompt] if prompt is not None else read_prompts(prompts) if prompts is not None else []
    settings = SampleSettings(max_new_tokens, 0.0 if greedy else temperature, top_p, top_k, n, seed)
    opened = open_model(model, adapter=adapter, template="none" if raw else template, device=device)
    for row in sample(opened.policy, opened.tokenizer, opened.template, wanted, settings, raw=raw):
        say(row)


@app.command(help=CHAT)
def chat(
    model: Annotated[str, typer.Argument(help="hub id, folder, run folder or pocket")],
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter folder to put on the model")] = None,
    template: Annotated[str, typer.Option(help="auto, a named template, or a Jinja file")] = "auto",
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy")] = 0.7,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Read a line, answer, and keep the conversation."""
    from tunesmith.core import log
    from tunesmith.core.ports import SampleSettings
    from tunesmith.core.types import Message
    from tunesmith.evals.opening import open_model
    from tunesmith.infer.generate import generate as sample

    log.set_up()
    opened = open_model(model, adapter=adapter, template=template, device=device)
    messages = [Message("system", system)] if system else []
    while True:
        try:
            said = input("you> ")
        except EOFError:
            return
        if not said.strip():
            return
        messages.append(Message("user", said))
        settings = SampleSettings(max_new_tokens, temperature, seed=seed + len(messages))
        [row] = sample(opened.policy, opened.tokenizer, opened.template, [messages], settings)
        answer = row["completions"][0]["text"]
        messages.append(Message("assistant", answer))
        typer.echo(f"{typer.style('model>', fg='green')} {answer}")
