"""Engines on tiny models, a tokenizer with one token a byte, and the plain computations that sampling is compared with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tiny_models import make_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tunesmith.core import adapters, recipe
from tunesmith.core.types import Batch, Completion, Segment
from tunesmith.infer.engine import Engine
from tunesmith.model import adapter
from tunesmith.model.arena import Arena
from tunesmith.model.many_adapters import ManyAdapters
from tunesmith.model.next_token import NextToken
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle

HEAD = {"head_dim": 8}
LOOSE = {**HEAD, "tie_word_embeddings": False}  # tied, a random Gemma says one word for ever
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": HEAD,
    "mistral": {"sliding_window": 12},
    "gemma": LOOSE,
    "gemma2": {**LOOSE, "sliding_window": 12, "final_logit_softcapping": 10.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**LOOSE, "sliding_window": 12},
    "phi": {},
    "phi3": {},
}
LENGTHS = (5, 1, 17, 40, 2, 23, 9)
LETTERS = sorted(ByteLevel.alphabet())
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=LETTERS[0]))
)
TOKENIZER.backend_tokenizer.pre_tokenizer, TOKENIZER.backend_tokenizer.decoder = ByteLevel(add_prefix_space=False), Bytes()


def ids_of(text: str | bytes) -> list[int]:
    """One token for every byte."""
    shown = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    rest = iter(range(256, 512))
    table = {b: chr(b) if chr(b) in shown else chr(next(rest)) for b in range(256)}
    return [LETTERS.index(table[b]) for b in (text.encode() if isinstance(text, str) else text)]


def prompts_of(lengths: Sequence[int] = LENGTHS, seed: int = 3, vocabulary: int = 256) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, n).tolist() for n in lengths]


def lively(family: str = "llama", seed: int = 0, **changes):
    """A random model whose answers wander: no ties, no single likely token."""
    model = make_model(family, seed, **{"initializer_range": 0.25, **FAMILIES.get(family, {}), **changes})
    return model.requires_grad_(False)


def policy_of(model, **fast: bool) -> Policy:
    policy = Policy(model, next(model.parameters()).dtype)
    settle(policy, recipe.Fast(**fast))
    return policy


@functools.cache
def frozen() -> Policy:
    """A Llama whose weights do not move, fused."""
    return policy_of(lively())


def engine_of(model=None, *, fast: dict[str, bool] | None = None, **options) -> Engine:
    policy = frozen() if model is None and not fast else policy_of(lively() if model is None else model, **(fast or {}))
    return Engine(policy, TOKENIZER, **options)


class Again:
    """Records a step by running it again, and counts. `many`: what the step reads of its rows' adapters is that of the recorded one."""

    def __init__(self, fault: Callable[[torch.Tensor], Any] | None = None) -> None:
        self.recorded, self.runs, self.forgotten, self.fault = 0, 0, 0, fault
        self.many: ManyAdapters | None = None

    def __call__(self, step: Callable[[], torch.Tensor], _device: torch.device) -> Callable[[], Any]:
        mix = None if self.many is None else self.many._now

        def run() -> None:
            self.runs += 1
            with contextlib.nullcontext() if self.many is None else self.many.at_work(mix):
                out = step()
            if self.fault is not None:
                self.fault(out)

        self.recorded += 1
        return run

    def forget(self) -> None:
        self.forgotten += 1


def in_arena(policy: Policy, **options: Any) -> Engine:
    """An engine over an arena."""
    engine = Engine(policy, TOKENIZER, **options)
    engine._next = NextToken(policy, spans=True)
    engine.forget()
    assert isinstance(engine._cache, Arena)
    return engine


def with_lora(model, *, rank: int = 4, seed: int = 2, size: float = 0.3, targets="all-linear"):
    """The model with a trained-like adapter."""
    wrapped = adapter.attach(model, adapters.Lora(rank=rank, alpha=6, targets=targets), seed=0, base="nowhere").eval()
    stir(wrapped, seed, size)
    return wrapped


def stir(model, seed: int, size: float = 0.2) -> None:
    """Noise on all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def save_lora(folder, *, family: str = "llama", seed: int = 2, size: float = 0.1, dtype=torch.float32, base=None, **config) -> str:
    """A PEFT folder with a noisy LoRA adapter for this family's tiny model, written by PEFT itself."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(lively(family, dtype=dtype) if base is None else base, LoraConfig(**settings))
    model.peft_config["default"].base_model_name_or_path = ""
    stir(model, seed, size)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def scored(policy: Policy, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """The trainer's log-probabilities of an answer."""
    train = np.array([0] * len(prompt) + [1] * len(ids), np.float32)
    batch = Batch(np.array([*prompt, *ids], np.int32), train, (Segment(0, len(train), "row"),))
    return policy.score(batch).logp.detach()


def check_scored(policy: Policy, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[Completion]], within: float = 1e-5) -> None:
    for prompt, row in zip(prompts, rows, strict=True):
        for one in row:
            # The sums behind a log-probability of -5 round with it: fp32 of some processors is 1.05e-5 off there.
            torch.testing.assert_close(torch.tensor(one.logprobs), scored(policy, prompt, one.ids), atol=within, rtol=1e-6)


def ids(rows: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[one.ids for one in row] for row in rows]


def greedy_by_transformers(model, prompts: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """transformers' own greedy answers, one prompt at a time."""
    out = []
    for prompt in prompts:
        whole = model.generate(
            input_ids=torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=count, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        out.append(tuple(whole[0, len(prompt) :].tolist()))
    return out
