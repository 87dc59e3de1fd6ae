"""The README beside an adapter: whose it is and how plain libraries read it, in place of PEFT's blank form."""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.files import read_json, write_text
from tunesmith.model.tokenizer import ADAPTER

# A padded batch is read at its last token that is no pad, and PEFT takes the pad token from nowhere but this call.
_REWARD = """
A reward model: one number for a conversation, read at its last token (`reward.json` says where exactly).

```python
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id={pad}).eval()
chats = [[{{"role": "user", "content": "Hi."}}, {{"role": "assistant", "content": answer}}] for answer in ("Hello!", "What is it now?")]
batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
scores = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
```
"""
_LANGUAGE = """
Plain PEFT reads it with `AutoPeftModelForCausalLM.from_pretrained`; `tunesmith.json` says how it was prompted.
"""
_ONE_BY_ONE = "\nThe tokenizer has no token to pad with: score one conversation at a time.\n"


def write_readme(folder: Path, *, scalar: bool, pad: int | None = None) -> None:
    """Write README.md into an adapter folder; `pad` is the id that fills up rows for a reward model (`scalar`)."""
    config = read_json(folder / ADAPTER)
    base = config["base_model_name_or_path"]
    head = f"---\nlibrary_name: peft\n---\n\n# A {config['peft_type']} adapter\n\nTrained by tunesmith on `{base}`.\n"
    body = _REWARD.format(pad=pad) + (_ONE_BY_ONE if pad is None else "") if scalar else _LANGUAGE
    write_text(folder / "README.md", head + body)
