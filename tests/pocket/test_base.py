"""The bundled folder: what must be in it, how its tokenizer behaves, how large it may be."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from tunesmith.pocket import folder, general_text
from tunesmith.pocket.tickets import test_rows as held_out_rows


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(folder())


def _general() -> list[str]:
    return [json.loads(line)["text"] for line in general_text().read_text(encoding="utf-8").splitlines()]


def test_folder_is_small_enough_to_bundle():
    assert sum(path.stat().st_size for path in folder().iterdir()) <= 8_000_000
    assert general_text().stat().st_size <= 150_000


def test_configuration_fits_the_tokenizer(tokenizer):
    config = AutoConfig.from_pretrained(folder())
    assert (config.vocab_size, config.tie_word_embeddings, config.model_type) == (len(tokenizer), True, "llama")
    assert len(tokenizer) == 4096
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    embedding = config.vocab_size * config.hidden_size
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    # bf16: two bytes a weight, half a megabyte left for the tokenizer.
    assert 2 * (embedding + config.num_hidden_layers * layer) < 7_500_000


@pytest.mark.parametrize(
    "text", ["Hello there, 1234 + 5 = 1239!\n\n  two  spaces", "Grüße, 你好 🙂 \t tab\r\nline", '{"a": [1, 2.5, null]}', " leading"]
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_general_text_survives_and_is_packed_well(tokenizer):
    texts = _general()
    assert len(set(texts)) == len(texts) == 300
    ids = tokenizer(texts)["input_ids"]
    assert [tokenizer.decode(row) for row in ids] == texts
    assert sum(map(len, texts)) / sum(map(len, ids)) > 3.5


def test_chat_marks_are_single_tokens_and_end_and_pad_differ(tokenizer):
    marks = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer(mark)["input_ids"] for mark in marks] == [[0], [1], [2], [3]]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|endoftext|>", "<|pad|>", None)


def test_template_is_chatml(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert asked.endswith("<|im_start|>assistant\n")


def test_general_text_has_no_chat_and_nothing_of_the_demo():
    texts = _general()
    assert not [text for text in texts if "<|" in text or '"category"' in text or '"urgency"' in text]
    tickets = {row["messages"][1]["content"] for row in held_out_rows(500, 0)}
    assert not tickets & set(texts)
