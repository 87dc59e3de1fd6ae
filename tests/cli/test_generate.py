"""`tunesmith generate`: lines as they come, what is kept at Ctrl-C, text at a terminal, and places in errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from terminal import Terminal

from tunesmith.cli.main import main
from tunesmith.evals import opening
from tunesmith.evals.opening import Opened, open_model

GREEDY = ("--greedy", "--max-new-tokens", "8")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(400)))
    return file


def said(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
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
    token = first(said(capsys, *prompt))["ids"][0]
    assert first(said(capsys, *prompt, "--logit-bias", f"{token}=-100"))["ids"][0] != token
    stopped = first(said(capsys, *prompt, "--stop-id", token, "--stop-id", 5))
    assert (stopped["ids"], stopped["stop_reason"]) == ([token], "stop")
    for wrong in ("5", "x=1", "5=x", "-5=1"):
        assert said(capsys, *prompt, f"--logit-bias={wrong}")["error"]["where"] == "--logit-bias", wrong
    assert said(capsys, *prompt, "--stop-id", 99999)["error"]["code"] == "bad_setting"


def test_errors_name_the_row_and_what_to_do(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    bad = rows.with_name("bad.jsonl")
    bad.write_text('{"prompt": "Hello."}\n\n' + json.dumps({"prompt": "word " * 1100}) + "\n")
    error = said(capsys, "--prompts", bad, *GREEDY)["error"]
    assert (error["code"], error["where"]) == ("prompt_too_long", f"{bad}:3")
    assert said(capsys, "--prompts", bad, *GREEDY, "--plain")["error"]["where"] == f"{bad}:3"
    assert said(capsys, "--prompt", "word " * 1100, *GREEDY)["error"]["where"] == "--prompt"
    bad.write_text('{"prompt": "Hello."}\n{"prompt": "Hello.", "adapter": "mine"}\n')
    error = said(capsys, "--prompts", bad, *GREEDY)["error"]
    assert (error["code"], error["where"]) == ("unknown_adapter", f"{bad}:2")
    assert "--lora mine=FOLDER" in error["remedy"]
    bad.write_text('{"prompt": "Hello."}\n{"prompt": 5}\n')
    error = said(capsys, "--prompts", bad, *GREEDY)["error"]
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
