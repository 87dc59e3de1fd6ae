"""Train the tokenizer of pocket on its corpus: byte-level BPE of 4,096 tokens, chat marks included.

python scripts/pocket/tokenizer.py --corpus runs/pocket-corpus/train.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tunesmith.core.files import write_json, write_text
from tunesmith.pocket import folder

VOCABULARY = 4096
END, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
# Words with their leading space, digits one by one (sums of any length look alike), runs of marks, line breaks.
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z\u00c0-\u024f]+|\d| ?[^\s\dA-Za-z\u00c0-\u024f]+|\s*\n|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def texts(path: Path, limit: int) -> Iterator[str]:
    """The texts of the first rows of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        for line in islice(file, limit):
            # The chat marks are tokens already; left in, they would be glued to their neighbours.
            yield re.sub(r"<\|[a-z_]+\|>", "", json.loads(line)["text"])


def build(corpus: Path, limit: int) -> Tokenizer:
    """A tokenizer trained on the first `limit` documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus, limit), trainer)
    return tokenizer


def main() -> None:
    """Train, save beside the model's configuration, and say how well it packs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("runs/pocket-corpus/train.jsonl"))
    parser.add_argument("--out", type=Path, default=folder())
    parser.add_argument("--limit", type=int, default=60_000)
    options = parser.parse_args()
    tokenizer = build(options.corpus, options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "padding_side": "right",
    }
    write_json(options.out / "tokenizer_config.json", settings)
    write_text(options.out / "chat_template.jinja", CHAT_TEMPLATE)
    sample = list(texts(options.corpus, 5000))
    ids = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(sample))
    print(f"{tokenizer.get_vocab_size()} tokens; {sum(len(t.encode()) for t in sample) / ids:.3f} bytes a token")


if __name__ == "__main__":
    main()
