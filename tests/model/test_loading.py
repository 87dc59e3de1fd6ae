import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_batch, make_model, one_by_one

from tunesmith.core import adapters, recipe
from tunesmith.core.errors import ModelError, RecipeError
from tunesmith.model import reward
from tunesmith.model.build import build_policy, load_policy, try_on
from tunesmith.model.load import check_vocabulary, choose_device, load_base
from tunesmith.model.tokenizer import load_tokenizer, resolve

BATCH = make_batch()
RANK4 = adapters.Lora(rank=4)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    make_model(tie_word_embeddings=True).save_pretrained(folder)
    return folder


def model_of(folder, **changes):
    return recipe.Model(base=str(folder), dtype="fp32", **changes)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refused(code, folder, **changes):
    with pytest.raises(ModelError) as caught:
        load_base(model_of(folder, **changes), "cpu", training=True)
    assert caught.value.code == code
    assert caught.value.remedy
    return caught.value


def test_resolve_knows_folders_runs_and_hub_ids(base, tmp_path):
    run = tmp_path / "run"
    make_model().save_pretrained(run / "final")
    assert resolve(str(base)) == str(base)
    assert resolve(str(run)) == str(run / "final")
    assert resolve("some-org/some-model") == "some-org/some-model"
    for wrong in (str(tmp_path / "bse"), "./nothing/here", str(tmp_path)):
        with pytest.raises(ModelError) as caught:
            resolve(wrong)
        assert caught.value.code == "no_model"
    with pytest.raises(ModelError, match=r"did you mean .*base"):
        resolve(str(tmp_path / "bse"))


def test_a_hub_id_that_cannot_be_reached_fails_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://nowhere.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    loads = (
        lambda: load_tokenizer("pocke"),
        lambda: load_base(recipe.Model(base="pocke"), "cpu", training=True),
        lambda: reward.head_of("pocke"),
        lambda: try_on(recipe.Model.model_validate({"base": "pocke", "adapter": {"name": "lora"}})),
    )
    for load in loads:
        with pytest.raises(ModelError, match="did you mean 'pocket'") as caught:
            load()
        assert caught.value.code == "no_model"


def test_a_tensor_with_nan_is_named(base):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    change_weights(base, spoil)
    error = refused("nan_weights", base)
    assert error.where == "model.layers.1.mlp.up_proj.weight"
    assert "1 of" in error.message


def test_infinity_is_refused_too(base):
    change_weights(base, lambda w: w["model.norm.weight"].fill_(float("-inf")))
    assert refused("nan_weights", base).where == "model.norm.weight"


def test_absent_weights_are_never_drawn_anew(base):
    change_weights(base, lambda w: w.pop("model.layers.0.mlp.up_proj.weight"))
    assert "model.layers.0.mlp.up_proj.weight" in refused("missing_weights", base).message


def test_weights_of_another_shape_are_refused(base):
    change_weights(base, lambda w: w.update({"model.norm.weight": torch.ones(7)}))
    refused("bad_weights", base)


def test_a_cut_off_file_is_refused(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused("bad_weights", base)


def test_quantised_weights_that_nobody_reads_are_refused(base):
    change_weights(base, lambda w: w.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}))
    refused("unexpected_weights", base)


def test_random_init_keeps_the_architecture_and_follows_the_seed(base):
    (base / "model.safetensors").unlink()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, same, other = (load_base(model_of(base, init="random"), "cpu", training=True, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.model.norm.weight, same.model.norm.weight)
    assert torch.equal(one.model.embed_tokens.weight, same.model.embed_tokens.weight)
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight


def test_precision_follows_what_is_trained(base):
    def kinds(adapter, training=True):
        policy = build_policy(recipe.Model(base=str(base), dtype="bf16", adapter=adapter), "cpu", seed=0, training=training)
        return {p.dtype for p in policy.causal.parameters() if p.requires_grad}, {
            p.dtype for p in policy.causal.parameters() if not p.requires_grad
        }

    assert kinds(None) == ({torch.float32}, set())
    assert kinds(RANK4) == ({torch.float32}, {torch.bfloat16})
    assert kinds(None, training=False) == (set(), {torch.bfloat16})


def test_devices():
    assert choose_device("cpu").type == "cpu"
    for wrong in ("gpu", "cuda:99"):
        with pytest.raises(ModelError) as caught:
            choose_device(wrong)
        assert caught.value.code == "no_device"


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    class Words:
        def __init__(self, highest):
            self.highest = highest

        def get_vocab(self):
            return {"a": 0, "b": self.highest}

    model = make_model()
    check_vocabulary(model, Words(255))
    with pytest.raises(ModelError) as caught:
        check_vocabulary(model, Words(256))
    assert caught.value.code == "vocabulary"


def test_a_model_without_tokenizer_says_so(base):
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(base))
    assert caught.value.code == "no_tokenizer"


def plain_scores(folder):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    with torch.no_grad():
        return one_by_one(kind.from_pretrained(folder, dtype=torch.float32).eval(), BATCH)


