"""`tunesmith generate`: lines as they come, what is kept at Ctrl-C, text at a terminal, and places in errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from terminal import Terminal

from tunesmith.cli.main import main
from tunesmith.core.adapters import Lora
from tunesmith.core.errors import DataError
from tunesmith.core.ports import SampleSettings
from tunesmith.data.template import choose_template
from tunesmith.evals import opening
from tunesmith.evals.opening import Opened, open_model
from tunesmith.infer.generate import generate as generate_rows
from tunesmith.model.adapter import attach

GREEDY = ("--greedy", "--max-new-tokens", "8")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(400)))
    return file


def answered(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    main(["generate", "pocket", *map(str, words), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def first(line: dict[str, Any]) -> dict[str, Any]:
    return line["completions"][0]


def test_lines_come_one_by_one_and_ctrl_c_keeps_them(rows: Path) -> None:
    words = ["--prompts", rows, "--batch", "4", "--temperature", "3", "--max-new-tokens", "300", "--seed", "1"]
    log = rows.with_name("log.txt")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", "generate", "pocket", *map(str, words)],
            stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert process.poll() is None, "hundreds of prompts are still waiting"
    process.send_signal(signal.SIGINT)
    # Not communicate, which knows nothing of what was read ahead for the lines; not splitlines: there are other line ends within texts.
    lines += process.stdout.read().split("\n")[:-1]
    process.wait(timeout=60)
    err = log.read_text()
    assert [json.loads(line)["prompt"] for line in lines] == [f"Say {n}." for n in range(len(lines))]
    assert process.returncode == 3
    assert f"{len(lines)} of 400 prompts are done" in err
    assert f"go on with the rows from {rows}:{len(lines) + 1}" in err
    assert "checkpoint" not in err


def test_one_prompt_at_a_terminal_streams_its_text() -> None:
    words = ("generate", "pocket", "--prompt", "Hello.", "--greedy", "--max-new-tokens", "40")
    shown: list[str] = []
    for more in ((), ("--json",)):
        terminal = Terminal([*words, *more], size="2000")
        assert terminal.end() == 0
        shown.append("".join(terminal.pieces).replace("\r\n", "\n"))
        pieces = len(terminal.pieces)
        terminal.close()
        if not more:
            assert pieces > 5
    [line] = [json.loads(line) for line in shown[1].splitlines() if line.startswith("{")]
    assert shown[0].endswith(first(line)["text"] + "\n")
    assert "completions" not in shown[0]


def test_a_bias_and_a_stop_id_by_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ("--prompt", "Hello.", *GREEDY)
    token = first(answered(capsys, *prompt))["ids"][0]
    assert first(answered(capsys, *prompt, "--logit-bias", f"{token}=-100"))["ids"][0] != token
    stopped = first(answered(capsys, *prompt, "--stop-id", token, "--stop-id", 5))
    assert (stopped["ids"], stopped["stop_reason"]) == ([token], "stop")
    for wrong in ("5", "x=1", "5=x", "-5=1"):
        assert answered(capsys, *prompt, f"--logit-bias={wrong}")["error"]["where"] == "--logit-bias", wrong
    assert answered(capsys, *prompt, "--stop-id", 99999)["error"]["code"] == "bad_setting"


def test_errors_name_the_row_and_what_to_do(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    bad = rows.with_name("bad.jsonl")
    bad.write_text('{"prompt": "Hello."}\n\n' + json.dumps({"prompt": "word " * 1100}) + "\n")
    error = answered(capsys, "--prompts", bad, *GREEDY)["error"]
    assert (error["code"], error["where"]) == ("prompt_too_long", f"{bad}:3")
    assert answered(capsys, "--prompts", bad, *GREEDY, "--plain")["error"]["where"] == f"{bad}:3"
    assert answered(capsys, "--prompt", "word " * 1100, *GREEDY)["error"]["where"] == "--prompt"
    bad.write_text('{"prompt": "Hello."}\n{"prompt": "Hello.", "adapter": "mine"}\n')
    error = answered(capsys, "--prompts", bad, *GREEDY)["error"]
    assert (error["code"], error["where"]) == ("unknown_adapter", f"{bad}:2")
    assert "--lora mine=FOLDER" in error["remedy"]
    bad.write_text('{"prompt": "Hello."}\n{"prompt": 5}\n')
    error = answered(capsys, "--prompts", bad, *GREEDY)["error"]
    assert (error["code"], error["message"]) == ("no_prompt", "prompt: expected text or messages, got '5'")


@pytest.mark.parametrize(
    ("words", "where"),
    [(["--top-p", "0"], "top_p"), (["--repetition-penalty", "0"], "repetition_penalty"), (["--greedy"], "tunesmith generate")],
)
def test_settings_are_refused_before_the_model_is_opened(capsys: pytest.CaptureFixture[str], words: list[str], where: str) -> None:
    assert main(["generate", "no/such/model", "--prompt", "Hello.", "--temperature", "0.9", "--json", *words]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["where"] == where


@pytest.mark.parametrize("plain", [(), ("--plain",)])
def test_a_row_that_the_model_has_no_number_for_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain: tuple[str, ...]
) -> None:
    """A model that breaks at one token: its own file and line are named, and the engine has answered the rows before it."""

    def broken(*names: Any, **settings: Any) -> Opened:
        opened = open_model(*names, **settings)
        [odd] = opened.tokenizer.encode("~", add_special_tokens=False)
        embedding = opened.policy.causal.get_input_embeddings()
        embedding.register_forward_hook(lambda _, given, found: found.masked_fill((given[0] == odd).unsqueeze(-1), torch.nan))
        return opened

    monkeypatch.setattr(opening, "open_model", broken)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hello.", "Hi.", "Hello~.", "Hi.")))
    assert main(["generate", "pocket", "--prompts", str(file), *GREEDY, *plain, "--json"]) == 2
    *answers, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["prompt"] for row in answers] == ([] if plain else ["Hello.", "Hi."])  # the plain twin does all in one batch
    assert (last["error"]["code"], last["error"]["where"]) == ("not_finite", f"{file}:3")


@pytest.mark.parametrize(
    ("row", "code", "part"),
    [
        ({"messages": [{"role": "user", "content": "x"}], "adaptor": "a"}, "wrong_key", "did you mean 'adapter'?"),
        ({"prompt": "x", "messages": []}, "two_prompts", "a prompt and messages"),
        ({"messages": []}, "no_prompt", "no turns"),
    ],
)
def test_nothing_of_a_row_is_dropped_unseen(row: dict[str, Any], code: str, part: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    error = answered(capsys, "--prompts", file)["error"]
    assert error["code"] == code
    assert part in error["message"]
    assert f"{file}:1" in error["where"]


def test_an_adapter_that_is_not_there_is_named_by_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("runs/nope", "./nope"):
        error = answered(capsys, "--prompt", "x", "--adapter", name)["error"]
        assert (error["code"], error["where"]) == ("no_model", "--adapter")


def test_the_standard_input_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "standard input" in answered(capsys, "--prompts", "-")["error"]["message"]


def test_an_adapter_that_was_trained_with_another_template_is_told(tmp_path: Path, said: list[str]) -> None:
    from tunesmith.core.card import Card, write_card
    from tunesmith.infer.generate import How, chat_sampler

    opened = open_model("pocket", template="chatml")
    folder = tmp_path / "adapter"
    attach(opened.policy.causal, Lora(rank=2), seed=0, base="").save_pretrained(str(folder))
    opened = open_model("pocket", template="chatml")
    for template, told in (("chatml", 0), ("vicuna", 1)):
        theirs = choose_template(opened.tokenizer, template)
        write_card(folder, Card("pocket", None, "fp32", True, theirs.source, theirs.hash))
        chat_sampler(opened.policy, opened.tokenizer, opened.template, How(folders={"v": str(folder)}))
        assert sum("give --template vicuna, or open it alone" in line for line in said) == told


@pytest.mark.parametrize("out", ["ascii", "closed", "full"])
def test_an_output_that_cannot_take_all(out: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "h\u00e9 \U0001f600"}) + "\n")
    words = [sys.executable, "-m", "tunesmith", "generate", "pocket", "--prompts", str(file), "--greedy", "--max-new-tokens", "2"]
    shell = {"ascii": '"$@"', "closed": '"$@" >&-', "full": '"$@" >/dev/full'}[out]
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *words], capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=120
    )
    assert b"Traceback" not in done.stderr
    if out == "ascii":
        assert json.loads(done.stdout)["prompt"] == "h\u00e9 \U0001f600"
    assert done.returncode == (2 if out == "full" else 0)
    assert (b"no room for what is printed" in done.stderr) == (out == "full")


def test_a_text_in_place_of_a_list_of_prompts_is_refused() -> None:
    opened = open_model("pocket", template="chatml")
    with pytest.raises(DataError) as caught:
        generate_rows(opened.policy, opened.tokenizer, opened.template, "Hello.", SampleSettings(2, 0.0))
    assert caught.value.code == "not_a_list"
