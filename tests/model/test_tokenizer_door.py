"""A folder without tokenizer files must not become an empty tokenizer."""

import json

import pytest

from tunesmith.core.errors import ModelError
from tunesmith.model.tokenizer import load_tokenizer


def test_a_model_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.code == "no_tokenizer"
