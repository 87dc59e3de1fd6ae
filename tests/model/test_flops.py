"""The count of operations is what torch counts on a plain forward and backward pass, and the measurement disturbs nothing."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from tunesmith.core.types import Tokens
from tunesmith.model.flops import SIZES, count, measure_gemm

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LENGTH = 40


def row(length=LENGTH + 1, untrained=1, after=0):
    """`untrained` positions, then trained ones, then `after` that are not trained."""
    train = np.ones(length, np.float32)
    train[:untrained] = 0
    train[length - after :] = 0
    return Tokens(np.arange(length, dtype=np.int32), train, "row")


def by_torch(model, length=LENGTH):
    """Operations of one plain forward and backward pass; eager attention computes the half above the diagonal too."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    causal.set_attn_implementation("eager")
    causal.enable_input_require_grads()  # so that the first layer's products have an input gradient like all others
    ids = torch.randint(3, 250, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def above_the_diagonal(work, length=LENGTH):
    return sum(12 * width * (length * length - length * (length + 1) // 2) for width, _ in work.attention)


def lora(model, **settings):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("gemma", {"head_dim": 16}), ("phi", {}), ("mixtral", EXPERTS)],
    ids=["llama", "tied", "gpt2", "wide heads", "phi", "experts"],
)
def test_full_fine_tuning_costs_what_torch_counts(family, changes):
    own = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "_own_names": True} if family == "gpt2" else {}
    model = make_model(family, **changes, **own)
    if family == "mixtral":
        model.set_experts_implementation("eager")
    work = count(model)
    assert not work.not_counted
    assert work.formula == "6 N + 12 L h s per token, 6 N_head per trained one"
    assert work.of([row()]) == by_torch(model) - above_the_diagonal(work)


@pytest.mark.parametrize(("family", "bias"), [("llama", "none"), ("phi", "none"), ("qwen2", "all")])
def test_lora_costs_what_torch_counts(family, bias):
    model = lora(make_model(family), bias=bias)
    work = count(model.get_base_model())
    assert work.trained > 0
    assert work.formula == "4 N + 6 N_lora + 12 L h s per token, 4 N_head per trained one"
    assert work.of([row()]) == by_torch(model) - above_the_diagonal(work)


def test_an_adapted_head_is_counted_on_trained_tokens():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    work = count(model.get_base_model())
    assert work.head == (32 * 256, 4 * (32 + 256))
    assert work.trained == 0


def test_only_what_is_needed_is_counted():
    work = count(make_model())
    body, head = 6 * work.trained, 6 * work.head[1]
    attention = 12 * 2 * 32
    assert work.of([row(untrained=30)]) == work.of([row()]) - head * 29
    # What stands behind the last trained token does not go through the model, nor does a row without any.
    assert work.of([row(after=9)]) == (LENGTH - 9) * (body + head) + attention * sum(range(1, LENGTH - 9 + 1))
    assert work.of([row(untrained=LENGTH + 1)]) == 0
    assert work.of([row(), row(7)]) == work.of([row()]) + work.of([row(7)])


def test_a_window_shortens_attention():
    wide, narrow = (count(make_model("mistral", sliding_window=window)) for window in (None, 12))
    assert [window for _, window in narrow.attention] == [12, 12]
    looked = sum(min(position + 1, 12) for position in range(LENGTH))
    assert wide.of([row()]) - narrow.of([row()]) == 12 * 2 * 32 * (sum(range(1, LENGTH + 1)) - looked)


class Listed(torch.nn.Module):
    """Experts as a list of modules, as code outside transformers keeps them."""

    def __init__(self):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=0, num_experts_per_tok=2)
        self.layer = torch.nn.Module()
        self.layer.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(8, 6)}) for _ in range(4))
        self.layer.router = torch.nn.Linear(8, 4)

    def get_decoder(self):
        return self

    def get_output_embeddings(self):
        return None


def test_of_listed_experts_those_visited_are_counted():
    model = Listed()
    assert count(model).trained == 2 * 8 * 6 + 8 * 4
    model.config.num_experts_per_tok = None
    assert count(model).not_counted == ("4 tensors of Linear",)


def test_what_cannot_be_counted_is_named():
    work = count(make_model("lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3))
    assert work.not_counted == ("1 tensors of Conv1d", "the mixing of positions in 1 of 2 layers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_leaves_the_random_state_alone(dtype):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    gemm = measure_gemm(torch.device("cpu"), dtype)
    assert torch.equal(state, torch.get_rng_state())
    assert gemm.flops > 0
    assert gemm.size in SIZES
    assert gemm.dtype == str(dtype).removeprefix("torch.")
