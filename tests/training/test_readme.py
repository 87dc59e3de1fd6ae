"""The README beside an adapter says how plain libraries read it, and that is so."""

import re
from pathlib import Path

import pytest
import torch

from tunesmith.training.run import train


def test_the_lines_beside_a_reward_model_score_a_padded_batch(wish, monkeypatch):
    made = wish("reward", "lora", steps=1, eval_every=0)
    train(made)
    final = Path(made["run"]["out"]) / "final"
    readme = (final / "README.md").read_text()
    assert "More Information Needed" not in readme
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(final)
    held = {}
    exec(lines, held)  # what a reader would paste
    assert len({len(held["tokenizer"].apply_chat_template(chat, return_dict=False)) for chat in held["chats"]}) == 2
    for chat, score in zip(held["chats"], held["scores"].tolist(), strict=True):
        ids = torch.tensor([held["tokenizer"].apply_chat_template(chat, return_dict=False)])
        assert float(held["model"](ids).logits[0, 0]) == pytest.approx(score, abs=1e-5)


def test_an_adapter_of_a_language_model_has_no_blank_form(tree):
    made = tree("lora", steps=1, eval_every=0)
    train(made)
    readme = (Path(made["run"]["out"]) / "final/README.md").read_text()
    assert "A LORA adapter" in readme
    assert "More Information Needed" not in readme
