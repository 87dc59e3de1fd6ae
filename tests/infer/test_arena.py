"""Sampling as it goes on a GPU, on a CPU: keys and values in an arena, and steps that are recorded and run again.

The recorder of these tests runs the step again, which is what a CUDA graph does: the memory it reads is that of the step it recorded.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers.masking_utils
from engines import (
    FAMILIES,
    TOKENIZER,
    Again,
    check_scored,
    engine_of,
    ids,
    in_arena,
    lively,
    policy_of,
    prompts_of,
    save_lora,
    stir,
    with_lora,
)
from torch import Tensor

from tunesmith.core.errors import BugError
from tunesmith.core.ports import SampleSettings
from tunesmith.infer.engine import Engine
from tunesmith.model import arena_feed, attention, graphs
from tunesmith.model.arena import Arena, Spans
from tunesmith.model.arena_feed import ArenaTokens, usual
from tunesmith.model.cached import NARROWEST
from tunesmith.model.many_adapters import ManyAdapters
from tunesmith.model.next_token import NextToken
from tunesmith.model.policy import Policy

PROMPTS = prompts_of()
SETTINGS = [SampleSettings(30, 0.0), SampleSettings(30, 1.0, seed=3), SampleSettings(30, 0.8, top_p=0.9, n=3, repetition_penalty=1.2)]


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Again:
    """The recorder of all engines that are made in the test."""
    recorder = Again()
    monkeypatch.setattr(graphs, "CudaRecorder", lambda: recorder)
    monkeypatch.setattr(graphs, "PATIENCE", 2)
    return recorder


# ---- the arena


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("most", [None, 1000, 5000, 1 << 14])
def test_spans_never_overlap_begin_at_multiples_and_come_back_whole(most: int | None, beyond: bool) -> None:
    rng = np.random.default_rng(0)
    spans, held = Spans(most), dict[int, int]()
    for _ in range(3000):
        kind = rng.integers(3)
        if kind == 0 or not held:
            width = int(NARROWEST << rng.integers(8 if beyond else 5))
            room = spans.can_take(width)
            start = spans.take(width, beyond=beyond and not held)
            assert (start is not None) == (room or (beyond and not held))
            if start is not None:
                held[start] = width
        elif kind == 1:
            start = int(rng.choice(list(held)))
            if spans.widen(start, held[start]):
                held[start] *= 2
        else:
            start = int(rng.choice(list(held)))
            spans.give(start, held.pop(start))
        assert all(start % width == 0 for start, width in held.items())
        edges = sorted((start, start + width) for start, width in held.items())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(edges))
        assert not edges or edges[-1][1] <= spans.size
        assert most is None or beyond or spans.size <= most
    for start, width in held.items():
        spans.give(start, width)
    free = sum(width * len(starts) for width, starts in spans._free.items())
    assert free == spans.size
    for width, starts in spans._free.items():
        assert all(start % width == 0 and start ^ width not in starts for start in starts), "what was split is joined again"


def test_a_row_alone_always_fits_and_others_wait_for_room() -> None:
    arena = Arena(256)
    assert arena.fits(4000)
    arena.add(0, 4000)
    assert not arena.fits(1)
    with pytest.raises(BugError):
        arena.add(0, 5)
    arena.drop(0)
    arena.add(1, 128)
    assert arena.fits(128)
    assert not arena.fits(129)
    assert arena.held() == 128


def test_what_a_row_holds_moves_with_it() -> None:
    arena, numbers = Arena(), torch.randn(6, 200, 2, 4)
    for row in range(6):
        arena.add(row, 60)
        keys, values = arena.room(0, numbers[row], numbers[row])
        start, _ = arena.where(row)
        keys[start : start + 60], values[start : start + 60] = numbers[row][:60], -numbers[row][:60]
    assert arena.where(0)[0] != arena.nowhere
    for row in (0, 3, 5):
        assert arena.widen(row, 1000)
    arena.drop(2)
    grown = arena.grown
    for row in range(10, 40):
        arena.add(row, 100)
    assert arena.grown > grown, "keys and values moved as the arena grew"
    arena.share(20, 4, 30)
    arena.give(21, arena.take(1, 50), 40)
    for row, of, count in ((0, 0, 60), (1, 1, 60), (3, 3, 60), (4, 4, 60), (5, 5, 60), (20, 4, 30), (21, 1, 40)):
        start, _ = arena.where(row)
        torch.testing.assert_close(arena.keys[0][start : start + count], numbers[of][:count])
        torch.testing.assert_close(arena.values[0][start : start + count], -numbers[of][:count])
    start, width = arena.where(3)
    arena.drop(3, clean=True)
    assert not arena.keys[0][start : start + width].any()
    assert arena.bytes() == 2 * arena.keys[0].numel() * 4


def test_usual_numbers_of_rows_are_few_and_near() -> None:
    assert all(rows <= usual(rows) <= max(8, 4 / 3 * rows) for rows in range(1, 2000))
    assert len({usual(rows) for rows in range(1, 65)}) <= 14


def test_an_arena_that_finds_no_memory_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, numbers = Arena(), torch.randn(100, 2, 4)
    arena.add(0, 100)
    for layer in range(3):
        for held in arena.room(layer, numbers, numbers):
            held.narrow(0, arena.where(0)[0], 100).copy_(numbers)
    calls, grown = [], arena.grown

    def short(self: Tensor, *size: int) -> Tensor:
        calls.append(size)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no memory")
        return torch.zeros(size, dtype=self.dtype)

    monkeypatch.setattr(Tensor, "new_zeros", short)
    with pytest.raises(torch.OutOfMemoryError):
        arena.add(1, 5000)
    assert 1 not in arena
    arena.add(2, 100)
    assert arena.where(2)[0] + 128 <= arena.nowhere, "what is there is enough for it"
    assert arena.grown == grown + 1, "recorded steps must not read what moved"
    arena.add(1, 5000)
    for layer in range(3):
        for held in arena.room(layer, numbers, numbers):
            assert len(held) == arena.nowhere + NARROWEST
            torch.testing.assert_close(held.narrow(0, arena.where(0)[0], 100), numbers)
    calls.clear()
    calls += [()] * 2
    with pytest.raises(torch.OutOfMemoryError):
        arena.room(3, numbers, numbers)
    assert len(arena.room(3, numbers, numbers)) == 2


# ---- engines over it


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_say_what_slots_say(family: str, again: Again) -> None:
    policy = policy_of(lively(family))
    slots, arena = Engine(policy, TOKENIZER), in_arena(policy)
    for settings in SETTINGS:
        want, got = slots.sample(PROMPTS, settings), arena.sample(PROMPTS, settings)
        assert ids(got) == ids(want)
        check_scored(policy, PROMPTS, got)
    assert again.recorded >= 3
    assert again.runs > 40


def test_fused_layers_and_bf16_read_an_arena_too(again: Again) -> None:
    policy = policy_of(lively(dtype=torch.bfloat16))
    rows = in_arena(policy).sample(PROMPTS, SETTINGS[1])
    check_scored(policy, PROMPTS, rows, within=0.3)
    assert again.runs


def test_rows_that_come_grow_and_go_find_their_own_steps(again: Again) -> None:
    policy = policy_of(lively())
    slots = Engine(policy, TOKENIZER)
    arena = in_arena(policy, max_rows=7, cache_tokens=1500, keep_fronts=3)
    rng = np.random.default_rng(1)
    wanted, requests = [], []
    for number in range(40):
        prompt = prompts_of((int(rng.integers(1, 90)),), seed=number % 9)[0]
        settings = SampleSettings(int(rng.integers(2, 120)), float(rng.integers(2)), n=int(rng.integers(1, 3)), seed=number)
        wanted.append(ids(slots.sample([prompt], settings))[0])
        requests.append(arena.submit(prompt, settings))
        for _ in range(int(rng.integers(30))):
            arena.step()
    while arena.step():
        pass
    assert [[one.ids for one in request.completions] for request in requests] == wanted
    assert again.recorded > 5
    assert arena.load["cached"] == 0


def test_long_prompts_are_read_in_parts_from_an_arena(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.infer import engine as engine_module

    policy = policy_of(lively("mistral"))
    prompts = prompts_of((150, 97, 33))
    want = ids(Engine(policy, TOKENIZER).sample(prompts, SETTINGS[1]))
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS", 40)
    assert ids(in_arena(policy).sample(prompts, SETTINGS[1])) == want


def test_adapters_of_rows_are_seen_by_recorded_steps(tmp_path: Any, again: Again) -> None:
    policy = policy_of(lively(), layer=False)  # as on a GPU the layers run as modules
    slots, arena = Engine(policy, TOKENIZER), in_arena(policy)
    again.many = arena.adapters
    prompts = prompts_of((5, 6, 17, 40, 2, 23))  # all of them begin and end in the same steps

    def load(name: str, rank: int) -> None:
        folder = save_lora(tmp_path / name, seed=rank, r=rank, size=0.3)
        for engine in (slots, arena):
            engine.adapters.load(name, folder)

    def check(names: tuple[str | None, ...]) -> None:
        """All at once, without the arena being made anew."""
        settings = [SampleSettings(12, 0.0, adapter=name) for name in names]
        requests = [arena.submit(prompt, one) for prompt, one in zip(prompts, settings, strict=True)]
        while arena.step():
            pass
        want = ids(slots.sample(prompts, settings))
        assert [[one.ids for one in request.completions] for request in requests] == want, names

    load("one", 2)
    load("two", 4)
    mixed = ("one", None, "two", "two", None, "one")
    check(mixed)
    for names, more in (
        (mixed[::-1], False), ((*mixed[1:], "two"), False), (("one",) * 6, True), (("two",) * 6, True), (("one",) * 6, False),
        (("one", None, None, None, None, "one"), False), ((None,) * 6, True), (mixed, False),
    ):  # fmt: skip
        recorded, runs = again.recorded, again.runs
        check(names)
        assert (again.recorded > recorded) == more, names
        assert again.runs > runs + 6
    load("late", 8)  # a rank and a place more: the stacks lie elsewhere
    before = set(arena._next._graphs._known)
    check(("late", "one", None, "late", "two", "late"))
    check(("two", "late", "late", None, "one", "late"))
    assert before
    assert before.isdisjoint(arena._next._graphs._known), "steps that read the old ones are forgotten"


def test_an_adapter_that_comes_back_with_more_layers_is_recorded_anew(tmp_path: Any, again: Again) -> None:
    engine = in_arena(policy_of(lively(), layer=False))
    engine.adapters.load("one", save_lora(tmp_path / "narrow", target_modules=["q_proj"]))
    settings = SampleSettings(12, 0.0, adapter="one")
    for folder, targets in (("narrow", ["q_proj"]), ("wide", ["q_proj", "v_proj", "down_proj"])):
        engine.adapters.load("one", save_lora(tmp_path / folder, target_modules=targets))
        recorded = again.recorded
        engine.submit(PROMPTS[0], settings)
        while engine.step():
            pass
        assert again.recorded == recorded + 1


def test_only_some_rows_have_the_one_adapter(tmp_path: Any, again: Again) -> None:
    policy = policy_of(lively(), layer=False)
    slots, arena = Engine(policy, TOKENIZER), in_arena(policy)
    for engine in (slots, arena):
        engine.adapters.load("one", save_lora(tmp_path / "one", size=0.3))
    settings = [SampleSettings(12, 0.0, adapter=name) for name in ("one", None, None, "one")]
    assert ids(arena.sample(PROMPTS[:4], settings)) == ids(slots.sample(PROMPTS[:4], settings))
    assert again.runs


def test_weights_that_moved_are_seen_by_recorded_steps(again: Again) -> None:
    policy = policy_of(with_lora(lively()))
    arena = in_arena(policy)
    for seed in range(3):
        stir(policy.model, seed, 0.03)
        runs = again.runs
        check_scored(policy, PROMPTS, arena.sample(PROMPTS, replace(SETTINGS[1], max_new_tokens=12)))
        assert again.runs > runs
    # Step by step they may move between any two, and what is read of them may lie elsewhere.
    recorded = again.recorded
    arena.submit(PROMPTS[0], SETTINGS[0])
    while arena.step():
        assert not len(arena._next._graphs)
    assert again.recorded == recorded


def test_a_step_that_cannot_be_recorded_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    class Refuses(Again):
        def __call__(self, _step: Callable[[], Tensor], _device: torch.device) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "CudaRecorder", Refuses)
    engine = in_arena(policy_of(lively()))
    want = ids(engine_of(lively()).sample(PROMPTS, SETTINGS[1]))
    assert ids(engine.sample(PROMPTS, SETTINGS[1])) == want
    assert engine._next._graphs.off
    line = "steps of sampling are not recorded: it cannot be recorded (operation not permitted when stream is capturing)"
    assert said.count(line) == 1


@pytest.mark.parametrize("fault", [lambda out: out.mul_(1.2), lambda out: out.fill_(float("nan"))], ids=["other numbers", "none"])
def test_a_recorded_step_that_says_something_else_is_not_used(fault: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    recorder = Again(fault)
    monkeypatch.setattr(graphs, "CudaRecorder", lambda: recorder)
    engine = in_arena(policy_of(lively()))
    want = ids(engine_of(lively()).sample(PROMPTS, SETTINGS[1]))
    assert ids(engine.sample(PROMPTS, SETTINGS[1])) == want
    assert recorder.runs == 1
    assert any(line.startswith("steps of sampling are not recorded: run again it changes a row's log-probabilities by") for line in said)


def test_a_recorded_step_that_does_not_read_its_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    class Stale(Again):
        def __call__(self, step: Callable[[], Tensor], device: torch.device) -> Callable[[], Any]:
            out = step()
            kept = out.clone()
            return lambda: out.copy_(kept)

    monkeypatch.setattr(graphs, "CudaRecorder", Stale)
    engine = in_arena(policy_of(lively()))
    want = ids(engine_of(lively()).sample(PROMPTS, SETTINGS[1]))
    assert ids(engine.sample(PROMPTS, SETTINGS[1])) == want
    assert engine._next._graphs.off
    assert sum(line.startswith("steps of sampling are not recorded: run again it changes a row's") for line in said) == 1


def test_a_recording_that_finds_no_memory_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(Again):
        def __call__(self, step: Callable[[], Tensor], device: torch.device) -> Callable[[], Any]:
            if not self.recorded:
                self.recorded += 1
                raise torch.OutOfMemoryError("no memory")
            return super().__call__(step, device)

    recorder = Short()
    monkeypatch.setattr(graphs, "CudaRecorder", lambda: recorder)
    monkeypatch.setattr(graphs, "PATIENCE", 2)
    monkeypatch.setattr(graphs, "LATER", 5)
    engine = in_arena(policy_of(lively()))
    want = ids(engine_of(lively()).sample(PROMPTS, SETTINGS[1]))
    assert ids(engine.sample(PROMPTS, SETTINGS[1])) == want
    assert recorder.recorded > 1
    assert recorder.runs
    assert not engine._next._graphs.off


@pytest.mark.parametrize("at", [1, 4])
def test_no_memory_for_one_more_row_leaves_it_in_line(at: int, again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = in_arena(policy_of(lively()))
    want = ids(engine.sample(PROMPTS, SETTINGS[0]))
    add, added = Arena.add, []

    def short(self: Arena, row: int, length: int) -> None:
        added.append(row)
        if len(added) == at:
            raise torch.OutOfMemoryError("no memory")
        add(self, row, length)

    requests = [engine.submit(prompt, SETTINGS[0]) for prompt in PROMPTS]
    with monkeypatch.context() as patched:
        patched.setattr(Arena, "add", short)
        if at == 1:
            with pytest.raises(torch.OutOfMemoryError):
                engine.step()
        while engine.step():
            pass
    assert [[one.ids for one in request.completions] for request in requests] == want
    assert engine.max_rows == (64 if at == 1 else 3)


def test_weights_that_are_trained_stay_for_a_whole_list_of_prompts(again: Again) -> None:
    policy = policy_of(with_lora(lively()))
    prompts = prompts_of(tuple(range(2, 26)))
    settings = [SampleSettings(6 + number, 0.0) for number in range(len(prompts))]
    in_arena(policy, max_rows=4).sample(prompts, settings)
    assert again.recorded <= 4
    assert again.runs > 40


def test_nothing_is_recorded_where_the_environment_says_so(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_GRAPHS", "0")
    in_arena(policy_of(lively())).sample(PROMPTS, SETTINGS[0])
    assert not again.recorded


def test_recorded_steps_go_with_their_arena(again: Again) -> None:
    engine = in_arena(policy_of(lively()))
    engine.sample(PROMPTS, SETTINGS[0])
    assert len(engine._next._graphs) == 0, "they would keep the arena's memory"
    assert engine.load["cache_bytes"] == 0
    assert engine._cache.held() == 0
    assert engine._cache._spans.size == 0


def test_sums_of_a_model_that_says_nan_record_nothing(again: Again) -> None:
    model = lively()
    engine = in_arena(policy_of(model))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Exception, match="finite"):
        engine.sample(PROMPTS, SETTINGS[0])
    assert not again.recorded


# ---- on tensors without data, where a number that is read back raises


@pytest.fixture
def nothing_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device `meta`, seen as they are while a CUDA graph is recorded."""
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *_: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def without_data(family: str) -> Policy:
    model = lively(family, dtype=torch.bfloat16).to("meta")
    attention.register()
    model.set_attn_implementation(attention.NAME)
    policy = Policy(model, torch.bfloat16)
    policy.layout, policy.head = "packed", "fast"
    return policy


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma2"}))
@pytest.mark.parametrize("adapters", [False, True], ids=["base", "adapters"])
def test_a_whole_step_reads_nothing_back(family: str, adapters: bool, tmp_path: Any, nothing_read_back: None, monkeypatch: Any) -> None:
    asked: list[tuple[Any, ...]] = []
    flash = arena_feed._flash

    def noted(query: Tensor, keys: Tensor, values: Tensor, reach: arena_feed.Reach, form: attention.Form) -> Tensor:
        asked.append((query.shape[0], reach.queries, reach.keys, form.window))
        return flash(query, keys, values, reach, form)

    monkeypatch.setattr(arena_feed, "_flash", noted)
    policy = without_data(family)
    reads = NextToken(policy, spans=True)
    arena = reads.cache()
    for row in range(3):
        arena.add(row, 20)
    many = ManyAdapters(policy)
    if adapters:
        for name in ("one", "two"):
            rank = 2 if name == "one" else 4
            folder = save_lora(tmp_path / name, family=family, r=rank)
            monkeypatch.setattr(torch, "isfinite", lambda t: torch.ones(()))
            many.load(name, folder)
            many.make_active(name, set())
    with torch.no_grad():
        feed: Any = reads.prompts(arena, [(0, [1, 2, 3], 0), (1, [1, 2], 0), (2, [3], 0)])
        assert reads.logits(feed, feed.last).shape == (3, 256)
        feed = reads.tokens(arena, {0: (5, 3), 1: (4, 2), 2: (3, 1)})
        feed.mix = many.mix(feed, ["one", "two", None]) if adapters else None
        assert feed.mix is None or feed.mix.form is not None
        with many.at_work(feed.mix):
            assert reads._logits(feed, None).shape == (4, 256)
    window = FAMILIES[family].get("sliding_window", 0)
    assert asked[0][:3] == (6, 3, 3)
    assert asked[-1][:3] == (4, 1, 256)
    assert {one[3] for one in asked if one[0] == 4} <= {0, window}
    assert not window or any(one[3] == window for one in asked if one[0] == 4)


