"""`tunesmith generate`: what a model says to prompts."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import sampling
from tunesmith.cli.main import app, say

if TYPE_CHECKING:
    from tunesmith.core.ports import SampleSettings
    from tunesmith.evals.opening import Opened
    from tunesmith.infer.generate import How, Line

EXAMPLE = """
Sample completions: one JSON line per prompt, as soon as it and those before it are done.

At a terminal the answer to a single --prompt is shown as text while it comes.

[bold]Examples[/]

  tunesmith generate runs/mine --prompt "My card was charged twice." --greedy

  tunesmith generate pocket --raw --prompt "Once upon a time" --max-new-tokens 40 --stop "."

  tunesmith generate runs/mine --prompts prompts.jsonl -n 4 --temperature 0.8 --top-p 0.9

  tunesmith generate pocket --lora a=runs/a --lora b=runs/b --prompts prompts.jsonl   (rows name theirs: "adapter": "a")
"""


@app.command(help=EXAMPLE)
def generate(
    model: Annotated[str, typer.Argument(help="hub id, folder, run folder or pocket")],
    prompt: Annotated[str | None, typer.Option(help="one prompt")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON lines of {"prompt": ...} or {"messages": [...]}')] = None,
    adapter: Annotated[str | None, typer.Option(help="adapter folder to put on the model, of any kind")] = None,
    lora: sampling.Lora = None,
    template: Annotated[str, typer.Option(help="auto, a named template, or a Jinja file")] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="no chat template: continue the text")] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the likeliest token")] = False,
    max_new_tokens: sampling.MaxNewTokens = 256,
    temperature: sampling.Temperature = 1.0,
    top_p: sampling.TopP = 1.0,
    top_k: sampling.TopK = 0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    frequency_penalty: sampling.FrequencyPenalty = 0.0,
    presence_penalty: sampling.PresencePenalty = 0.0,
    logit_bias: sampling.LogitBias = None,
    stop: sampling.Stop = None,
    stop_id: sampling.StopId = None,
    top_logprobs: Annotated[int, typer.Option(min=0, help="likeliest tokens reported at every place")] = 0,
    n: Annotated[int, typer.Option("-n", min=1, help="completions per prompt")] = 1,
    seed: sampling.Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="answers sampled at a time")] = 64,
    int8: sampling.Int8 = False,
    plain: Annotated[bool, typer.Option("--plain", help="transformers' generate in place of the engine, to compare")] = False,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines in any case, also for one prompt at a terminal")] = False,
) -> None:
    """Read the prompts, sample, print."""
    from tunesmith.core import log
    from tunesmith.core.ports import SampleSettings
    from tunesmith.evals.opening import open_model
    from tunesmith.infer.draw import check_settings
    from tunesmith.infer.generate import How, Line, read_prompts

    log.set_up()
    _check(prompt, prompts, raw, template, greedy, temperature)
    folders = sampling.named_folders(lora)
    settings = SampleSettings(
        max_new_tokens, 0.0 if greedy else temperature, top_p, top_k, n, seed, min_p, repetition_penalty, frequency_penalty,
        presence_penalty, sampling.biases(logit_bias), tuple(stop or ()), tuple(stop_id or ()), top_logprobs, next(iter(folders), None),
    )  # fmt: skip
    check_settings(settings)  # the base's vocabulary has its say later
    if prompts is not None:
        lines = read_prompts(prompts, settings.adapter)
    else:
        lines = [Line(prompt or "", settings.adapter, "--prompt")]
    opened = open_model(model, adapter=adapter, template="none" if raw else template, dtype=dtype, device=device)
    how = How(max_rows=batch, int8=int8, folders=folders, plain=plain)
    as_text = prompt is not None and sys.stdout.isatty() and not as_json and n == 1 and not top_logprobs
    (_stream if as_text else _print_each)(opened, lines, settings, raw, how)


def _check(prompt: str | None, prompts: Path | None, raw: bool, template: str, greedy: bool, temperature: float) -> None:
    from tunesmith.core.errors import RecipeError

    wrong = (
        ((prompt is None) == (prompts is None), "give either --prompt or --prompts", 'e.g. --prompt "Hello"'),
        (str(prompts) == "-", "--prompts reads a file, and not the standard input", "write the rows into a file, e.g. prompts.jsonl"),
        (raw and template != "auto", "--raw and --template are given together", "leave one of them out"),
        (
            greedy and temperature not in (0.0, 1.0),
            f"--greedy draws nothing, and --temperature is {temperature:g}",
            "leave one of them out",
        ),
    )
    for is_so, message, remedy in wrong:
        if is_so:
            raise RecipeError(message, where="tunesmith generate", remedy=remedy, code="usage")


def _print_each(opened: Opened, lines: list[Line], settings: SampleSettings, raw: bool, how: How) -> None:
    """A JSON line for every prompt as soon as it can be had: minutes of sampling must not be lost with a Ctrl-C."""
    from tunesmith.infer.generate import generate_each

    rows = generate_each(
        opened.policy, opened.tokenizer, opened.template, [line.ask for line in lines], settings, raw=raw,
        adapters=[line.adapter for line in lines], places=[line.place for line in lines], how=how,
    )  # fmt: skip
    done = 0
    try:
        for row in rows:
            with _unbroken():
                say(row)
                sys.stdout.flush()
                done += 1
    except KeyboardInterrupt:
        rows.close()
        raise _stopped(done, lines) from None


@contextlib.contextmanager
def _unbroken() -> Iterator[None]:
    """A Ctrl-C inside waits for the end, so that no line is cut and the count is right; a second one does not wait."""
    pressed = 0

    def press(_number: int, _frame: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt

    # Other handlers than Python's own know what they do, and only the main thread can set one.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _stopped(done: int, lines: list[Line]) -> Exception:
    from tunesmith.core.errors import TunesmithError

    if done == len(lines):
        remedy = "nothing is missing"
    elif done:
        remedy = f"their lines are out; go on with the rows from {lines[done].place}"
    else:
        remedy = "run the same command again"
    return TunesmithError(f"{done} of {len(lines)} prompts are done", where="generate", remedy=remedy, code="interrupted")


def _stream(opened: Opened, lines: list[Line], settings: SampleSettings, raw: bool, how: How) -> None:
    """The text of the one answer as it comes."""
    from tunesmith.infer.generate import stream_text

    pieces: Any = stream_text(opened.policy, opened.tokenizer, opened.template, lines[0].ask, settings, raw=raw, place="--prompt", how=how)
    try:
        for text in pieces:
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    except KeyboardInterrupt:
        pieces.close()
        sys.stdout.write("\n")
        raise _stopped(0, lines) from None
