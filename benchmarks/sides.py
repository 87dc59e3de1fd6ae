"""What the measured processes of all races share: the model's shape, its precisions, a clock, memory, and how a job is read."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32
SHAPE = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30, "num_attention_heads": 9}
SHAPE |= {"num_key_value_heads": 3, "max_position_embeddings": 8_192}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PRECISIONS = {  # name -> (precision of the loaded weights, bf16 autocast)
    "fp32": ("float32", False),
    "fp32 under bf16 autocast": ("float32", True),
    "bf16 under bf16 autocast": ("bfloat16", True),
    "bf16": ("bfloat16", False),
}
Setting = dict[str, Any]
Result = dict[str, Any]


def write_model(folder: Path, texts: Iterable[str], layers: int | None = None) -> tuple[Any, Any]:
    """A model of SmolLM2-135M's shape with random weights, and a tokenizer trained on the texts, both saved in the folder and returned."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=SHAPE["vocab_size"], special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = SHAPE | ({"num_hidden_layers": layers} if layers else {})
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, rope_theta=100_000.0)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model, tokenizer


def end_of(row: Any) -> int:
    """Tokens of a row up to and including the last trained one."""
    return int(row.train.nonzero()[0][-1]) + 1


def peak_memory() -> float:
    """GB: the highest resident memory of this process, on a GPU the most allocated."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gemm_of(device: Any, precision: str) -> Result:
    """The fastest square product in the precision of the products."""
    import torch

    from tunesmith.model.flops import measure_gemm

    weights, autocast = PRECISIONS[precision]
    gemm = measure_gemm(device, torch.bfloat16 if autocast or weights == "bfloat16" else torch.float32)
    return {"name": f"{gemm.size}^3 {gemm.dtype}", "flops": gemm.flops}


def now() -> float:
    """Seconds, when everything handed to a GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clock_of() -> Any:
    """A callback that times every optimizer step; collating its rows and writing its log are outside."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._began = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(now() - self._began)

    return Clock()


def answer(
    description: str | None,
    build: Callable[[Path, str, bool], Result],
    case: Callable[..., Any],
    kinds: Mapping[str, Callable[[Any, Setting], Result]],
) -> None:
    """Read a job (what, case, setting), do it, write its result: what a measured process does."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    words = parser.parse_args()
    job = json.loads(words.job.read_text(encoding="utf-8"))
    if job["what"] == "build":
        result = build(Path(job["work"]), job["data"], job["quick"])
    else:
        result = kinds[job["what"]](case(**job["case"]), job["setting"])
    words.result.write_text(json.dumps(result), encoding="utf-8")
