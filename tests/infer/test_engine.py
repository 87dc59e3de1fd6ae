"""The engine says what transformers says, with the trainer's numbers, whatever stands beside a request, and leaves nothing behind."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engines import (
    FAMILIES,
    TOKENIZER,
    Again,
    check_scored,
    engine_of,
    greedy_by_transformers,
    ids,
    ids_of,
    in_arena,
    lively,
    policy_of,
    prompts_of,
    save_lora,
    scored,
    stir,
    with_lora,
)
from tiny_models import make_model

from tunesmith.core.errors import DataError, ModelError, RecipeError
from tunesmith.core.ports import SampleSettings
from tunesmith.core.recipe import Recipe
from tunesmith.infer import engine as engine_module
from tunesmith.infer.draw import Drawn
from tunesmith.infer.engine import Engine
from tunesmith.infer.request import Request
from tunesmith.infer.sampler import TransformersSampler
from tunesmith.model import graphs
from tunesmith.model.adapter import attach
from tunesmith.model.arena import Arena
from tunesmith.model.arena_feed import ArenaTokens
from tunesmith.model.feed import NextTokens, Prompts
from tunesmith.model.reward import with_head

PROMPTS = prompts_of()
GREEDY = SampleSettings(30, 0.0)
DRAWN = SampleSettings(12, 1.0, seed=5)
NOTHING = {"active": 0, "waiting": 0, "cached": 0, "cache_bytes": 0, "fronts": 0}
PLAIN = {"layer": False}


@pytest.fixture(scope="module")
def plain() -> Engine:
    """A frozen Llama, fused."""
    return engine_of()


def run(engine: Engine, requests: list[Request]) -> list[list[tuple[int, ...]]]:
    while engine.step():
        pass
    assert all(request.done for request in requests)
    return [[one.ids for one in request.completions] for request in requests]


class Passes:
    """How many tokens go through the model in every pass; filler is not counted."""

    def __init__(self, engine: Engine) -> None:
        self.sizes: list[int] = []
        self._hook = engine.policy.decoder().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: object, _given: object, named: dict[str, Any]) -> None:
        feed = named["tunesmith_layout"]
        self.sizes.append(feed.layout.real if isinstance(feed, Prompts) else len(feed.rows))

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


# What transformers says.


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers_generate(family: str) -> None:
    prompts = PROMPTS[:5]
    truth = greedy_by_transformers(lively(family, attn_implementation="eager"), prompts, 30)
    for fast in ({}, PLAIN):
        engine = engine_of(lively(family), fast=fast, max_rows=3)
        assert (engine.policy.layers == "fused") == (family in ("llama", "qwen2", "qwen3", "mistral") and not fast)
        rows = engine.sample(prompts, GREEDY)
        assert [row[0].ids for row in rows] == truth, fast
        check_scored(engine.policy, prompts, rows)
    assert len({token for answer in truth for token in answer}) > 40, "answers that repeat themselves prove little"


# The trainer's numbers.


@pytest.mark.parametrize("fast", [{}, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_log_probs_are_the_trainers_also_after_the_weights_moved(fast: dict[str, bool], lora: bool) -> None:
    model = with_lora(lively()) if lora else lively().requires_grad_(True)
    engine = engine_of(model, fast=fast, max_rows=4)
    first = engine.sample(PROMPTS, DRAWN)
    check_scored(engine.policy, PROMPTS, first)
    assert ids(engine.sample(PROMPTS, DRAWN)) == ids(first)
    for turn in (1, 2):
        stir(model, turn, 0.05)
        moved = engine.sample(PROMPTS, DRAWN)
        check_scored(engine.policy, PROMPTS, moved)
        assert ids(moved) != ids(first)
    fresh = engine_of(model, fast=fast).sample(PROMPTS, DRAWN)
    assert ids(fresh) == ids(moved)


def test_weights_moved_as_fused_optimizers_do_without_a_new_version_are_seen() -> None:
    model = with_lora(lively())
    engine = engine_of(model)
    before = engine.sample(PROMPTS, DRAWN)
    for parameter in model.parameters():
        if parameter.requires_grad:
            version = parameter._version
            parameter.data.mul_(1.5)
            assert parameter._version == version
    after = engine.sample(PROMPTS, DRAWN)
    check_scored(engine.policy, PROMPTS, after)
    assert ids(before) != ids(after)


@pytest.mark.parametrize("fast", [{}, PLAIN], ids=["fused", "plain"])
def test_an_adapter_on_the_model_is_sampled_on_off_and_on_again(fast: dict[str, bool]) -> None:
    engine = engine_of(with_lora(lively()), fast=fast)
    base = engine_of(fast=fast).sample(PROMPTS, DRAWN)
    on = engine.sample(PROMPTS, DRAWN)
    check_scored(engine.policy, PROMPTS, on)
    with engine.policy.adapter_disabled():
        off = engine.sample(PROMPTS, DRAWN)
        check_scored(engine.policy, PROMPTS, off)
    again = engine.sample(PROMPTS, DRAWN)
    assert ids(off) == ids(base)
    assert ids(on) == ids(again) != ids(off)
    check_scored(engine.policy, PROMPTS, again)


def test_a_frozen_adapter_is_sampled_on_off_and_on_again() -> None:
    engine = engine_of(with_lora(lively()).requires_grad_(False))
    on = engine.sample(PROMPTS, DRAWN)
    check_scored(engine.policy, PROMPTS, on)
    with engine.policy.adapter_disabled():
        assert ids(engine.sample(PROMPTS, DRAWN)) == ids(engine_of().sample(PROMPTS, DRAWN))
    assert ids(engine.sample(PROMPTS, DRAWN)) == ids(on)


def adapted(name: str, **changes):
    """A policy with a stirred adapter of this kind."""
    settings = Recipe(model={"base": "x", "adapter": {"name": name}}, data={"train": "x"}).model.adapter
    assert settings is not None
    settings = settings.model_copy(update=({"rank": 8} if name in ("lora", "dora") else {}) | changes)
    policy = policy_of(attach(lively(), settings, seed=0, base="x").eval())
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters_by_name().values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    return policy


KINDS = ["lora", "dora", "vera", "ia3", "prefix", "prompt", "p_tuning", "bottleneck"]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_sampled_is_what_is_scored_under_every_adapter(name: str) -> None:
    policy = adapted(name)
    engine = Engine(policy, TOKENIZER, max_rows=4)
    on = engine.sample(PROMPTS, DRAWN)
    check_scored(policy, PROMPTS, on, 1e-4)
    twin = TransformersSampler(policy.model, TOKENIZER, stop_ids=[], attention=policy.own_attention)
    assert ids(on) == ids(twin.sample(PROMPTS, DRAWN))
    with policy.adapter_disabled():
        off = engine.sample(PROMPTS, DRAWN)
        check_scored(policy, PROMPTS, off, 1e-4)
    assert ids(on) != ids(off)
    assert ids(engine.sample(PROMPTS, DRAWN)) == ids(on)


@pytest.mark.parametrize("tokens", [8, 20])
@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_stand_in_front_of_prompts_that_are_read_in_parts(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh row beside one that is read on, and fronts that do not fit into what is left of a part."""
    policy = adapted(name, tokens=tokens)
    prompts = prompts_of((50, 30, 45, 3))
    whole = Engine(policy, TOKENIZER).sample(prompts, DRAWN)
    check_scored(policy, prompts, whole, 1e-4)
    for size in (tokens + 40, tokens + 68):
        monkeypatch.setattr(engine_module, "PROMPT_TOKENS", size)
        parts = Engine(policy, TOKENIZER).sample(prompts, DRAWN)
        check_scored(policy, prompts, parts, 1e-4)
        assert ids(parts) == ids(whole), size


