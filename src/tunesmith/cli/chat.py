"""`tunesmith chat`: a talk with a model in the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tunesmith.cli.generate import LORA, named_folders
from tunesmith.cli.main import app

CHAT = """
Talk with a model in the terminal; an empty line or Ctrl-D ends it, Ctrl-C stops an answer.

/adapter NAME goes on with another adapter (/adapter alone: with the base), /reset forgets the talk, /help lists the commands.

[bold]Examples[/]

  tunesmith chat runs/mine

  tunesmith chat pocket --lora short=runs/short --lora long=runs/long
"""
COMMANDS = "/adapter [NAME]  another adapter, or the base    /reset  forget the talk    /undo  take the last turn back    empty line  end"


@app.command(help=CHAT)
def chat(
    model: Annotated[str, typer.Argument(help="hub id, folder, run folder or pocket")],
    adapter: Annotated[str | None, typer.Option(help="adapter folder to put on the model, of any kind")] = None,
    lora: Annotated[list[str] | None, typer.Option(help=LORA)] = None,
    template: Annotated[str, typer.Option(help="auto, a named template, or a Jinja file")] = "auto",
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    int8: Annotated[bool, typer.Option("--int8", help="products in 8 bits: faster on a CPU, coarser")] = False,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Read a line, answer as it comes, and keep the conversation."""
    from tunesmith.core import log
    from tunesmith.core.errors import TunesmithError
    from tunesmith.core.ports import SampleSettings
    from tunesmith.evals.opening import open_model
    from tunesmith.infer.talk import Talk

    log.set_up()
    folders = named_folders(lora)
    opened = open_model(model, adapter=adapter, template=template, dtype=dtype, device=device)
    settings = SampleSettings(max_new_tokens, temperature, top_p, seed=seed, adapter=next(iter(folders), None))
    talk = Talk(opened.policy, opened.tokenizer, opened.template, settings, system=system, folders=folders, int8=int8)
    while (said := _ask(talk.settings.adapter)) is not None:
        try:
            if said.startswith("/"):
                typer.echo(typer.style(_command(talk, said), dim=True))
            else:
                _answer(talk, said)
        except TunesmithError as error:
            typer.echo(typer.style(str(error), fg="red"), err=True)


def _ask(adapter: str | None) -> str | None:
    """The next line; None at the end."""
    try:
        said = input(f"you ({adapter})> " if adapter else "you> ").strip()
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None
    return said or None


def _answer(talk: Any, said: str) -> None:
    typer.echo(typer.style("model> ", fg="green"), nl=False)
    pieces = talk.say(said)
    try:
        for text in pieces:
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        pieces.close()
        typer.echo(typer.style(" [stopped]", dim=True), nl=False)
    typer.echo()


def _command(talk: Any, line: str) -> str:
    word, _, rest = line.partition(" ")
    if word == "/adapter":
        talk.use(rest.strip() or None)
        return f"going on with {'the adapter ' + rest.strip() if rest.strip() else 'the base'}"
    if word == "/reset":
        talk.reset()
        return "the talk is forgotten"
    if word == "/undo":
        return "the last turn is taken back" if talk.undo() else "there is nothing to take back"
    return COMMANDS
