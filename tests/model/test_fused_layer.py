"""Fused decoder layers against transformers' own: values, every gradient, and everything that could be silently stale or skipped."""

import contextlib
import copy

import pytest
import torch
from tiny_models import gradients, largest_gap, make_batch, make_model, make_policy, one_by_one
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tunesmith.core import adapters, recipe
from tunesmith.core.types import Batch, Segment
from tunesmith.model import adapter, fuse, fused_layer
from tunesmith.model.gradients import direct
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle

BATCH = make_batch((19, 5, 44, 2, 30, 1, 1), weights=(0.0, 1.0, 0.5))
FAMILIES = {
    "llama": ("llama", {}),
    "llama, all biases, as many key heads": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama, one key head, tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral, window": ("mistral", {"sliding_window": 12}),
    "qwen2, window above the first layer": ("qwen2", {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 16}),
}
QV, MLP, DOWN_O = ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), ("down_proj", "o_proj")
TRAINED = {"full": None, "all-linear": "all-linear", "q+v": QV, "mlp": MLP, "down+o": DOWN_O}


def adapt(model, targets, dropout=0.0, seed=2):
    """The model with an adapter whose factors are both noise; itself when `targets` is None."""
    if targets is None:
        return model
    settings = adapters.Lora(rank=4, alpha=6, dropout=dropout, targets=targets if isinstance(targets, str) else list(targets))
    model = adapter.attach(model, settings, seed=0, base="nowhere").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.lora_layers(model):
            layer.lora_B["default"].weight.normal_(std=0.1, generator=generator)
    return model


def weighted(logp):
    return (logp * torch.linspace(-1, 1, len(logp), dtype=logp.dtype)).sum()


def fused_policy(*arguments, **fast):
    policy = make_policy(*arguments, **fast)
    assert policy.layers == ("plain" if fast.get("layer") is False else "fused"), policy.notes
    return policy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_fused_layers_are_transformers_layers(family, trained, dtype, limit):
    name, changes = FAMILIES[family]
    ours, theirs = (adapt(make_model(name, dtype=dtype, **changes), TRAINED[trained]) for _ in range(2))
    policy = fused_policy(ours)
    a, b = policy.score(BATCH).logp, one_by_one(theirs, BATCH)
    torch.testing.assert_close(a, b, rtol=0, atol=limit)
    mine, truth = gradients(ours, weighted(a)), gradients(theirs, weighted(b))
    assert set(mine) == set(truth) == set(policy.parameters_by_name())
    assert largest_gap(mine, truth) < limit


def test_long_documents_in_several_blocks():
    batch = make_batch((300, 270, 33, 1, 140, 7))
    for changes in ({}, {"sliding_window": 150}):
        name = "mistral" if changes else "llama"
        ours, theirs = (make_model(name, dtype=torch.float64, max_position_embeddings=1024, **changes) for _ in range(2))
        a, b = fused_policy(ours).score(batch).logp, one_by_one(theirs, batch)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        assert largest_gap(gradients(ours, weighted(a)), gradients(theirs, weighted(b))) < 1e-9


def test_filler_tokens_add_nothing_to_any_gradient():
    """Id 0 stands in the filler and nowhere else: the row of the embedding must stay without a gradient."""
    model = make_model(dtype=torch.float64, pad_token_id=None)
    logp = fused_policy(model).score(BATCH).logp
    assert 0 not in BATCH.ids
    assert not bool(gradients(model, weighted(logp))["model.embed_tokens.weight"][0].any())


def narrow_policy(trained, **fast):
    """Products in bf16: fp32 weights that are trained, or a bf16 base under an fp32 adapter."""
    if TRAINED[trained] is None:
        policy = Policy(make_model("qwen2"), torch.bfloat16)
        settle(policy, recipe.Fast(**fast))
    else:
        policy = make_policy(adapt(make_model("qwen2", dtype=torch.bfloat16), TRAINED[trained]), **fast)
    assert policy.layers == ("plain" if fast.get("layer") is False else "fused"), policy.notes
    return policy


def distance(ours, theirs):
    """|ours - theirs| / |theirs| over all tensors together."""
    assert set(ours) == set(theirs)
    gap = sum(float((ours[n] - theirs[n]).double().square().sum()) for n in theirs)
    return (gap / sum(float(theirs[n].double().square().sum()) for n in theirs)) ** 0.5