@pytest.mark.parametrize("window", [0, 3, 200])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 1, 5)], ids=["step", "prompts"])
def test_flash_attention_is_asked_for_what_the_plain_way_does(window: int, lengths: tuple[int, ...], monkeypatch: Any) -> None:
    """Against a plain function by the words of PyTorch's documentation: bottom right windows, rows by `seqused_k`, grouped heads."""

    def varlen(q, k, v, ends, starts, most_q, most_k, *, scale, seqused_k, window_size, enable_gqa) -> Tensor:
        assert enable_gqa
        assert most_q >= max(lengths)
        assert most_k >= int(seqused_k.max())
        out = torch.full_like(q, float("nan"))
        for row, used in enumerate(seqused_k.tolist()):
            a, b, start = int(ends[row]), int(ends[row + 1]), int(starts[row])
            for i in range(a, b):
                place = used - (b - i)
                low = 0 if window_size[0] < 0 else max(0, place - window_size[0])
                high = used if window_size[1] < 0 else min(used, place + window_size[1] + 1)
                for head in range(q.shape[1]):
                    keys, values = (t[start + low : start + high, head // 2] for t in (k, v))
                    out[i, head] = torch.softmax(keys @ q[i, head] * scale, 0) @ values
        return out

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    monkeypatch.setattr(torch, "float16", torch.float64)
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    starts, used = torch.tensor([64, 0, 128, 0], dtype=torch.int32), torch.tensor([9, 4, 30], dtype=torch.int32)
    reach = arena_feed.Reach(ends, starts, used, max(lengths), 30)
    query, keys, values = (
        torch.randn(n, h, 8, generator=generator, dtype=torch.float64) for n, h in ((sum(lengths), 4), (192, 2), (192, 2))
    )
    form = attention.Form(0.3, window)
    got = arena_feed._flash(query, keys, values, reach, form)
    torch.testing.assert_close(got, arena_feed._one_by_one(query, keys, values, reach, form))


def test_forms_that_flash_attention_lacks_leave_the_arena(nothing_read_back: None) -> None:
    reads = NextToken(without_data("gemma2"), spans=True)
    arena = reads.cache()
    arena.add(0, 20)
    feed = reads.prompts(arena, [(0, [1, 2, 3], 0)])
    with pytest.raises(attention.LayoutError), torch.no_grad():
        reads.logits(feed, feed.last)


def test_a_step_stands_for_another_of_its_kind() -> None:
    arena = Arena()
    for row in range(5):
        arena.add(row, 60)
    first = ArenaTokens(arena, {row: (row + 1, row) for row in range(5)}, torch.device("cpu"))
    second = ArenaTokens(arena, {row: (2 * row, 50 + row) for row in range(5)}, torch.device("cpu"))
    assert (first.size, first.longest) == (second.size, second.longest) == (8, 256)
    first.replace(second)
    for name in ("ids", "positions", "_write"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist(), name
    assert first.positions.tolist() == [50, 51, 52, 53, 54, 0, 0, 0]
    assert first._reach.used.tolist() == [51, 52, 53, 54, 55, 1, 1, 1]
    assert first._write.tolist() == [arena.where(row)[0] + 50 + row for row in range(5)] + [arena.nowhere] * 3
