"""Right on every family, whatever layout the probe chose; the table says which one it must be."""

import pytest
import torch
from tiny_models import BASE, gradients, largest_gap, make_batch, make_model, make_policy, one_by_one

from tunesmith.core.errors import ModelError

HEAD = {"head_dim": 8}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLD = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
PACKED = {
    "qwen2": {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": HEAD,
    "mistral": {"sliding_window": 12},
    "gemma": HEAD,
    "gemma2": {**HEAD, "sliding_window": 12, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**HEAD, "sliding_window": 12},
    "phi": {},
    "phi3": {"sliding_window": 12},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0},
    "cohere": {},
    "cohere2": {"sliding_window": 12},
    "olmo2": {},
    "smollm3": {},
    "starcoder2": {"sliding_window": 12},
    "glm4": HEAD,
    "qwen3_moe": {**HEAD, **MOE},
    "mixtral": MOE,
    "gpt_oss": {**HEAD, **MOE, "sliding_window": 12},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {**OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "_own_names": True},
}
PADDED = {
    "stablelm": {},
    "mamba": {},
    "qwen3_next": {**HEAD, **MOE, **LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neo": {
        **OLD, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 12, "max_position_embeddings": 256, "_own_names": True,
    },
}  # fmt: skip
CASES = [*((f, c, "packed") for f, c in PACKED.items()), *((f, c, "padded") for f, c in PADDED.items())]


@pytest.mark.parametrize(("family", "changes", "layout"), CASES, ids=[c[0] for c in CASES])
def test_family_scores_as_plain_transformers_does(family, changes, layout):
    batch = make_batch()
    model = make_model(family, **changes)
    policy = make_policy(model)
    assert (policy.layout, policy.head) == (layout, "fast"), policy.notes
    assert bool(policy.notes) == (layout == "padded")
    other = make_model(family, **changes)
    theirs = one_by_one(other, batch)
    ours = policy.score(batch).logp
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    weight = torch.linspace(-1, 1, len(ours))
    # Recurrent layers are computed in blocks of the padded length: their sums come in another order.
    assert largest_gap(gradients(model, (ours * weight).sum()), gradients(other, (theirs * weight).sum())) < 1e-3


def test_windows_matter_in_these_tests():
    batch = make_batch()
    wide, narrow = (make_policy(make_model("mistral", sliding_window=w)).score(batch).logp for w in (None, 12))
    assert float((wide - narrow).detach().abs().max()) > 1e-2


def test_rotary_angles_that_depend_on_the_longest_document_do_not_see_neighbours():
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    batch = make_batch((40, 20, 50, 5))
    for packed in (True, False):
        model = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
        policy = make_policy(model, packed=packed)
        torch.testing.assert_close(policy.score(batch).logp, one_by_one(model, batch), rtol=1e-5, atol=2e-5)


def test_a_model_that_looks_ahead_is_refused():
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("sdpa")
    model.model.config.is_causal = False
    with pytest.raises(ModelError) as caught:
        make_policy(model)
    assert caught.value.code == "not_causal"


def test_probing_leaves_no_trace():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    make_policy(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks or len(model.get_input_embeddings()._forward_hooks) == 1


def test_a_small_vocabulary_is_enough_for_the_probe():
    assert make_policy(make_model(vocab_size=BASE["vocab_size"] // 16)).layout == "packed"
