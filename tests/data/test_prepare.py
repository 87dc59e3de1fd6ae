"""From a recipe to token sets: what is refused at the door, what the ledger says, and what the cache gives back."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from tunesmith.core.errors import BugError, DataError, TemplateError
from tunesmith.core.recipe import Recipe
from tunesmith.core.types import Tokens
from tunesmith.data import cache
from tunesmith.data.dataset import Builder, load_set
from tunesmith.data.ledger import Ledger, Part
from tunesmith.data.prepare import check_rows, prepare
from tunesmith.data.problem import Problem


def recipe(train, *, data=None, tokens=None, run=None, model=None):
    return Recipe(
        model={"base": "x", **(model or {})},
        data={"train": train, **(data or {})},
        tokens={"max_length": 256, **(tokens or {})},
        run=run or {},
    )


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def pairs(count, size=5):
    return [pair(f"question {n}", f"{n} " + "a" * size) for n in range(count)]


def same(one, two):
    return [(t.ids.tolist(), t.train.tolist(), t.key) for t in one] == [(t.ids.tolist(), t.train.tolist(), t.key) for t in two]


def refusal(settings, tokenizer):
    with pytest.raises(DataError) as caught:
        prepare(settings, tokenizer)
    return caught.value


def test_rows_become_tokens_with_the_answers_trained(write, tokenizer):
    path = write("a.jsonl", [pair("hi", "hello"), pair("bye", "see you")])
    done = prepare(recipe(path), tokenizer)
    assert len(done.train) == 2
    assert [tokenizer.decode(row.ids[row.train != 0]) for row in done.train] == ["hello<|im_end|>", "see you<|im_end|>"]
    assert [row.key for row in done.train] == [f"{path}:1", f"{path}:2"]
    assert done.train.trained.tolist() == [6.0, 8.0]
    assert done.train.lengths.tolist() == [len(row) for row in done.train]
    assert done.validation is None
    (part,) = done.ledger.parts
    assert (part.read, part.used, part.rows) == (2, 2, 2)
    assert part.trained["assistant"] == 14
    assert part.tokens == sum(done.train.lengths)


def test_ten_bad_rows_are_listed_and_all_are_counted(write, tokenizer):
    rows = pairs(3) + [pair("q", "") for _ in range(11)] + [{"promt": "q", "completion": "a"}]
    path = write("a.jsonl", rows)
    error = refusal(recipe(path), tokenizer)
    assert error.code == "rows_refused"
    assert "12 rows cannot be used (empty_answer 11, wrong_key 1)" in error.message
    assert sum(f"{path}:" in line for line in error.message.splitlines()) == 10
    assert "and 2 more" in error.message
    assert "on_bad: drop" in error.remedy
    problems, ledger = check_rows(recipe(path), tokenizer)
    assert len(problems) == 12
    assert ledger.refused == 12


def test_dropped_rows_stand_in_the_ledger(write, tokenizer):
    path = write("a.jsonl", b'{"prompt": "q", "completion": "a"}\n{"prompt": \n{"prompt": "q", "completion": "\xff"}\n{"prompt": "q"}\n')
    done = prepare(recipe(path, data={"on_bad": "drop"}), tokenizer)
    (part,) = done.ledger.parts
    assert (part.read, part.used, part.refused) == (4, 1, 3)
    reasons = {reason.code: reason.keys for _, reason in done.ledger.reasons("refused")}
    assert reasons == {"broken_json": [f"{path}:2"], "not_utf8": [f"{path}:3"], "wrong_key": [f"{path}:4"]}
    assert json.loads(json.dumps(done.ledger.as_dict()))["totals"]["refused"] == 3
    assert Ledger.from_dict(json.loads(json.dumps(done.ledger.as_dict()))) == done.ledger
    assert "empty" not in done.ledger.summary()
    assert "broken_json" in done.ledger.summary()


def test_what_was_dropped_is_still_refused_when_the_cache_has_it(write, tokenizer):
    path = write("a.jsonl", [*pairs(2), pair("q", "")])
    prepare(recipe(path, data={"on_bad": "drop"}), tokenizer)
    assert refusal(recipe(path), tokenizer).code == "rows_refused"


def test_a_template_that_raises_refuses_the_row_with_its_words(write, tokenizer):
    error = refusal(recipe(write("a.jsonl", [*pairs(2), pair("forbidden", "a")])), tokenizer)
    assert "this word is forbidden" in error.message
    assert error.where.endswith("a.jsonl:3")


def test_no_template(write, tokenizer):
    with pytest.raises(TemplateError, match="did you mean 'chatml'"):
        prepare(recipe(write("a.jsonl", pairs(2)), model={"template": "chatmk"}), tokenizer)


def test_every_row_over_length_leaves_nothing(write, tokenizer):
    error = refusal(recipe(write("a.jsonl", pairs(3, 100)), tokens={"max_length": 64}), tokenizer)
    assert (error.code, "no row is left to train on" in error.message) == ("no_rows", True)
    assert "dropped 3 x over_length" in error.message
    assert "max_length" in error.remedy


def test_overlong_error_refuses_even_when_bad_rows_are_dropped(write, tokenizer):
    settings = recipe(write("a.jsonl", [*pairs(3), *pairs(1, 300)]), tokens={"overlong": "error"}, data={"on_bad": "drop"})
    error = refusal(settings, tokenizer)
    assert error.code == "over_length"
    assert "a.jsonl:4" in error.message


def test_overlong_drop_cut_and_their_accounts(write, tokenizer):
    rows = [*pairs(3), pair("q" * 300, "short"), pair("q", "a" * 300)]
    path = write("a.jsonl", rows)
    dropped = prepare(recipe(path), tokenizer)
    assert [(p.read, p.used, p.dropped) for p in dropped.ledger.parts] == [(5, 3, 2)]
    cut = prepare(recipe(path, tokens={"overlong": "cut_prompt"}), tokenizer)
    (part,) = cut.ledger.parts
    assert (part.read, part.used, part.dropped, part.cut) == (5, 4, 1, 1)
    assert len(cut.train[3]) == 256
    assert tokenizer.decode(cut.train[3].ids[cut.train[3].train != 0]) == "short<|im_end|>"
    assert part.cut_tokens == part.longest - 256
    assert {reason.code for _, reason in cut.ledger.reasons("dropped")} == {"answer_over_length"}


def test_overlong_split_trains_text_once_and_dialogs_by_exchange(write, tokenizer):
    words = "".join(f"word {n}, " for n in range(200))
    done = prepare(recipe(write("a.jsonl", [{"text": words}]), tokens={"overlong": "split", "max_length": 100}), tokenizer)
    learned = "".join(tokenizer.decode(row.ids[row.train != 0]) for row in done.train)
    assert learned == words[1:] + "<|im_end|>"
    (part,) = done.ledger.parts
    assert (part.read, part.used, part.split_up, part.rows) == (1, 1, 1, len(done.train))
    turns = [{"role": r, "content": f"{r}{n}" + "x" * 40} for n in range(6) for r in ("user", "assistant")]
    turns[-1]["content"] = "y" * 400
    messages = [{"role": "system", "content": "be kind"}, *turns]
    path = write("b.jsonl", [{"messages": messages}])
    done = prepare(recipe(path, tokens={"overlong": "split"}), tokenizer)
    texts = [tokenizer.decode(row.ids) for row in done.train]
    assert all(text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user") for text in texts)
    assert all(len(row) <= 256 for row in done.train)
    assert [n for text in texts for n in range(6) if f"assistant{n}" in text] == list(range(5))
    assert {reason.code for _, reason in done.ledger.reasons("note")} == {"exchange_lost"}
    last = prepare(recipe(path.replace("b.", "a."), tokens={"overlong": "split", "max_length": 100}), tokenizer)
    assert len(last.train) == part.rows


def test_split_with_last_turns_trains_only_the_last(write, tokenizer):
    turns = [{"role": r, "content": f"{r}{n}" + "x" * 40} for n in range(6) for r in ("user", "assistant")]
    path = write("b.jsonl", [{"messages": turns}])
    done = prepare(recipe(path, tokens={"overlong": "split"}, data={"turns": "last"}), tokenizer)
    learned = [tokenizer.decode(row.ids[row.train != 0]) for row in done.train]
    assert learned == ["assistant5" + "x" * 40 + "<|im_end|>"]
    # As many earlier exchanges as fit stay in front of it.
    (text,) = [tokenizer.decode(row.ids) for row in done.train]
    assert text.startswith("<|im_start|>user\nuser4")
    assert len(done.train[0]) <= 256


def test_a_ten_megabyte_row_is_dropped_with_its_reason_and_quickly(write, tokenizer):
    path = write("a.jsonl", [*pairs(2), pair("q", "a" * 10_000_000)])
    start = time.perf_counter()
    done = prepare(recipe(path), tokenizer)
    assert time.perf_counter() - start < 3
    ((_, reason),) = done.ledger.reasons("dropped")
    assert (reason.code, reason.keys) == ("over_length", [f"{path}:3"])


def test_two_broken_sources_are_both_named(write, tokenizer):
    error = refusal(recipe([write("a.jsonl", ""), write("b.xyz", "x"), write("c.jsonl", pairs(1))]), tokenizer)
    assert "a.jsonl" in error.where
    assert "b.xyz" in error.message


def test_a_late_row_of_another_format_is_found(write, tokenizer):
    error = refusal(recipe(write("a.jsonl", [*pairs(1200), {"text": "x"}])), tokenizer)
    assert error.code == "mixed_formats"
    assert "a.jsonl:1201" in error.message


def test_a_fraction_is_held_out_by_content(write, tokenizer):
    rows = pairs(200) * 2
    path = write("a.jsonl", rows)
    done = prepare(recipe(path, data={"validation": {"fraction": 0.2}}), tokenizer)
    train, held = ({tuple(row.ids.tolist()) for row in rows} for rows in (done.train, done.validation))
    assert not train & held
    assert len(done.train) + len(done.validation) == 400
    assert 40 < len(done.validation) < 130
    assert done.ledger.overlap == 0
    # The order of the rows does not decide.
    again = prepare(recipe(write("b.jsonl", rows[::-1]), data={"validation": {"fraction": 0.2}}), tokenizer)
    assert {tuple(row.ids.tolist()) for row in again.validation} == held
    assert sum(part.duplicates for part in done.ledger.parts) == 200
    assert sum(part.read for part in done.ledger.parts) == 400


def test_no_validation_row_left(write, tokenizer):
    error = refusal(recipe(write("a.jsonl", pairs(2)), data={"validation": {"fraction": 1e-9}}), tokenizer)
    assert error.code == "no_validation"


def test_validation_rows_that_are_also_trained_on_are_counted_and_said(write, tokenizer, said):
    train, held = write("a.jsonl", pairs(5)), write("b.jsonl", [*pairs(2), pair("new", "row")])
    done = prepare(recipe(train, data={"validation": held}), tokenizer)
    assert done.ledger.overlap == 2
    assert any("also trained on" in line for line in said)
    ((_, reason),) = done.ledger.reasons("note")
    assert reason.keys == [f"{held}:1", f"{held}:2"]


def test_prompts_are_of_the_validation_rows_and_stay_the_same(write, tokenizer):
    train, held = write("a.jsonl", pairs(50)), write("b.jsonl", [pair(f"v{n}", f"answer {n}") for n in range(20)])
    done = prepare(recipe(train, data={"validation": held}, run={"samples": 3}), tokenizer)
    assert len(done.prompts) == 3
    for prompt in done.prompts:
        assert prompt.messages[-1].role == "user"
        assert prompt.truth == f"answer {prompt.messages[-1].content[1:]}"
    assert prepare(recipe(train, data={"validation": held}, run={"samples": 3}), tokenizer).prompts == done.prompts
    assert prepare(recipe(train, data={"validation": held}, run={"samples": 5}), tokenizer).prompts[:3] == done.prompts
    assert all(prompt.key.startswith(train) for prompt in prepare(recipe(train), tokenizer).prompts)


def test_weights_unused_columns_and_progress(write, tokenizer):
    seen = []
    one, two = write("a.jsonl", [{**row, "id": 1} for row in pairs(150)]), write("b.jsonl", [pair("x", "y")])
    done = prepare(recipe([{"path": one}, {"path": two, "weight": 2.5}]), tokenizer, progress=seen.append)
    assert done.train.repeats.tolist() == [1.0] * 150 + [2.5]
    assert done.ledger.parts[0].unused_columns == {"id": 150}
    assert sum(seen) == 151


def test_the_cache_gives_the_same_back_without_reading_again(write, tokenizer, own_cache):
    settings = recipe(write("a.jsonl", pairs(20)), data={"validation": {"fraction": 0.3}})
    first = prepare(settings, tokenizer)
    calls = []
    again = prepare(settings, tokenizer, progress=calls.append)
    assert calls == []
    assert (again.train.hash, again.validation.hash) == (first.train.hash, first.validation.hash)
    assert same(again.train, first.train)
    assert again.ledger == first.ledger
    assert again.prompts == first.prompts
    assert len(list((own_cache / "tokens").iterdir())) == 1
    plain = prepare(recipe(write("a.jsonl", pairs(20)), data={"validation": {"fraction": 0.3}}, tokens={"cache": False}), tokenizer)
    assert plain.train.hash == first.train.hash
    assert len(list((own_cache / "tokens").iterdir())) == 1


@pytest.mark.parametrize("damage", ["byte", "short", "gone", "ledger", "seal"])
def test_a_damaged_cache_is_found_and_made_again(write, tokenizer, own_cache, damage):
    settings = recipe(write("a.jsonl", pairs(20)))
    first = prepare(settings, tokenizer)
    wanted = [(row.ids.tolist(), row.key) for row in first.train]
    (folder,) = (own_cache / "tokens").iterdir()
    ids = folder / "train" / "ids.npy"
    data = ids.read_bytes()
    if damage == "byte":
        ids.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "short":
        ids.write_bytes(data[: len(data) // 2])
    elif damage == "gone":
        ids.unlink()
    elif damage == "ledger":
        (folder / "ledger.json").write_text("{}")
    else:
        (folder / "seal.json").write_text("{")
    assert cache.fetch(folder) is None
    again = prepare(settings, tokenizer)
    assert [(row.ids.tolist(), row.key) for row in again.train] == wanted
    assert cache.fetch(folder) is not None


def test_the_cache_key_follows_everything_that_matters(write, tokenizer):
    path = write("a.jsonl", pairs(3))

    def key(template="t", prompts=4, **settings):
        return cache.cache_key(recipe(path, **settings), tokenizer, template, prompts)

    before = key()
    assert key() == before
    assert key(data={"on_bad": "drop"}) == before
    assert key(run={"seed": 5}) == before
    others = [
        key(template="u"), key(tokens={"max_length": 128}), key(tokens={"overlong": "split"}), key(data={"turns": "last"}), key(prompts=5)
    ]  # fmt: skip
    assert len({before, *others}) == len(others) + 1
    write("a.jsonl", pairs(4))
    assert key() != before


def test_the_tokenizer_counts_by_content(write, tokenizer):
    from transformers import PreTrainedTokenizerFast

    before = cache.tokenizer_hash(tokenizer)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|bos|>", eos_token="<|im_end|>")
    assert cache.tokenizer_hash(other) == before
    changed = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    assert cache.tokenizer_hash(changed) != before
    settings = recipe(write("a.jsonl", pairs(2)))
    assert cache.cache_key(settings, changed, "t", 4) != cache.cache_key(settings, tokenizer, "t", 4)


def test_a_token_set_on_disk_is_the_same(tmp_path):
    builder = Builder()
    for size, key in ((3, "a:1"), (5, "ü:2")):
        train = np.linspace(0, 1, size, dtype=np.float32)
        builder.add(Tokens(np.arange(size, dtype=np.int32), train, key, "g" * size, "chosen", {"adv": train * 2}), 1.5)
    made = builder.build()
    made.save(tmp_path / "set")
    read = load_set(tmp_path / "set")
    assert read.hash == made.hash
    assert (read[1].key, read[1].group, read[1].role) == ("ü:2", "ggggg", "chosen")
    np.testing.assert_array_equal(read[-1].streams["adv"], made[1].streams["adv"])
    with pytest.raises(IndexError):
        read[2]
    with pytest.raises(ValueError, match="read-only"):
        made[0].ids[0] = 7


@pytest.mark.parametrize("train", [[1, 1, 1], [0, 1]])
def test_a_builder_refuses_what_cannot_be_trained(train):
    with pytest.raises(BugError):
        Builder().add(Tokens(np.arange(3, dtype=np.int32), np.array(train, dtype=np.float32), "k"), 1.0)


def test_a_ledger_that_lost_something_is_a_bug():
    part = Part("f", "train", read=3, used=2, tokens=5)
    with pytest.raises(BugError, match="lost a row"):
        part.balance()
    part.note("dropped", Problem("f:1", "x", "y"))
    part.trained["assistant"] = 4
    with pytest.raises(BugError, match="lost a token"):
        part.balance()
    part.untrained["user"] = 1
    part.balance()
    part.dropped, part.used = 2, 1
    with pytest.raises(BugError, match="no reason"):
        part.balance()
