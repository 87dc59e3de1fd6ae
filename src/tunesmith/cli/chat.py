"""`tunesmith chat`: a talk with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from tunesmith.cli import sampling
from tunesmith.cli.main import app

CHAT = """
Talk with a model in the terminal. Ctrl-C stops an answer or clears the line; /quit or Ctrl-D ends the talk.

/adapter NAME goes on with another adapter (/adapter alone: with the base), /undo takes the last turn back, /reset forgets the talk.

/help lists the commands; Up and Left reach earlier lines and words.

[bold]Examples[/]

  tunesmith chat runs/mine

  tunesmith chat pocket --lora short=runs/short --lora long=runs/long
"""
COMMANDS = """/adapter [NAME]  another adapter, or the base
/undo            take the last turn back
/reset           forget the talk
/quit            end, as does Ctrl-D
Ctrl-C           stop an answer, clear the line"""
HOW_TO_LEAVE = "/quit or Ctrl-D ends the talk"
# What to do in a talk is not what to do with a single prompt.
REMEDIES = {
    "unknown_adapter": "adapters are named where the talk begins, --lora NAME=FOLDER; /adapter alone goes on with the base",
    "prompt_too_long": "the talk fills the context: /undo takes the last turn back, /reset forgets all of it",
}


@app.command(help=CHAT)
def chat(
    model: Annotated[str, typer.Argument(help="hub id, folder, run folder or pocket")],
    adapter: Annotated[str | None, typer.Option(help="adapter folder to put on the model, of any kind")] = None,
    lora: sampling.Lora = None,
    template: Annotated[str, typer.Option(help="auto, a named template, or a Jinja file")] = "auto",
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_new_tokens: sampling.MaxNewTokens = 256,
    temperature: sampling.Temperature = 0.7,
    top_p: sampling.TopP = 1.0,
    top_k: sampling.TopK = 0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    frequency_penalty: sampling.FrequencyPenalty = 0.0,
    presence_penalty: sampling.PresencePenalty = 0.0,
    stop: sampling.Stop = None,
    seed: sampling.Seed = 0,
    int8: sampling.Int8 = False,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Read a line, answer as it comes, and keep the conversation."""
    from tunesmith.core import log
    from tunesmith.core.ports import SampleSettings
    from tunesmith.evals.opening import open_model
    from tunesmith.infer.draw import check_settings
    from tunesmith.infer.talk import Talk

    log.set_up()
    folders = sampling.named_folders(lora)
    settings = SampleSettings(
        max_new_tokens, temperature, top_p, top_k, 1, seed, min_p, repetition_penalty, frequency_penalty, presence_penalty,
        stop=tuple(stop or ()), adapter=next(iter(folders), None),
    )  # fmt: skip
    check_settings(settings)  # here rather than after the first line
    opened = open_model(model, adapter=adapter, template=template, dtype=dtype, device=device)
    talk = Talk(opened.policy, opened.tokenizer, opened.template, settings, system=system, folders=folders, int8=int8)
    _converse(talk)


def _converse(talk: Any) -> None:
    """Turn after turn until the end of input or /quit. Ctrl-C never ends a talk at a terminal, where a press may come a moment late."""
    at_terminal = sys.stdin.isatty()
    if at_terminal and sys.stdout.isatty():
        # Merely importing it gives `input` its line editing and its history; not every Python has it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            said = input(f"you ({talk.settings.adapter})> " if talk.settings.adapter else "you> ").strip()
            if said == "/quit":
                return
            if said:
                _turn(talk, said)
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise  # nobody sits there who could say /quit
            typer.echo(typer.style(f"\n{HOW_TO_LEAVE}", dim=True))


def _turn(talk: Any, said: str) -> None:
    from tunesmith.core.errors import TunesmithError

    try:
        if said.startswith("/"):
            typer.echo(typer.style(_command(talk, said), dim=True))
        else:
            _answer(talk, said)
    except TunesmithError as error:
        remedy = REMEDIES.get(error.code, error.remedy)
        if error.code == "unknown_adapter":
            remedy += "; " + error.remedy.rpartition("; ")[2]  # which are loaded
        if error.code == "prompt_too_long" and not talk.begun:
            remedy = "say it in fewer words, or shorten --system: there is no turn to take back"
        told = TunesmithError(error.message, where=error.where, remedy=remedy)
        typer.echo(typer.style(str(told), fg="red"), err=True)


def _answer(talk: Any, said: str) -> None:
    typer.echo(typer.style("model> ", fg="green"), nl=False)
    pieces = talk.say(said)
    try:
        for text in pieces:
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        pieces.close()
        typer.echo(typer.style(" [stopped]", dim=True), nl=False)
    finally:
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
    return COMMANDS if word == "/help" else f"there is no command {word}\n{COMMANDS}"
