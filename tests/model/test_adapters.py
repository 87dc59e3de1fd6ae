"""The laws of adapters, over every kind: fresh and disabled are the base, every layout gives the same, what is saved PEFT reads."""

import pytest
import torch
from peft import PeftModel
from tiny_models import make_batch, make_model, make_policy, one_by_one

from tunesmith.core import adapters, recipe
from tunesmith.core.errors import ModelError, RecipeError
from tunesmith.core.load import build
from tunesmith.model import adapter
from tunesmith.model.build import try_on
from tunesmith.model.freeze import freeze
from tunesmith.model.lora import factors

BATCH = make_batch()
KINDS = {
    "lora": adapters.Lora(rank=4),
    "ranks": adapters.Lora(rank=4, rank_stabilised=True, ranks={"down_proj": 2, "v_proj": 3}),
    "freeze_a": adapters.Lora(rank=4, freeze_a=True),
    "pissa": adapters.Lora(rank=4, init="pissa", ranks={"down_proj": 2}),
    "olora": adapters.Lora(rank=4, init="olora", rank_stabilised=True),
    "modules": adapters.Lora(rank=4, targets=["q_proj"], modules_to_save=["input_layernorm"]),
    "dora": adapters.Dora(rank=4),
    "vera": adapters.Vera(rank=8),
    "ia3": adapters.Ia3(),
    "prefix": adapters.Prefix(tokens=3),
    "projected": adapters.Prefix(tokens=3, projection=True, width=8),
    "prompt": adapters.Prompt(tokens=3),
    "p_tuning": adapters.PTuning(tokens=3, width=8),
    "lstm": adapters.PTuning(tokens=3, width=8, encoder="lstm"),
}
VIRTUAL = ("prefix", "projected", "prompt", "p_tuning", "lstm")