# The plain twin.

TWINS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k": {"top_k": 5, "temperature": 1.3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.8},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": 2.0, "temperature": 0.0},
    "bias": {"logit_bias": {9: 4.0, 77: -50.0, 5: 3.0}},
    "three": {"n": 3},
    "stop ids": {"stop_ids": tuple(range(0, 256, 20)), "n": 2},
    "stop texts": {"stop": ("e", "A", "0", "z", "7"), "n": 2},
    "tops": {"top_logprobs": 4, "top_p": 0.9},
    "all": {
        "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2,
        "logit_bias": {12: 2.0}, "n": 3, "stop_ids": (40, 41, 42, 43), "stop": ("Q", "ab"), "temperature": 0.9, "top_logprobs": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_the_engine_is_its_plain_twin(name: str, plain: Engine) -> None:
    settings = replace(SampleSettings(14, 1.0, seed=8), **TWINS[name])
    prompts = [*PROMPTS[:5], PROMPTS[2], PROMPTS[2]]
    policy = plain.policy
    engine = Engine(policy, TOKENIZER, stop_ids=[200, 201], max_rows=5)
    ours = engine.sample(prompts, settings)
    theirs = TransformersSampler(policy.model, TOKENIZER, stop_ids=[200, 201], attention=policy.own_attention).sample(prompts, settings)
    assert ids(ours) == ids(theirs)
    for mine, other in zip((c for row in ours for c in row), (c for row in theirs for c in row), strict=True):
        assert (mine.text, mine.stop_reason) == (other.text, other.stop_reason)
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert len(mine.top_logprobs) == (len(mine.ids) if settings.top_logprobs else 0)
        for a, b in zip(mine.top_logprobs, other.top_logprobs, strict=True):
            assert [token for token, _ in a] == [token for token, _ in b]
            assert [logp for _, logp in a] == pytest.approx([logp for _, logp in b], abs=1e-5)
    if "stop" in name:
        assert {c.stop_reason for row in ours for c in row} == {"stop", "length"}, "the case must show both ends"
    assert engine.load == NOTHING


# Company.


def test_an_answer_depends_on_neither_company_nor_order_nor_rows_nor_a_tight_cache(plain: Engine) -> None:
    policy = plain.policy
    prompts = prompts_of((60, 17, 55, 1))
    settings = SampleSettings(74, 1.0, n=2, seed=4)
    rows = Engine(policy, TOKENIZER).sample(prompts, settings)
    want = ids(rows)
    assert all(row[0] != row[1] for row in want)
    assert ids(Engine(policy, TOKENIZER).sample(prompts[::-1], settings))[::-1] == want
    assert [ids(Engine(policy, TOKENIZER).sample([prompt], settings))[0] for prompt in prompts] == want
    assert ids(Engine(policy, TOKENIZER, max_rows=3).sample(prompts, settings)) == want
    for tokens in (1, 500):
        tight = Engine(policy, TOKENIZER, cache_tokens=tokens)
        back = []
        put_back = tight._put_back
        tight._put_back = lambda row, put_back=put_back, back=back: (back.append(row.number), put_back(row))  # type: ignore[method-assign]
        assert ids(tight.sample(prompts, settings)) == want
        assert back or tokens == 1, "rows must have been put back in line"
        assert tight.load == NOTHING


def test_equal_prompts_draw_their_own_and_equal_requests_agree(plain: Engine) -> None:
    prompt = PROMPTS[2]
    rows = ids(plain.sample([prompt, prompt, prompt], DRAWN))
    assert len({row[0] for row in rows}) == 3
    first, second = plain.submit(prompt, DRAWN), plain.submit(prompt, DRAWN)
    a, b = run(plain, [first, second])
    assert a == b == rows[0]
    other = plain.submit(prompt, replace(DRAWN, seed=6))
    assert run(plain, [other])[0] != a
    each = plain.sample([prompt, prompt], [DRAWN, replace(DRAWN, temperature=0.0)])
    assert each[0][0].ids == a[0]
    assert each[1][0].ids == plain.sample([prompt], replace(DRAWN, temperature=0.0))[0][0].ids
    with pytest.raises(RecipeError, match="1 settings for 2 prompts"):
        plain.sample([prompt, prompt], [DRAWN])


# What goes through the model.


def test_a_prompt_goes_through_the_model_once_however_often_it_is_answered(plain: Engine) -> None:
    prompt = prompts_of((150,), seed=9)[0]
    settings = SampleSettings(6, 1.0, n=8, seed=1)
    want = [ids(plain.sample([prompt], replace(settings, n=k)))[0][k - 1] for k in (1, 4, 8)]
    with Passes(plain) as passes:
        rows = ids(plain.sample([prompt], settings))[0]
    assert [rows[k - 1] for k in (1, 4, 8)] == want
    assert len(set(rows)) == 8
    # The one that read the prompt is a token ahead of the seven who read its last token once more.
    assert passes.sizes == [150, 8, 8, 8, 8, 8, 7]


def test_a_common_front_goes_through_the_model_once(plain: Engine) -> None:
    front, *tails = prompts_of((200, 5, 9, 20, 1), seed=2)
    prompts = [front + tail for tail in tails]
    alone = [ids(plain.sample([prompt], DRAWN))[0] for prompt in prompts]
    with Passes(plain) as passes:
        together = ids(plain.sample(prompts, DRAWN))
    assert together == alone
    first, second, *later = passes.sizes
    assert first == 205
    assert second == 9 + 20, "the other tails alone, and all of them at once (the last one's only token goes with the next ones)"
    assert later == [4] * 11 + [1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_long_prompts_are_read_in_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(lively(family))
    prompts = prompts_of((100, 33, 64, 17, 1, 90, 16))
    prompts += [prompts[0][:80] + prompts[1], prompts[0]]
    want = engine.sample(prompts, DRAWN)
    check_scored(engine.policy, prompts, want)
    for size in (40, 97):
        monkeypatch.setattr(engine_module, "PROMPT_TOKENS", size)
        with Passes(engine) as passes:
            assert ids(engine.sample(prompts, DRAWN)) == ids(want), size
        assert max(passes.sizes) <= max(size, len(prompts)), "no more than a part goes at once"


def test_bf16_and_int8_read_long_prompts_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass whose prompts are all unfinished asks for no logits: products of no rows. Parts look at 8 bits as whole prompts do."""
    for dtype, int8 in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
        engine = engine_of(lively(dtype=dtype), int8=int8)
        [[whole]] = engine.sample(prompts_of((150,)), GREEDY)
        with monkeypatch.context() as patched:
            patched.setattr(engine_module, "PROMPT_TOKENS", 32)
            [[one]] = engine.sample(prompts_of((150,)), GREEDY)
        assert len(one.ids) == 30
        assert one.logprobs[0] == pytest.approx(whole.logprobs[0], abs=0.1), "later ones may come after other tokens"


# Kept fronts.


def test_the_next_turn_reads_only_what_is_new(plain: Engine) -> None:
    engine = Engine(plain.policy, TOKENIZER, keep_fronts=2)
    prompt = prompts_of((60,))[0]
    first = engine.submit(prompt, DRAWN)
    said = run(engine, [first])[0][0]
    assert engine.load["fronts"] == 1
    assert engine.load["cached"] == 0
    turn = [*prompt, *said, *prompts_of((20,), seed=8)[0]]
    with Passes(engine) as passes:
        answer = run(engine, [engine.submit(turn, DRAWN)])
    assert passes.sizes == [21] + [1] * 11, "the last word of the answer was never read"
    assert answer == ids(Engine(plain.policy, TOKENIZER).sample([turn], DRAWN))
    for number in range(3):
        run(engine, [engine.submit(prompts_of((30,), seed=20 + number)[0], DRAWN)])
    assert engine.load["fronts"] == 2, "the oldest are dropped"
    assert run(engine, [engine.submit(prompt, DRAWN)])[0][0] == said
    engine.forget()
    assert engine.load == NOTHING


def test_fronts_are_not_kept_for_weights_that_move() -> None:
    with pytest.raises(RecipeError) as caught:
        engine_of(with_lora(lively()), keep_fronts=1)
    assert (caught.value.where, caught.value.code) == ("keep_fronts", "bad_setting")


def test_fronts_belong_to_the_adapter_and_the_weights_that_made_them(tmp_path) -> None:
    engine = engine_of(keep_fronts=8)
    folders = [save_lora(tmp_path / str(seed), seed=seed) for seed in (2, 3)]
    prompt = prompts_of((40,))[0]

    def ask(name: str | None) -> tuple[int, ...]:
        return run(engine, [engine.submit(prompt, replace(DRAWN, adapter=name))])[0][0]

    want = []
    for folder in folders:
        lone = engine_of()
        lone.adapters.load("one", folder)
        want.append(ids(lone.sample([prompt], replace(DRAWN, adapter="one")))[0][0])
    base = ask(None)
    engine.adapters.load("one", folders[0])
    assert [ask("one"), ask(None), ask("one")] == [want[0], base, want[0]]
    engine.adapters.load("one", folders[1])
    assert ask("one") == want[1]
    engine.adapters.evict("one")
    engine.adapters.load("one", folders[0])
    assert ask("one") == want[0]
    assert len({base, *want}) == 3


# At the door.

BAD = {
    "max_new_tokens": 0, "temperature": -0.1, "top_p": 0.0, "top_k": -1, "n": 0, "min_p": 1.5, "repetition_penalty": 0.0,
    "frequency_penalty": 2.5, "presence_penalty": -2.5, "stop": ("",), "top_logprobs": -1, "logit_bias": {256: 1.0},
}  # fmt: skip
WORSE = {
    "temperature": float("nan"), "top_p": float("nan"), "min_p": float("nan"), "repetition_penalty": float("inf"),
    "frequency_penalty": float("nan"), "presence_penalty": float("nan"), "top_logprobs": 5000, "logit_bias": {3: float("nan")},
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [*BAD.items(), *WORSE.items()], ids=[*BAD, *(f"{name} again" for name in WORSE)])
def test_an_impossible_setting_is_named(plain: Engine, name: str, value: object) -> None:
    for ask in (lambda s: plain.sample([[3]], s), lambda s: plain.submit([3], s), lambda s: next(plain.stream([3], s))):
        with pytest.raises(RecipeError) as caught:
            ask(SampleSettings(**{name: value}))
        assert (caught.value.where, caught.value.code) == (name, "bad_setting")
    assert plain.load == NOTHING


@pytest.mark.parametrize("bias", [float("inf"), 1e39])
def test_a_bias_that_no_probability_can_carry_is_refused(plain: Engine, bias: float) -> None:
    with pytest.raises(RecipeError):
        plain.submit([3], SampleSettings(logit_bias={3: bias}))
    plain.forget()


def test_every_bad_prompt_has_its_code(plain: Engine) -> None:
    cases = {
        "empty_prompt": [], "bad_token": [3, 256], "prompt_too_long": [3] * 256, "not_ids": "12",
    }  # fmt: skip
    for code, prompt in cases.items():
        with pytest.raises(DataError) as caught:
            plain.sample([[3, 4], prompt], SampleSettings(4))
        assert (caught.value.code, caught.value.where) == (code, "prompt 1")
        with pytest.raises(DataError) as caught:
            plain.submit(prompt, SampleSettings(4))
        assert caught.value.code == code
    assert plain.sample([torch.tensor([3, 4]), np.array([3, 4])], SampleSettings(4, 0.0))[0][0].ids
    with pytest.raises(DataError) as caught:
        plain.submit([-1], SampleSettings(4))
    assert caught.value.code == "bad_token"
    with pytest.raises(RecipeError) as unknown:
        plain.submit([3], SampleSettings(4, adapter="none"))
    assert unknown.value.code == "unknown_adapter"
    for options in ({"max_rows": 0}, {"max_rows": -1}):
        with pytest.raises(RecipeError) as setting:
            Engine(plain.policy, TOKENIZER, **options)
        assert setting.value.code == "bad_setting"
    assert plain.load == NOTHING


def test_a_prompt_that_leaves_little_room_stops_with_length(plain: Engine) -> None:
    rows = plain.sample([[3] * 253, [5, 6]], SampleSettings(16, 0.0))
    assert [(len(row[0].ids), row[0].stop_reason) for row in rows] == [(3, "length"), (16, "length")]
    check_scored(plain.policy, [[3] * 253, [5, 6]], rows)


def test_virtual_tokens_take_room(plain: Engine) -> None:
    policy = adapted("prompt")
    engine, room = Engine(policy, TOKENIZER), 256 - policy.virtual.count
    [[one]] = engine.sample([[3] * (room - 2)], SampleSettings(16, 0.0))
    assert (len(one.ids), one.stop_reason) == (2, "length")
    with pytest.raises(DataError) as caught:
        engine.submit([3] * room, SampleSettings(4))
    assert caught.value.code == "prompt_too_long"


@pytest.mark.parametrize("name", ["max_rows", "cache_tokens"])
def test_an_engine_without_room_is_refused(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(RecipeError) as caught:
            engine_of(**{name: value})
        assert (caught.value.code, caught.value.where) == ("bad_setting", name)


def test_models_that_it_cannot_run_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        engine_of(make_model("falcon"))
    assert caught.value.code == "no_engine"
    with pytest.raises(ModelError) as scalar:
        engine_of(with_head(make_model(), 0))
    assert scalar.value.code == "no_language_head"


# Cancelling.


def test_cancelled_requests_keep_what_they_have(plain: Engine) -> None:
    engine = Engine(plain.policy, TOKENIZER, max_rows=2)
    whole = run(engine, [engine.submit(PROMPTS[0], SampleSettings(20, 1.0, seed=1))])[0][0]
    running, waiting = engine.submit(PROMPTS[0], SampleSettings(20, 1.0, seed=1)), engine.submit(PROMPTS[1], SampleSettings(20, n=3))
    for _ in range(5):
        assert engine.step()
    assert engine.load["active"] == 2
    assert engine.load["waiting"] == 2
    engine.cancel(running)
    engine.cancel(waiting)
    assert running.done
    assert waiting.done
    [one] = running.completions
    assert (one.ids, one.stop_reason, len(one.logprobs)) == (whole[:6], "cancelled", 6), "two at the first step, then one"
    assert [(c.stop_reason, len(c.ids)) for c in waiting.completions] == [("cancelled", 5), ("cancelled", 0), ("cancelled", 0)]
    assert not engine.step()
    assert engine.load | {"cache_bytes": 0} == NOTHING
    pieces = list(running.pieces)
    assert "".join(piece.text for piece in pieces) == one.text
    assert tuple(token for piece in pieces for token in piece.ids) == one.ids
    assert [piece.done for piece in pieces if piece.done] == [one]
    engine.cancel(running)
    assert len(running.pieces) == len(pieces), "a second time changes nothing"


def test_leaving_a_stream_early_cancels_the_rest(plain: Engine) -> None:
    other = plain.submit(PROMPTS[1], DRAWN)
    stream = plain.stream(PROMPTS[0], SampleSettings(30, 0.0))
    got = [next(stream) for _ in range(3)]
    assert plain.load["active"] == 2
    stream.close()
    assert plain.load["active"] == 1
    assert tuple(token for piece in got for token in piece.ids) == plain_ids(plain, PROMPTS[0], 30)[: sum(len(p.ids) for p in got)]
    assert run(plain, [other])[0] == ids(Engine(plain.policy, TOKENIZER).sample([PROMPTS[1]], DRAWN))[0]


def plain_ids(engine: Engine, prompt: list[int], count: int) -> tuple[int, ...]:
    return Engine(engine.policy, TOKENIZER).sample([prompt], SampleSettings(count, 0.0))[0][0].ids


def test_a_row_that_was_put_back_can_be_cancelled(plain: Engine) -> None:
    engine = Engine(plain.policy, TOKENIZER, cache_tokens=300)
    requests = [engine.submit(prompt, SampleSettings(80, 1.0)) for prompt in prompts_of((50, 51, 52))]
    while not engine._waiting[0].answer:
        assert engine.step()
    put, had = engine._waiting[0].request, engine._waiting[0].answer
    engine.cancel(put)
    assert put.completions[0].ids == tuple(had)
    run(engine, [r for r in requests if r is not put])


# Streaming.


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Let the model say these bytes, one token each."""

    def begin(words: str | bytes) -> None:
        script = ids_of(words)

        def drawn(logits: torch.Tensor, rows: list[object], numbers: list[float]) -> Drawn:
            tokens = [script[row.counts.total()] for row in rows]
            return Drawn(tokens, [-1.0] * len(rows), [()] * len(rows))

        monkeypatch.setattr(engine_module, "draw", drawn)

    return begin


WORDS = [
    ("plain words", (), "plain words"),
    ("stop at the END of it", ("END",), "stop at the "),
    ("almost EN, then E, EEN and END", ("END",), "almost EN, then E, EEN and "),
    ("aaaaab and more", ("aab",), "aaa"),
    ("two stops: second first", ("first", "second"), "two stops: "),
    ("héllo wörld, 日本語 and 🎉🎉!", (), "héllo wörld, 日本語 and 🎉🎉!"),
    ("日本語🎉ß後", ("🎉ß",), "日本語"),
    (b"broken \xe2\x82 and \xff\xff bytes\xe6\x97", (), "broken \ufffd and \ufffd\ufffd bytes\ufffd"),
    ("END at once", ("END",), ""),
    ("a long answer that goes over several windows of text, 日本 and so on, until the very END of it", ("END",), None),
]


@pytest.mark.parametrize(("words", "stops", "want"), WORDS, ids=[str(n) for n in range(len(WORDS))])
@pytest.mark.parametrize("lead", ["", " ", "\n\n"])
def test_pieces_are_certain_and_add_up(say, plain: Engine, words: str | bytes, stops: tuple[str, ...], want: str | None, lead: str) -> None:
    raw = words.encode() if isinstance(words, str) else words
    say(lead.encode() + raw)
    want = raw.decode().partition("END")[0] if want is None else want
    engine = Engine(plain.policy, TOKENIZER, lead=lead)
    settings = SampleSettings(len(lead) + len(raw), 1.0, stop=stops)
    pieces = list(engine.stream([70, 71], settings))
    done = pieces[-1].done
    assert "".join(piece.text for piece in pieces) == done.text == want
    assert [piece.done for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert tuple(token for piece in pieces for token in piece.ids) == done.ids
    assert tuple(logp for piece in pieces for logp in piece.logprobs) == done.logprobs
    said = ""
    for piece in pieces:
        said += piece.text
        assert want.startswith(said), "nothing is taken back"
        if not isinstance(words, bytes):
            assert "\ufffd" not in piece.text
    [[whole]] = engine.sample([[70, 71]], settings)
    assert (whole.text, whole.ids, whole.stop_reason) == (done.text, done.ids, done.stop_reason)
    assert done.stop_reason == ("stop" if stops else "length")


def test_text_comes_as_soon_as_it_is_certain(say, plain: Engine) -> None:
    say("abcENx")
    texts = [piece.text for piece in plain.stream([70], SampleSettings(6, 1.0, stop=("END",)))]
    assert texts == ["a", "b", "c", "", "", "ENx"]


def test_a_stop_token_is_in_the_ids_and_not_in_the_text(say, plain: Engine) -> None:
    say("ab;cd")
    engine = Engine(plain.policy, TOKENIZER, stop_ids=ids_of(";"))
    for settings in (SampleSettings(5), SampleSettings(5, stop=("zz",))):
        [[one]] = engine.sample([[70]], settings)
        assert (one.text, one.ids, one.stop_reason) == ("ab", tuple(ids_of("ab;")), "stop")
    assert "".join(piece.text for piece in engine.stream([70], SampleSettings(5))) == "ab"


def test_streamed_answers_of_a_model_that_babbles_bytes_add_up(plain: Engine) -> None:
    requests = [plain.submit(prompt, SampleSettings(40, 1.5, n=2, seed=2, stop=("e", "th"))) for prompt in PROMPTS]
    run(plain, requests)
    for request, row in zip(requests, plain.sample(PROMPTS, SampleSettings(40, 1.5, n=2, seed=2, stop=("e", "th"))), strict=True):
        for index, (one, other) in enumerate(zip(request.completions, row, strict=True)):
            mine = [piece for piece in request.pieces if piece.index == index]
            assert "".join(piece.text for piece in mine) == one.text == other.text
            assert tuple(token for piece in mine for token in piece.ids) == one.ids == other.ids
            assert [piece.done for piece in mine][-1] is one


def test_a_row_whose_numbers_overflow_spoils_no_other(tmp_path, plain: Engine) -> None:
    """Not a number in a slot stays there after its row has ended: the next row of that slot must not read it."""
    engine = Engine(plain.policy, TOKENIZER)
    engine.adapters.load("loud", save_lora(tmp_path / "loud", size=1e30))
    long = engine.submit(PROMPTS[0], replace(DRAWN, max_new_tokens=40))
    loud = [engine.submit(prompt, replace(DRAWN, max_new_tokens=3, adapter="loud")) for prompt in PROMPTS[1:5]]
    while not all(request.done for request in loud):
        engine.step()
    later = [engine.submit(prompt, DRAWN) for prompt in PROMPTS[1:5]]
    got = run(engine, [long, *later])
    assert got == ids(Engine(plain.policy, TOKENIZER).sample(PROMPTS[:1], replace(DRAWN, max_new_tokens=40))) + ids(
        Engine(plain.policy, TOKENIZER).sample(PROMPTS[1:5], DRAWN)
    )


# A long day.


def random_request(rng: np.random.Generator) -> tuple[list[int], SampleSettings]:
    low = int(rng.integers(1, 30))
    common = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28] if rng.random() < 0.3 else []
    settings = SampleSettings(
        max_new_tokens=int(rng.integers(1, 7 if rng.random() < 0.95 else 60)),
        temperature=float(rng.choice([0.0, 0.7, 1.0])),
        top_p=float(rng.choice([1.0, 0.9])),
        top_k=int(rng.choice([0, 0, 20])),
        n=int(rng.integers(1, 4)) if rng.random() < 0.3 else 1,
        seed=int(rng.integers(1000)),
        repetition_penalty=float(rng.choice([1.0, 1.0, 1.3])),
        stop=("e",) if rng.random() < 0.1 else (),
        stop_ids=(50, 60, 70) if rng.random() < 0.3 else (),
        top_logprobs=int(rng.choice([0, 0, 2])),
        adapter=[None, None, "one", "two"][int(rng.integers(4))],
    )
    return [*common, *rng.integers(3, 256, low).tolist()], settings


def held(engine: Engine) -> dict[str, int]:
    """The sizes of everything that could grow with the number of requests."""
    policy, cache, many = engine.policy, engine._cache, engine.adapters
    return {
        "active": len(engine._active), "waiting": len(engine._waiting), "at": len(cache._at),
        "pools": 0 if isinstance(cache, Arena) else len(cache.pools),
        "used": len(many._used), "places": len(many._places), "stacks": len(many._stacks), "copies": len(policy.copies._made),
        "hooks": sum(len(module._forward_hooks) for module in policy.causal.modules()),
    }  # fmt: skip


@pytest.mark.parametrize("arena", [False, True], ids=["slots", "arena"])
def test_two_thousand_requests_leave_nothing_behind(arena: bool, tmp_path, plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, again = np.random.default_rng(0), Again()
    monkeypatch.setattr(graphs, "CudaRecorder", lambda: again)
    engine = (in_arena if arena else functools.partial(Engine, tokenizer=TOKENIZER))(
        plain.policy, stop_ids=[33], max_rows=64, cache_tokens=4500
    )
    for number, name in enumerate(("one", "two")):
        engine.adapters.load(name, save_lora(tmp_path / name, seed=number + 5, r=2 + 2 * number))
    wrong: list[tuple[list[int], SampleSettings]] = [
        ([], SampleSettings()), ([3, 999], SampleSettings()), ([3] * 300, SampleSettings()), ([3], SampleSettings(top_p=0)),
        ([3], SampleSettings(adapter="three")),
    ]  # fmt: skip
    kept: list[tuple[list[int], SampleSettings, Request]] = []
    open_requests: list[Request] = []
    refused = cancelled = asked = broken = 0
    sizes: list[tuple[dict[str, int], int, int]] = []
    # A hundredth of the answers turn to what is no number after a few tokens.
    logits = engine._next.logits

    def spoiled(feed: Any, rows: torch.Tensor) -> torch.Tensor:
        out = logits(feed, rows)
        if isinstance(feed, (NextTokens, ArenaTokens)):
            for place, number in enumerate(feed.rows):
                if number % 100 == 7 and len(engine._active[number].logprobs) == 3:
                    out[place] = float("nan")
        return out

    monkeypatch.setattr(engine._next, "logits", spoiled)
    while asked < 2000:
        for _ in range(min(int(rng.poisson(24)), 2000 - asked)):
            asked += 1
            if rng.random() < 0.03:
                with pytest.raises((DataError, RecipeError)):
                    engine.submit(*wrong[int(rng.integers(len(wrong)))])
                refused += 1
                continue
            prompt, settings = random_request(rng)
            request = engine.submit(prompt, settings)
            open_requests.append(request)
            if len(kept) < 60 and rng.random() < 0.1:
                kept.append((prompt, settings, request))
        for _ in range(int(rng.integers(2, 5))):
            engine.step()
            for place in rng.integers(len(open_requests), size=2).tolist() if open_requests else ():
                if not open_requests[place].done:
                    engine.cancel(open_requests[place])
                    cancelled += 1
        broken += sum(request.error is not None for request in open_requests if request.done)
        open_requests = [request for request in open_requests if not request.done]
        if (asked >= 1000 and not sizes) or asked == 2000:
            while engine.step():
                assert sorted(engine._active) == sorted(engine._cache._at)
                assert engine.load["cached"] <= 4500
            assert all(request.done for request in open_requests)
            open_requests = []
            assert engine.load | {"cache_bytes": 0} == NOTHING
            gc.collect()
            own = ("Request", "Row", "Growing", "Asked", "Pool", "Feed", "Prompts", "NextTokens", "ArenaTokens", "Mix", "Layout")
            objects = sum(type(o).__name__ in own and str(type(o).__module__).startswith("tunesmith") for o in gc.get_objects())
            sizes.append((held(engine), objects - len(kept), psutil.Process().memory_info().rss))
    assert refused > 30
    assert cancelled > 150
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] <= sizes[0][1] + 60
    assert broken >= 5
    assert not arena or again.runs > 100
    assert sizes[1][2] <= sizes[0][2] + 32 * 2**20, "the second thousand found all memory that it needed"
    engine.forget()
    assert engine.load == NOTHING
    whole = [(p, s, r) for p, s, r in kept if all(c.stop_reason != "cancelled" for c in r.completions)][:20]
    assert len(whole) == 20
    alone = Engine(plain.policy, TOKENIZER, stop_ids=[33])
    alone.adapters.load("one", engine.adapters._known["one"].folder)
    alone.adapters.load("two", engine.adapters._known["two"].folder)
    for prompt, settings, request in whole:
        [row] = alone.sample([prompt], settings)
        assert [c.ids for c in row] == [c.ids for c in request.completions]
        assert [c.text for c in row] == [c.text for c in request.completions]
        for a, b in zip(row, request.completions, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert scored(plain.policy, whole[0][0], whole[0][2].completions[0].ids) is not None