@pytest.mark.parametrize("trained", ["full", "all-linear", "q+v"])
def test_bf16_is_as_near_to_fp32_as_the_plain_way_is(trained):
    batch = make_batch((60, 44, 30, 19, 50, 2), seed=4)
    fused, plain = narrow_policy(trained), narrow_policy(trained, layer=False, lora=False)
    exact = make_model("qwen2", dtype=torch.float32 if trained == "full" else torch.bfloat16).float()
    exact = adapt(exact, TRAINED[trained])
    truth = one_by_one(exact, batch)
    expected = gradients(exact, truth.mean())
    gaps = {}
    for way, policy in (("fused", fused), ("plain", plain)):
        logp = policy.score(batch).logp
        found = gradients(policy.model, logp.mean())
        off = (logp - truth).detach()
        assert {g.dtype for g in found.values()} == {torch.float32}
        gaps[way] = (float(off.abs().mean()), abs(float(off.mean())), distance(found, expected))
    assert gaps["fused"][0] < 1.5 * gaps["plain"][0] + 1e-4
    assert gaps["fused"][1] < 1.5 * gaps["plain"][1] + 2e-3
    assert gaps["fused"][2] < 1.5 * gaps["plain"][2] + 1e-4


@pytest.mark.parametrize("trained", ["full", "all-linear", "q+v"])
def test_bf16_gradients_written_in_place_are_those_autograd_gives(trained):
    policy = narrow_policy(trained)
    expected = gradients(policy.model, weighted(policy.score(BATCH).logp))
    with direct():
        weighted(policy.score(BATCH).logp).backward()
        once = {n: p.grad.clone() for n, p in policy.parameters_by_name().items() if p.grad is not None}
        weighted(policy.score(BATCH).logp).backward()
    twice = {n: p.grad for n, p in policy.parameters_by_name().items() if p.grad is not None}
    assert set(once) == set(expected)
    for name in expected:
        torch.testing.assert_close(once[name], expected[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(twice[name], 2 * expected[name], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("trained", ["full", "all-linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, True])
def test_recomputing_gives_the_same_bits(trained, dtype, count, monkeypatch):
    narrow = dtype == torch.bfloat16
    policy = narrow_policy(trained) if narrow else fused_policy(adapt(make_model("qwen2"), TRAINED[trained]))
    policy.train_mode(True)
    calls = []
    forward = fused_layer.forward
    monkeypatch.setattr(fused_layer, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    kept = policy.score(BATCH).logp
    off = gradients(policy.model, weighted(kept))
    assert len(calls) == 2
    policy.set_checkpointing(count)
    again = policy.score(BATCH).logp
    on = gradients(policy.model, weighted(again))
    assert len(calls) == 2 + 2 + (2 if count is True else 1)
    assert torch.equal(kept, again)
    assert set(on) == set(off)
    assert all(torch.equal(on[name], off[name]) for name in off)


def test_a_second_backward_pass_is_refused():
    logp = fused_policy(make_model()).score(BATCH).logp
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        logp.sum().backward()


CASES = [("full", torch.float32), ("all-linear", torch.float32), ("full", torch.bfloat16), ("all-linear", torch.bfloat16)]


@pytest.mark.parametrize(("trained", "dtype"), CASES)
@pytest.mark.parametrize("steady", [True, False])
def test_after_an_optimizer_step_the_new_weights_are_used(trained, dtype, steady):
    """Fused AdamW moves weights without raising their version."""

    def fresh():
        return narrow_policy(trained) if dtype == torch.bfloat16 else fused_policy(adapt(make_model("qwen2"), TRAINED[trained]))

    policy, other = fresh(), fresh()
    optimizer = torch.optim.AdamW(policy.parameters_by_name().values(), lr=0.05, fused=True)
    seen = [policy.score(BATCH).logp.detach()]
    for _ in range(2):
        with policy.steady() if steady else contextlib.nullcontext():
            logp = policy.score(BATCH).logp
            assert torch.equal(policy.score(BATCH).logp, logp)
            logp.mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
        other.load_state(policy.state())
        with policy.steady() if steady else contextlib.nullcontext():
            after = policy.score(BATCH).logp.detach()
        assert torch.equal(after, other.score(BATCH).logp.detach())
        assert torch.equal(after, policy.score(BATCH).logp.detach())
        assert all(float((after - old).abs().mean()) > 1e-3 for old in seen)
        seen.append(after)


def test_a_disabled_adapter_is_the_base():
    base = fused_policy(make_model("qwen2")).score(BATCH).logp.detach()
    policy = fused_policy(adapt(make_model("qwen2"), "all-linear"))
    with policy.steady():
        on = policy.score(BATCH).logp
        with policy.adapter_disabled():
            assert torch.equal(policy.score(BATCH).logp, base)
        assert torch.equal(policy.score(BATCH).logp, on)
    assert float((on - base).detach().abs().max()) > 1e-3


def test_what_a_call_leaves_for_the_next_lasts_no_longer_than_it_is_true():
    policy = fused_policy(adapt(make_model("qwen2"), "all-linear", dropout=0.5))
    with policy.steady():
        quiet = policy.score(BATCH).logp
        assert len(policy.copies.calls) == 2
        policy.train_mode(True)
        assert not torch.equal(policy.score(BATCH).logp, quiet)  # dropout is at work
        policy.train_mode(False)
        assert torch.equal(policy.score(BATCH).logp, quiet)
        with torch.no_grad():
            policy.model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.zero_()
    assert policy.copies.calls is None
    assert not torch.equal(policy.score(BATCH).logp, quiet)
    whole = fused_policy(make_model("qwen2"))
    with whole.steady():
        whole.score(BATCH).logp.sum().backward()
        resting = [whole.causal.model.layers[0].mlp.up_proj.weight]
        whole.rest(resting)
        whole.model.zero_grad()
        whole.score(BATCH).logp.sum().backward()
        assert resting[0].grad is None
        assert whole.causal.model.layers[1].mlp.up_proj.weight.grad is not None


def test_dropout_in_the_adapter_takes_the_plain_way_with_the_same_numbers():
    found = []
    for fast in ({}, {"layer": False}):
        policy = make_policy(adapt(make_model("qwen2"), "all-linear", dropout=0.5), **fast)
        policy.train_mode(True)
        torch.manual_seed(3)
        logp = policy.score(BATCH).logp
        found.append((logp, gradients(policy.model, weighted(logp))))
        policy.train_mode(False)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[1][1])
    torch.testing.assert_close(policy.score(BATCH).logp, fused_policy(adapt(make_model("qwen2"), "all-linear")).score(BATCH).logp)


def test_dropout_in_some_layers_only_mixes_both_ways_in_bf16():
    policy = narrow_policy("all-linear")
    exact = policy.score(BATCH).logp.detach()
    policy.train_mode(True)
    drop = torch.nn.Dropout(0.0)
    fuse.fused_layers(policy.model)[1].mlp.up_proj.lora_dropout["default"] = drop
    logp = policy.score(BATCH).logp
    logp.sum().backward()
    assert float((logp.detach() - exact).abs().mean()) < 0.03


@pytest.mark.parametrize("trained", ["full", "all-linear"])
def test_saving_merging_and_generating_do_not_notice(trained, tmp_path):
    plain = adapt(make_model("qwen2"), TRAINED[trained])
    policy = fused_policy(adapt(make_model("qwen2"), TRAINED[trained]))
    truth = one_by_one(plain, BATCH).detach()
    prompt = {"input_ids": torch.tensor([[0, 0, 5, 9, 17], [3, 4, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(**prompt, **settings)
    with policy.sampling() as model:
        assert torch.equal(model.generate(**prompt, **settings), expected)
    assert torch.equal(policy.model.generate(**prompt, **settings), expected)
    assert policy.model.state_dict().keys() == plain.state_dict().keys()
    policy.save(tmp_path)
    if trained == "full":
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        again = adapter.read(make_model("qwen2"), str(tmp_path), training=False)
    torch.testing.assert_close(one_by_one(again.eval(), BATCH).detach(), truth)
    copied = copy.deepcopy(policy.model)
    for parameter in policy.model.parameters():
        parameter.data.mul_(1.5)
    torch.testing.assert_close(one_by_one(copied, BATCH).detach(), truth)
    if trained != "full":
        merged = copied.merge_and_unload()
        torch.testing.assert_close(one_by_one(merged, BATCH).detach(), truth, rtol=0, atol=1e-4)


def test_merged_adapters_are_scored_as_they_are():
    policy = fused_policy(adapt(make_model("qwen2"), "all-linear"))
    truth = policy.score(BATCH).logp.detach()
    policy.model.merge_adapter()
    torch.testing.assert_close(policy.score(BATCH).logp.detach(), truth, rtol=0, atol=1e-4)
    policy.model.unmerge_adapter()
    torch.testing.assert_close(policy.score(BATCH).logp.detach(), truth, rtol=0, atol=1e-4)


def test_noise_on_the_embeddings_goes_through():
    found = []
    for fast in ({}, {"layer": False}):
        model = make_model("llama", dtype=torch.float64)
        policy = fused_policy(model, **fast)
        policy.set_neftune(5.0)
        policy.train_mode(True)
        torch.manual_seed(1)
        logp = policy.score(BATCH).logp
        found.append((logp.detach(), gradients(model, weighted(logp))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-9)
    assert largest_gap(found[0][1], found[1][1]) < 1e-9
    assert float((found[0][0] - policy.score(BATCH).logp.detach()).abs().max()) > 1e-3


def test_one_document_is_the_same_alone_and_among_others():
    policy = fused_policy(make_model(dtype=torch.float64))
    together, at = policy.score(BATCH).logp.detach(), 0
    for segment in BATCH.segments:
        a, b = segment.start, segment.stop
        alone = policy.score(Batch(BATCH.ids[a:b], BATCH.train[a:b], (Segment(0, b - a, segment.key),))).logp.detach().double()
        torch.testing.assert_close(alone, together[at : at + len(alone)], rtol=0, atol=1e-10)
        at += len(alone)
    assert at == len(together)


def test_other_families_stay_plain_without_a_note():
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 256, "_own_names": True}
    for family, changes in (("gpt2", gpt2), ("granite", {}), ("olmo2", {})):
        policy = make_policy(make_model(family, **changes))
        assert (policy.layers, policy.layout, policy.notes) == ("plain", "packed", [])


class OtherNorm(torch.nn.LayerNorm):
    """Another norm under the old name of its settings."""

    variance_epsilon = 1e-6


class Loud(LlamaRMSNorm):
    """Says one eps and works with another."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)


class Deaf(LlamaRMSNorm):
    """The right values with another gradient."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + self.variance_epsilon)


class Halved(LlamaMLP):
    """Half of what its parts say."""

    def forward(self, x):
        return super().forward(x) / 2


def replaced(name, make):
    model = make_model("llama", rms_norm_eps=1e-6)
    layer = model.model.layers[1]
    old = layer.get_submodule(name)
    new = make(old, model.config)
    new.load_state_dict(old.state_dict(), strict=False)
    setattr(layer, name, new)
    return model


TAMPERED = {
    "eps": ("input_layernorm", lambda _old, _config: Loud(32, 1e-6)),
    "gradient": ("post_attention_layernorm", lambda _old, _config: Deaf(32, 1e-6)),
    "norm": ("input_layernorm", lambda _old, _config: OtherNorm(32)),
    "mlp": ("mlp", lambda _old, config: Halved(config)),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_the_probe_refuses_layers_that_are_not_what_they_look_like(what):
    model = replaced(*TAMPERED[what])
    truth = one_by_one(model, BATCH).detach()
    policy = make_policy(model)
    assert policy.layers == "plain"
    assert [note.split(":")[0] for note in policy.notes] == ["plain decoder layers"]
    assert not fuse.fused_layers(model)
    torch.testing.assert_close(policy.score(BATCH).logp.detach(), truth, rtol=1e-5, atol=2e-5)


def test_layers_with_parts_the_function_does_not_know_are_not_tried():
    other_eps, other_linear = make_model("llama"), make_model("llama")
    other_eps.model.layers[0].input_layernorm.variance_epsilon = 1e-3
    mlp = other_linear.model.layers[0].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    other_norm = replaced("input_layernorm", lambda _old, _config: torch.nn.LayerNorm(32))
    for model in (make_model("llama", attention_dropout=0.2), make_model("llama", hidden_act="gelu"), other_eps, other_linear, other_norm):
        assert fuse.decoder_layers(model) == []
        policy = make_policy(model)
        assert (policy.layers, policy.notes) == ("plain", [])


@pytest.mark.parametrize("frozen", ["input_layernorm", "q_proj", "down_proj", "k_proj.bias"])
def test_a_frozen_part_gets_no_gradient_and_the_others_theirs(frozen):
    ours, theirs = (make_model("qwen2", dtype=torch.float64) for _ in range(2))
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
    mine = gradients(ours, weighted(fused_policy(ours).score(BATCH).logp))
    truth = gradients(theirs, weighted(one_by_one(theirs, BATCH)))
    assert set(mine) == set(truth)
    assert largest_gap(mine, truth) < 1e-9
