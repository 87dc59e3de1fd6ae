"""`tunesmith chat` as a person at a terminal has it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from terminal import CTRL_C, CTRL_D, LEFT, UP, Terminal

from tunesmith import pocket

LONG = ("--temperature", "100", "--max-new-tokens", "900")  # words at random, which hardly ever end by themselves
STILL = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture
def open_chat() -> Iterator[Callable[..., Terminal]]:
    """Opens chats with the bundled model, at their first prompt."""
    opened: list[Terminal] = []

    def begin(*words: object) -> Terminal:
        opened.append(Terminal(["chat", "pocket", *words]))
        opened[-1].read("you.*> $")
        return opened[-1]

    yield begin
    for terminal in opened:
        terminal.close()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the bundled model that changes what it says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pocket.folder()), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def answer(shown: str) -> str:
    """The model's words in what a turn showed."""
    return shown.partition("model> ")[2].rpartition("\nyou")[0]


def test_an_answer_comes_in_pieces_and_ctrl_c_stops_it_and_keeps_the_talk(open_chat: Callable[..., Terminal]) -> None:
    chat = open_chat(*LONG)
    chat.type("Tell me a story.\r")
    chat.read("model> .*[a-z].*[a-z]")
    before = len(chat.pieces)
    chat.type(CTRL_C)
    shown = chat.read(r"\[stopped\].*you> $")
    assert len(chat.pieces) > before, "the answer went on in pieces"
    assert "Traceback" not in shown
    assert "ends the talk" not in shown, "that is for a press at the prompt"
    chat.say("And now?", "model> .*[a-z]")
    chat.type(CTRL_C)
    chat.read(r"\[stopped\].*you> $")
    for _ in range(2):
        assert "the last turn is taken back" in chat.say("/undo"), "a stopped answer is a turn"
    assert "nothing to take back" in chat.say("/undo")
    chat.type("/quit\r")
    assert chat.end() == 0


def test_ctrl_c_at_the_prompt_clears_the_line_and_says_how_to_leave(open_chat: Callable[..., Terminal]) -> None:
    chat = open_chat(*STILL)
    first = answer(chat.say("Hello."))
    chat.type("/reset")
    chat.press_ctrl_c()
    assert "/quit or Ctrl-D ends the talk" in chat.read("talk.*you> $")
    assert "the last turn is taken back" in chat.say("/undo"), "the typed words are gone, the talk is not"
    for _ in range(3):
        chat.press_ctrl_c()
        assert "/quit or Ctrl-D ends the talk" in chat.read("talk.*you> $")
    assert "model>" not in chat.say(""), "an empty line is asked again"
    assert answer(chat.say("Hello.")) == first
    chat.type(CTRL_D)
    assert chat.end() == 0


def test_a_talk_has_a_history_that_can_be_taken_back_and_forgotten(open_chat: Callable[..., Terminal]) -> None:
    chat = open_chat(*STILL)
    first, second = answer(chat.say("The app crashes.")), answer(chat.say("The app crashes."))
    assert first.strip()
    assert second != first, "the model has read the first turn"
    assert "taken back" in chat.say("/undo")
    assert answer(chat.say("The app crashes.")) == second
    assert "forgotten" in chat.say("/reset")
    assert answer(chat.say("The app crashes.")) == first
    assert "/adapter [NAME]" in chat.say("/help")
    assert "there is no command /hlep" in chat.say("/hlep")


def test_lines_can_be_edited_and_had_again(open_chat: Callable[..., Terminal]) -> None:
    pytest.importorskip("readline")
    chat = open_chat(*STILL)
    chat.type("/rset" + LEFT * 3 + "e\r")
    chat.read("the talk is forgotten.*you> $")
    chat.type(UP + "\r")
    chat.read("/reset.*the talk is forgotten.*you> $")


def test_adapters_change_in_the_middle_of_a_talk(open_chat: Callable[..., Terminal], adapter: Path) -> None:
    chat = open_chat(*STILL, "--lora", f"mine={adapter}")
    assert "you (mine)> " in "".join(chat.pieces)
    mine = answer(chat.say("Hello."))
    chat.say("/reset")
    assert "going on with the base" in chat.say("/adapter")
    base = answer(chat.say("Hello."))
    assert base != mine
    shown = chat.say("/adapter mien")
    assert "there is no adapter 'mien'; did you mean 'mine'?" in shown
    assert "--lora NAME=FOLDER" in shown
    assert shown.endswith("you> "), "the base still answers"
    assert "the adapter mine" in chat.say("/adapter mine", r"you \(mine\)> $")
    chat.say("/reset")
    assert answer(chat.say("Hello.")) == mine


def test_a_full_context_says_what_to_do_in_a_talk(open_chat: Callable[..., Terminal]) -> None:
    chat = open_chat(*STILL, "--system", "word " * 1100)
    shown = chat.say("Hello.")
    assert "or shorten --system: there is no turn to take back" in shown
    assert "nothing to take back" in chat.say("/undo"), "the talk is as it was"
    chat = open_chat(*STILL)
    chat.say("Hello.")
    shown = chat.say("word " * 1100)
    assert "/undo" in shown
    assert "/reset" in shown
    assert "shorten" not in shown


def test_a_talk_from_a_file_ends_with_the_file() -> None:
    words = [sys.executable, "-m", "tunesmith", "chat", "pocket", *STILL]
    done = subprocess.run(words, input="Hello.\n\n/undo\n/undo\n", capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.count("model> ") == 1
    assert "the last turn is taken back" in done.stdout, "what follows an empty line is read too"
    assert "there is nothing to take back" in done.stdout


def test_settings_of_the_draw_are_those_of_generate(open_chat: Callable[..., Terminal]) -> None:
    plain = answer(open_chat(*STILL).say("Hello."))
    word = plain.split()[0]
    narrow = ("--top-k", "1", "--min-p", "1", "--repetition-penalty", "1", "--frequency-penalty", "0", "--presence-penalty", "0")
    chat = open_chat("--temperature", "1", "--max-new-tokens", "12", *narrow, "--stop", word)
    assert answer(chat.say("Hello.")).strip() == plain.partition(word)[0].strip(), "one candidate is the greedy one, and a stop ends it"