def train_a_little(policy):
    policy.train_mode(True)
    for _ in range(3):
        (-policy.score(BATCH).logp.mean()).backward()
        with torch.no_grad():
            for p in policy.parameters_by_name().values():
                p -= 0.5 * p.grad
                p.grad = None
    policy.train_mode(False)


@pytest.mark.parametrize("adapter", [None, RANK4])
def test_what_is_saved_loads_with_plain_libraries_and_scores_the_same(base, tmp_path, adapter):
    policy = build_policy(model_of(base, adapter=adapter), "cpu", seed=0)
    untouched = policy.score(BATCH).logp.detach()
    train_a_little(policy)
    scores = policy.score(BATCH).logp.detach()
    assert float((scores - untouched).abs().max()) > 0.1
    out = tmp_path / "run" / "final"
    policy.save(out)
    torch.testing.assert_close(plain_scores(out), scores, rtol=0, atol=2e-5)
    again = load_policy(str(tmp_path / "run"), dtype="fp32", device="cpu")
    torch.testing.assert_close(again.score(BATCH).logp, scores, rtol=0, atol=1e-6)
    assert not again.parameters_by_name()
    if adapter is not None:
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
        on_top = load_policy(str(base), adapter=str(out), dtype="fp32", device="cpu")
        torch.testing.assert_close(on_top.score(BATCH).logp, scores, rtol=0, atol=1e-6)
    else:
        assert "tunesmith" not in (out / "config.json").read_text()


def test_ties_survive_in_both_precisions(base, tmp_path):
    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        policy = build_policy(recipe.Model(base=str(base), dtype=dtype), "cpu", seed=0)
        train_a_little(policy)
        out = tmp_path / dtype
        policy.save(out)
        weights = load_file(out / "model.safetensors")
        assert "lm_head.weight" not in weights
        assert {w.dtype for w in weights.values()} == {torch_dtype}
        assert json.loads((out / "config.json").read_text())["dtype"] == str(torch_dtype).removeprefix("torch.")
        torch.testing.assert_close(weights["model.norm.weight"].float(), policy.causal.model.norm.weight.detach(), rtol=1e-2, atol=0)


def test_experts_are_saved_as_transformers_reads_them(tmp_path):
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    make_model("mixtral", **moe).save_pretrained(tmp_path / "moe")
    for dtype in ("fp32", "bf16"):
        policy = build_policy(recipe.Model(base=str(tmp_path / "moe"), dtype=dtype), "cpu", seed=0)
        policy.save(tmp_path / dtype)
        gap = (plain_scores(tmp_path / dtype) - policy.score(BATCH).logp.detach()).abs().mean()
        assert float(gap) < (1e-5 if dtype == "fp32" else 0.05)
    adapted = build_policy(model_of(tmp_path / "moe", adapter=RANK4), "cpu", seed=0)
    assert any("get no adapter" in note for note in adapted.notes)


@pytest.mark.parametrize("adapter", [None, RANK4])
def test_state_comes_back_bit_for_bit(base, adapter):
    policy = build_policy(model_of(base, adapter=adapter), "cpu", seed=0)
    train_a_little(policy)
    state = policy.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    scores = policy.score(BATCH).logp
    train_a_little(policy)
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())  # a copy, not a window
    fresh = build_policy(model_of(base, adapter=adapter), "cpu", seed=7)
    fresh.load_state(state)
    assert torch.equal(fresh.score(BATCH).logp, scores)
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_an_adapter_as_base_goes_on_or_is_merged(base, tmp_path):
    first = build_policy(model_of(base, adapter=RANK4), "cpu", seed=0)
    train_a_little(first)
    scores = first.score(BATCH).logp.detach()
    first.save(tmp_path / "one")
    second = build_policy(model_of(tmp_path / "one", adapter=RANK4), "cpu", seed=3)
    torch.testing.assert_close(second.score(BATCH).logp.detach(), scores, rtol=0, atol=1e-6)
    train_a_little(second)
    second.save(tmp_path / "two")
    torch.testing.assert_close(plain_scores(tmp_path / "two"), second.score(BATCH).logp.detach(), rtol=0, atol=2e-5)
    merged = build_policy(model_of(tmp_path / "one"), "cpu", seed=0)
    torch.testing.assert_close(merged.score(BATCH).logp.detach(), scores, rtol=0, atol=2e-5)
    assert not merged.adapted
    with pytest.raises(RecipeError) as caught:
        build_policy(model_of(tmp_path / "one", adapter=adapters.Lora(rank=8)), "cpu", seed=0)
    assert caught.value.code == "adapter_differs"


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    build_policy(model_of(base, adapter=RANK4), "cpu", seed=0).save(tmp_path / "adapter")
    make_model(hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError) as caught:
        load_policy(str(tmp_path / "wide"), adapter=str(tmp_path / "adapter"), dtype="fp32")
    assert caught.value.code == "bad_adapter"
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_policy(str(tmp_path / "adapter"), dtype="fp32")
    assert caught.value.code == "bad_adapter"
