"""The sampler: same answers alone and in a batch, true log-probabilities, and a model left as it was found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.core.errors import DataError, RecipeError
from tunesmith.core.ports import SampleSettings
from tunesmith.core.recipe import Fast, Recipe
from tunesmith.core.types import Batch, Segment
from tunesmith.infer.draw import Asked, draw
from tunesmith.infer.sampler import TransformersSampler, _requests, generating
from tunesmith.model.adapter import attach
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle

STOP = 7
PROMPTS = [[3, 4, 5, 6, 8, 9, 10, 11], [12, 13], [14, 15, 16], [17], [3, 4, 5, 6, 8]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(ByteLevel.alphabet())
    inner = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), Bytes()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def tiny(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.6, eos_token_id=STOP, bos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=64, initializer_range=0.4, eos_token_id=None, bos_token_id=None, **shape)
    return LlamaForCausalLM(config).eval()


def plain_logp(model: torch.nn.Module, prompt: list[int], ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0].float()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.5])
def test_batched_equals_one_by_one_and_log_probs_are_the_models_own(
    tokenizer: PreTrainedTokenizerFast, kind: str, temperature: float
) -> None:
    model = tiny(kind)
    stops = list(range(0, 256, 16))
    settings = SampleSettings(
        max_new_tokens=20, temperature=temperature, top_k=50 if temperature > 1 else 0, top_p=0.9 if temperature > 1 else 1.0
    )
    together = TransformersSampler(model, tokenizer, stop_ids=stops).sample(PROMPTS, settings)
    alone = TransformersSampler(model, tokenizer, stop_ids=stops, batch_tokens=1).sample(PROMPTS, settings)
    assert {row[0].stop_reason for row in together} == {"stop", "length"}, "the case must show both ends"
    for prompt, (ours,), (single,) in zip(PROMPTS, together, alone, strict=True):
        assert ours.ids == single.ids
        assert len(ours.logprobs) == len(ours.ids)
        assert (ours.ids[-1] in stops) == (ours.stop_reason == "stop")
        assert not set(ours.ids[:-1]) & set(stops)
        torch.testing.assert_close(torch.tensor(ours.logprobs), plain_logp(model, prompt, ours.ids), atol=2e-5, rtol=0)


def test_a_draw_depends_on_seed_and_number_but_not_on_company_or_order(tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = TransformersSampler(tiny(), tokenizer, stop_ids=[STOP])
    settings = SampleSettings(max_new_tokens=8, n=3, seed=5)
    rows = sampler.sample(PROMPTS, settings)
    turned = sampler.sample(PROMPTS[::-1], settings)[::-1]
    assert [[c.ids for c in row] for row in rows] == [[c.ids for c in row] for row in turned]
    assert len({c.ids for c in rows[0]}) == 3, "the n completions differ"
    twice = sampler.sample([PROMPTS[0], PROMPTS[0]], SampleSettings(max_new_tokens=8, seed=5))
    assert twice[0][0].ids != twice[1][0].ids, "equal prompts draw their own"
    assert sampler.sample(PROMPTS, SampleSettings(max_new_tokens=8, n=3, seed=6)) != rows


def test_the_model_is_left_as_it_was_found(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny()
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.generation_config.repetition_penalty = 3.0
    before = [module.training for module in model.modules()]
    TransformersSampler(model, tokenizer, stop_ids=[STOP]).sample([[3]], SampleSettings(max_new_tokens=2))
    with pytest.raises(KeyError, match="any failure inside"):
        _fail_while_generating(model)
    assert [module.training for module in model.modules()] == before
    assert model.config.use_cache is False
    assert model.generation_config.repetition_penalty == 3.0
    assert model.config._attn_implementation == "sdpa"


def _fail_while_generating(model: torch.nn.Module) -> None:
    with generating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError("any failure inside")


def test_nothing_of_the_models_generation_config_leaks_in(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny()
    want = TransformersSampler(model, tokenizer, stop_ids=[STOP]).sample(PROMPTS, SampleSettings(max_new_tokens=12, temperature=0))
    defaults = model.generation_config
    defaults.repetition_penalty, defaults.min_new_tokens, defaults.do_sample, defaults.temperature = 5.0, 12, True, 0.1
    got = TransformersSampler(model, tokenizer, stop_ids=[STOP]).sample(PROMPTS, SampleSettings(max_new_tokens=12, temperature=0))
    assert got == want


def test_the_context_limit_gives_each_row_the_room_it_has(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("gpt2")
    long = [3] * 60
    rows = TransformersSampler(model, tokenizer, stop_ids=[]).sample([long, [5, 6]], SampleSettings(max_new_tokens=16, temperature=0))
    assert [len(row[0].ids) for row in rows] == [4, 16]
    assert {row[0].stop_reason for row in rows} == {"length"}
    with pytest.raises(DataError, match="context 64"):
        TransformersSampler(model, tokenizer, stop_ids=[]).sample([[3] * 64], SampleSettings(max_new_tokens=1))


def test_what_the_template_writes_before_an_answer_is_left_out_of_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model, settings = tiny(), SampleSettings(max_new_tokens=6, temperature=0)
    [[whole]] = TransformersSampler(model, tokenizer, stop_ids=[STOP]).sample([[3]], settings)
    [[part]] = TransformersSampler(model, tokenizer, stop_ids=[STOP], lead=whole.text[:2]).sample([[3]], settings)
    assert (part.text, part.ids, part.logprobs) == (whole.text[2:], whole.ids, whole.logprobs)


def test_impossible_settings_and_empty_prompts_fail_at_the_door(tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = TransformersSampler(tiny(), tokenizer, stop_ids=[STOP])
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"n": 0}, {"max_new_tokens": 0}, {"top_k": -1}):
        with pytest.raises(RecipeError) as caught:
            sampler.sample([[3]], SampleSettings(**bad))
        assert caught.value.where == next(iter(bad))
    with pytest.raises(DataError):
        sampler.sample([[]], SampleSettings())


def pick(logits: torch.Tensor, uniform: torch.Tensor, settings: SampleSettings) -> torch.Tensor:
    return torch.tensor(draw(logits, [Asked(settings)] * len(logits), uniform.tolist()).tokens)


def test_a_draw_cuts_what_it_should_and_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    grid = (torch.arange(4000) + 0.5) / 4000
    logits = probabilities.log().expand(4000, 4)

    def shares(**settings: float) -> list[float]:
        drawn = pick(logits, grid, SampleSettings(**settings))
        return pytest.approx((torch.bincount(drawn, minlength=4) / 4000).tolist(), abs=1e-3)

    assert shares() == [0.1, 0.4, 0.2, 0.3]
    assert shares(top_k=2) == [0.0, 0.571, 0.0, 0.429]
    assert shares(top_p=0.4) == [0.0, 1.0, 0.0, 0.0], "0.4 is reached by the first token alone"
    assert shares(top_p=0.41) == [0.0, 0.571, 0.0, 0.429]
    assert shares(temperature=0.5) == [0.033, 0.533, 0.133, 0.3]
    assert shares(temperature=0) == [0.0, 1.0, 0.0, 0.0]
    ends = pick(probabilities.log().expand(2, 4), torch.tensor([0.0, 1.0]), SampleSettings(top_k=2))
    assert ends.tolist() == [1, 3]


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3", "prefix", "prompt", "p_tuning", "bottleneck"])
def test_what_is_sampled_is_what_is_scored_under_every_adapter(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The sampler's log-probabilities are the trainer's, with the adapter on and off, alone and beside longer prompts."""
    settings = Recipe(model={"base": "x", "adapter": {"name": name}}, data={"train": "x"}).model.adapter
    assert settings is not None
    policy = Policy(
        attach(tiny(), settings.model_copy(update={"rank": 8} if name in ("lora", "dora") else {}), seed=0, base="x").eval(), torch.float32
    )
    settle(policy, Fast())
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters_by_name().values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    sampler = TransformersSampler(policy.model, tokenizer, stop_ids=[STOP], attention=policy.own_attention)

    def scored(prompt: list[int], ids: tuple[int, ...]) -> torch.Tensor:
        train = np.array([0] * len(prompt) + [1] * len(ids), np.float32)
        return policy.score(Batch(np.array([*prompt, *ids], np.int32), train, (Segment(0, len(train), "row"),))).logp

    def check() -> list[tuple[int, ...]]:
        made = [row[0] for row in sampler.sample(PROMPTS, SampleSettings(6, 1.0, seed=3))]
        for prompt, one in zip(PROMPTS, made, strict=True):
            assert torch.allclose(scored(prompt, one.ids), torch.tensor(one.logprobs), atol=1e-4)
        return [one.ids for one in made]

    on = check()
    with policy.adapter_disabled():
        off = check()
    assert on != off


def test_a_text_in_place_of_ids_is_refused_by_the_plain_and_the_remote_sampler() -> None:
    with pytest.raises(DataError) as caught:
        _requests(["hello"], SampleSettings(), None)
    assert (caught.value.code, caught.value.where) == ("not_ids", "prompt 0")
