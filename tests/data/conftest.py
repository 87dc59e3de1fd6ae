"""A small byte-level tokenizer with a ChatML-like template, made in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tunesmith import pocket

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' and m.content == 'forbidden' %}{{ raise_exception('this word is forbidden') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the four control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|bos|>", eos_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def pocket_tokenizer() -> PreTrainedTokenizerFast:
    """That of the bundled base."""
    return AutoTokenizer.from_pretrained(pocket.folder())


@pytest.fixture(scope="session")
def merging() -> PreTrainedTokenizerFast:
    """Byte-level with merges over spaces and line breaks, so that tokens do straddle prompt and answer."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    lines = ["Answer: four", "Answer:five and six", "Answer:\nnone: the rest", ": four : five: six"] * 4
    special = ["<|eos|>"]
    inner.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|eos|>")
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\nAnswer:"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return made


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows (or raw bytes) to a file of the test's folder and give its path."""

    def put(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return put


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a token cache of its own."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
