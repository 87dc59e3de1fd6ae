"""Small models and batches made in memory, and the plain computation everything is compared with."""

from __future__ import annotations

import types

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.core import recipe
from tunesmith.core.types import Batch, Segment
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle

BASE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXACT = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def make_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A two-layer model with weights large enough that every mistake shows."""
    torch.manual_seed(seed)
    plain = changes.pop("_own_names", False)
    config = AutoConfig.for_model(family, **({} if plain else BASE) | changes)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.03))
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__ in EXACT:
                module.forward = types.MethodType(_rms_norm, module)
    return model


def _rms_norm(self, x):
    """transformers' norms round to fp32 whatever the model's precision; the truth of tests in fp64 must not."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def make_policy(model, **fast: bool) -> Policy:
    policy = Policy(model, next(model.parameters()).dtype)
    settle(policy, recipe.Fast(**fast))
    return policy


def make_batch(lengths=(19, 5, 44, 2, 30), seed: int = 1, vocabulary: int = 256, weights=(0.0, 1.0)) -> Batch:
    """Random documents; about two thirds of the tokens are trained, never the first of a document."""
    rng = np.random.default_rng(seed)
    stops = np.cumsum(lengths)
    ids = rng.integers(3, vocabulary, stops[-1]).astype(np.int32)
    train = rng.choice(np.array(weights, np.float32), stops[-1], p=[0.35, *[0.65 / (len(weights) - 1)] * (len(weights) - 1)]).astype(
        np.float32
    )
    train[stops - 1] = 1
    train[[0, *stops[:-1]]] = 0
    return Batch(ids, train, tuple(Segment(int(b) - n, int(b), f"row:{i}") for i, (b, n) in enumerate(zip(stops, lengths, strict=True))))


def one_by_one(model, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the trained tokens by plain transformers, one document at a time."""
    out = []
    for segment in batch.segments:
        ids = torch.tensor(batch.ids[segment.start : segment.stop].astype(np.int64))[None]
        logits = model(ids, use_cache=False).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logp = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        out.append(logp[torch.tensor(batch.train[segment.start + 1 : segment.stop] != 0)])
    return torch.cat(out)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest_gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two gradients, tensor by tensor, relative to its norm.

    A tensor whose true gradient is zero (the bias of a key projection) holds rounding only: hence the floor.
    """
    floor = 1e-3 * max(float(t.norm()) for t in a.values())
    zero = torch.zeros(())
    gaps = [(a.get(n, zero) - b.get(n, zero)).norm() / (a.get(n, zero).norm() + floor) for n in {*a, *b}]
    return float(max(gaps))