def adapted(kind: str, family: str = "llama", dtype: torch.dtype = torch.float32, moved: bool = False, **fast: bool):
    policy = make_policy(adapter.attach(make_model(family, dtype=dtype), KINDS[kind], seed=0, base="nowhere").eval(), **fast)
    if moved:
        with torch.no_grad():
            for number, parameter in enumerate(policy.parameters_by_name().values()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    return policy


def far(one, two) -> float:
    return float((one - two).detach().abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_and_a_disabled_adapter_are_the_base_and_frozen_stays_frozen(kind):
    base = make_policy(make_model()).score(BATCH).logp
    fresh = adapted(kind)
    trained = set(fresh.parameters_by_name())
    if kind not in VIRTUAL:  # what is put in front of a row is always heard
        assert far(fresh.score(BATCH).logp, base) < 1e-5
    policy = adapted(kind, moved=True)
    assert far(policy.score(BATCH).logp, base) > 1e-2
    with policy.adapter_disabled():
        assert far(policy.score(BATCH).logp, base) < 1e-5
    assert set(policy.parameters_by_name()) == trained
    assert all("base_layer" not in name and ".start." not in name for name in trained)
    assert kind != "freeze_a" or not any("lora_A" in name for name in trained)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm"])
def test_packed_and_padded_fast_and_plain_give_the_same_numbers_and_gradients(kind, family):
    fast = adapted(kind, family, moved=True)
    assert fast.layout == "packed"
    values = fast.score(BATCH).logp
    weights = torch.linspace(-1, 1, len(values))
    slopes = torch.autograd.grad((values * weights).sum(), list(fast.parameters_by_name().values()))
    off = {"head": False, "lora": False, "layer": False}
    plain = adapted(kind, family, moved=True, **({} if "pre" in kind or kind == "projected" else {"packed": False}), **off)
    told = plain.score(BATCH).logp
    expected = torch.autograd.grad((told * weights).sum(), list(plain.parameters_by_name().values()))
    assert far(values, told) < 2e-5
    assert all(far(a, b) <= 1e-4 * max(1.0, float(b.abs().max())) for a, b in zip(slopes, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_peft_reads_and_we_do(kind, tmp_path):
    policy = adapted(kind, moved=True)
    policy.save(tmp_path)
    values = policy.score(BATCH).logp
    plain = PeftModel.from_pretrained(make_model(), str(tmp_path)).eval()
    told = one_by_one(plain, BATCH) if kind not in VIRTUAL else behind_virtual_tokens(plain)
    assert far(values, told) < 2e-5
    again = make_policy(adapter.read(make_model(), str(tmp_path), training=False).eval())
    assert far(values, again.score(BATCH).logp) < 2e-5


def behind_virtual_tokens(model):
    """Log-probabilities by PEFT's own forward; what stands for the virtual tokens comes first or not at all."""
    out = []
    for segment in BATCH.segments:
        ids = torch.tensor(BATCH.ids[segment.start : segment.stop].astype("int64"))[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] : -1]
        logp = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        out.append(logp[torch.tensor(BATCH.train[segment.start + 1 : segment.stop] != 0)])
    return torch.cat(out)


@pytest.mark.parametrize("kind", ["dora", "vera", "ia3", "prefix", "prompt"])
def test_on_a_bf16_base_the_adapter_stays_fp32_and_scores_stay_near(kind):
    policy = adapted(kind, dtype=torch.bfloat16, moved=True)
    assert {p.dtype for p in policy.parameters_by_name().values()} == {torch.float32}
    gap = (policy.score(BATCH).logp - adapted(kind, moved=True).score(BATCH).logp).abs()
    assert float(gap.mean()) < 0.1


@pytest.mark.parametrize("kind", ["prefix", "prompt", "ia3", "pissa"])
def test_recomputed_activations_give_the_same_gradient(kind):
    slopes = []
    for count in (0, True):
        policy = adapted(kind, moved=True)
        policy.train_mode(True)
        policy.set_checkpointing(count)
        slopes.append(torch.autograd.grad(policy.score(BATCH).logp.sum(), list(policy.parameters_by_name().values())))
    assert all(far(a, b) <= 1e-5 * max(1.0, float(b.abs().max())) for a, b in zip(*slopes, strict=True))


def test_pissa_begins_at_the_principal_singular_vectors():
    policy = adapted("pissa")
    layer = next(m for name, m in policy.model.named_modules() if name.endswith("q_proj") and hasattr(m, "lora_A"))
    u, s, v = torch.linalg.svd(layer.base_layer.weight.detach())
    nearest = u[:, :4] * s[:4] @ v[:4]
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert far(product, nearest) < 1e-3 * float(nearest.abs().max())
    both = factors(layer)
    assert far(both.b @ both.a, torch.zeros(())) < 1e-5


def test_virtual_tokens_are_shared_by_the_rows_of_a_group():
    from tunesmith.model.probe import grouped_batch, settle_front

    policy = adapted("prompt", moved=True)
    batch = grouped_batch(policy.causal, policy.vocabulary)
    apart = policy.score(batch).logp
    settle_front(policy)
    assert policy.sharing is not None
    assert far(policy.score(batch).logp, apart) < 2e-5


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (adapters.Lora(rank=33), "rank_too_large", "rank 33 is larger than the layer"),
        (adapters.Lora(ranks={"q_pro": 4}), "no_target", "did you mean 'q_proj'"),
        (adapters.Dora(targets=["nothing"]), "no_target", "this model has: down_proj"),
        (adapters.Vera(targets=["q_prj"]), "no_target", "did you mean 'q_proj'"),
        (adapters.Lora(targets=["q_proj", "input_layernorm"]), "no_target", "is of class LlamaRMSNorm.* linear layers and embeddings"),
        (adapters.Dora(targets=["mlp"]), "no_target", "e.g. down_proj, gate_proj, up_proj$"),
        (adapters.Vera(targets=["embed_tokens"]), "no_target", "'embed_tokens' is of class Embedding"),
        (adapters.Ia3(targets=["self_attn"]), "no_target", "e.g. k_proj, o_proj, q_proj, v_proj$"),
        (adapters.Ia3(targets=["k_proj"], feedforward=["down_proj"]), "no_target", "is not one of the targets"),
        (adapters.Lora(rank=4, modules_to_save=["lm_head"]), "no_module", "the output head"),
        (adapters.Lora(rank=4, modules_to_save=["input_layernrm"]), "no_target", "did you mean 'input_layernorm'"),
        (adapters.Lora(rank=4, init="loftq"), "not_quantised", "not quantised"),
    ],
)
def test_what_cannot_be_is_refused_with_what_there_is(settings, code, words):
    with pytest.raises(RecipeError, match=words) as caught:
        adapter.attach(make_model(), settings, seed=0, base="nowhere")
    assert caught.value.code == code


@pytest.mark.parametrize("target", ["input_layernorm", "mlp"])
def test_a_target_that_is_no_layer_is_found_by_the_shapes_alone(target):
    with pytest.raises(RecipeError, match=f"'{target}' is of class") as caught:
        try_on(recipe.Model(base="pocket", adapter=adapters.Lora(targets=[target])))
    assert (caught.value.code, caught.value.where) == ("no_target", "model.adapter.targets")


def test_embeddings_and_heads_may_be_named():
    for target in ("embed_tokens", "lm_head"):
        try_on(recipe.Model(base="pocket", adapter=adapters.Lora(targets=[target])))
        wrapped = adapter.attach(make_model(), adapters.Lora(rank=4, targets=[target]), seed=0, base="nowhere")
        assert all(target in name for name, p in wrapped.named_parameters() if p.requires_grad)


def test_a_prefix_needs_the_packed_layout():
    with pytest.raises(RecipeError, match="a prefix needs attention") as caught:
        adapted("prefix", packed=False)
    assert caught.value.code == "no_prefix"


def test_a_start_of_another_kind_is_refused(tmp_path):
    adapted("ia3").save(tmp_path)
    model = adapter.read(make_model(), str(tmp_path), training=True)
    adapter.check_same(model, adapters.Ia3(), "here")
    with pytest.raises(RecipeError, match="has kind ia3, the recipe asks for lora"):
        adapter.check_same(model, adapters.Lora(), "here")


@pytest.mark.parametrize("kind", ["dora", "vera", "ia3", "prefix", "prompt"])
def test_a_saved_adapter_is_trained_on_from_where_it_was(kind, tmp_path):
    first = adapted(kind, moved=True)
    first.save(tmp_path)
    again = make_policy(adapter.read(make_model(), str(tmp_path), training=True).eval())
    assert far(first.score(BATCH).logp, again.score(BATCH).logp) < 2e-5
    sizes = [sum(p.numel() for p in policy.parameters_by_name().values()) for policy in (first, again)]
    assert sizes[0] == sizes[1] > 0
    slopes = torch.autograd.grad(again.score(BATCH).logp.sum(), list(again.parameters_by_name().values()))
    assert all(bool(slope.any()) for slope in slopes)


def test_virtual_tokens_without_their_network_are_not_trained_on(tmp_path):
    adapted("p_tuning", moved=True).save(tmp_path)
    with pytest.raises(ModelError, match="not the network that makes them") as caught:
        adapter.read(make_model(), str(tmp_path), training=True)
    assert caught.value.code == "only_result"


def test_settings_that_exclude_each_other_are_refused_before_anything_is_loaded():
    for model, optim, words in (
        ({"lisa": {"layers": 1}}, {"name": "galore"}, "model.lisa drops what galore has to keep"),
        ({"lisa": {"layers": 1}, "adapter": {}}, {}, "freeze and lisa are for training all weights"),
        ({"freeze": ["embed_tokens"], "adapter": {}}, {}, "freeze and lisa are for training all weights"),
        ({"quant": "nf4", "adapter": {}, "init": "random"}, {}, "quant goes with none of fast.float8, fast.int8, init: random"),
    ):
        with pytest.raises(RecipeError, match=words):
            build({"model": {"base": "pocket", **model}, "data": {"train": "x.jsonl"}, "optim": optim})


def test_freezing_takes_names_and_paths_and_says_what_there_is():
    model = make_model()
    freeze(model, ["embed_tokens", "layers.1.mlp"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.layers.0.mlp.up_proj.weight" in trained
    assert not any("embed_tokens" in name or "layers.1.mlp" in name for name in trained)
    with pytest.raises(RecipeError, match="did you mean 'embed_tokens'"):
        freeze(make_model(), ["embed_token"])
    with pytest.raises(RecipeError, match="every weight is held fixed"):
        freeze(make_model(), ["model", "lm_head"])
