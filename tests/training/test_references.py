"""The reference of preference objectives: which model it is, that it is proven at the start, and its cache."""

from pathlib import Path

import pytest

from tunesmith.core.errors import ModelError, RecipeError
from tunesmith.core.load import load_tree
from tunesmith.training.door import with_what_they_read
from tunesmith.training.reference import demand_reference
from tunesmith.training.run import train


def test_the_reference_is_the_model_at_the_start_also_when_an_adapter_goes_on(wish, tmp_path):
    """A LoRA that is trained on: its reference is what it was, not the bare base below it."""
    first = wish("orpo", "lora", "first", steps=6, eval_every=0)
    train(first)
    second = wish("dpo", "lora", "second", steps=6, eval_every=3)
    second["model"]["base"] = str(Path(first["run"]["out"]) / "final")
    result = train(second)
    assert result["start"]["eval/loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    third = {**second, "reference": {"model": "base", "cache": False}, "run": {**second["run"], "out": str(tmp_path / "third")}}
    assert abs(train(third)["start"]["eval/loss"] - 0.6931471805599453) > 1e-3


def test_a_reference_model_that_is_not_there_is_said_before_any_work(wish, tmp_path):
    made = wish("dpo", "lora", "run")
    made["reference"]["model"] = str(tmp_path / "nowhere")
    with pytest.raises(ModelError) as caught:
        train(made)
    assert (caught.value.code, caught.value.where) == ("no_model", "reference.model")
    assert not Path(made["run"]["out"]).exists()


@pytest.mark.parametrize("change", [{"adapter": {"name": "prompt", "tokens": 4}}, {"quant": "nf4"}])
def test_the_cache_of_the_reference_tells_models_apart_that_start_from_the_same_weights(wish, change, tmp_path):
    if "quant" in change:
        pytest.importorskip("bitsandbytes")
    for name, changed in (("first", {}), ("second", change)):
        made = wish("dpo", "lora", name, steps=2, eval_every=0)
        made["reference"]["cache"] = True
        made["model"] |= changed
        assert train(made)["start"]["eval/loss"] == pytest.approx(0.6931471805599453, abs=1e-3)


def test_a_stale_reference_stops_the_run(wish, monkeypatch):
    from tunesmith.training import reference

    honest = reference.logprobs
    monkeypatch.setattr(reference, "_read", lambda path, size: None)

    def wrong(policy, rows, budget, ranks):
        return [
            None if found is None else found - 0.5 * (row.train != 0)
            for found, row in zip(honest(policy, rows, budget, ranks), rows, strict=True)
        ]

    made = wish("dpo", "lora", steps=2)
    calls = []
    monkeypatch.setattr(reference, "logprobs", lambda *a: (calls.append(1), wrong(*a) if len(calls) == 1 else honest(*a))[1])
    with pytest.raises(ModelError, match=r"model and its reference differ: log-probabilities by up to 0\.5 of"):
        train(made)


def test_the_cache_of_the_reference_is_read_and_a_damaged_one_is_made_again(wish, monkeypatch, tmp_path):
    from tunesmith.training import reference

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    made = wish("dpo", "lora", steps=2, eval_every=0)
    made["reference"] = {"cache": True}
    asked = []
    honest = reference.logprobs
    monkeypatch.setattr(reference, "logprobs", lambda policy, rows, *rest: (asked.append(len(rows)), honest(policy, rows, *rest))[1])
    first = train(made)["metrics"]["loss"]
    used, asked[:] = list(asked), []
    assert train(made, fresh=True)["metrics"]["loss"] == first
    assert sum(asked) < sum(used)
    for file in (tmp_path / "cache" / "reference").rglob("values.npy"):
        file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    asked[:] = []
    assert train(made, fresh=True)["metrics"]["loss"] == first
    assert sum(asked) == sum(used)


def refusal(settings):
    from tunesmith.core.load import build
    from tunesmith.training.door import at_the_door

    with pytest.raises((ModelError, RecipeError)) as caught:
        at_the_door(build(settings).recipe)
    return caught.value


def another(base, folder, *, tokens=True, size=None):
    """A model like the base whose tokenizer has one token more, or which has none, with another vocabulary or the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    if size is not None:
        model.resize_token_embeddings(size)
    model.save_pretrained(folder)
    if tokens:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["<another>"])
        tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reference_that_reads_other_ids_is_refused_at_the_door(wish, base, tmp_path):
    made = wish("dpo", "lora")
    made["reference"]["model"] = another(base, tmp_path / "other")
    error = refusal(made)
    assert (error.code, error.where) == ("tokenizer_differs", "reference.model")
    assert "'<another>': id none in the base" in error.message
    made["reference"]["model"] = another(base, tmp_path / "larger", tokens=False, size=4200)
    error = refusal(made)
    assert error.code == "tokenizer_differs"
    assert "a vocabulary of 4200" in error.message


def test_a_special_token_of_the_base_that_is_a_word_to_the_reference_is_refused(wish, base, tmp_path):
    import json

    made = wish("dpo", "lora")
    folder = Path(another(base, tmp_path / "other", tokens=False))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        tree = json.loads((base / name).read_text())
        for token in tree.get("added_tokens", []):
            token["special"] = token["special"] and token["content"] != "<|im_start|>"
        (folder / name).write_text(json.dumps(tree))
    made["reference"]["model"] = str(folder)
    error = refusal(made)
    assert error.code == "tokenizer_differs"
    assert "is a special token in one of them alone" in error.message


def test_a_reference_of_its_own_lies_apart_and_does_not_agree(wish, base, tmp_path, caplog):
    """Without tokenizer files its vocabulary has to be as large as the base's; the distance is told as one."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(another(base, tmp_path / "other", tokens=False))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    model.save_pretrained(folder)
    made = wish("dpo", "lora", steps=1, eval_every=0)
    made["reference"]["model"] = str(folder)
    with caplog.at_level("INFO"):
        train(made)
    assert "agree" not in caplog.text
    assert "differ by up to" in caplog.text
    assert "as a model of its own may" in caplog.text


def test_a_fresh_adapter_begins_at_its_base_or_the_run_stops(wish, monkeypatch, caplog):
    from tunesmith.training import reference

    made = wish("dpo", "lora", steps=1, eval_every=0)
    made["reference"]["model"] = "base"
    with caplog.at_level("INFO"):
        train(made)
    assert "model and reference (base) agree to" in caplog.text
    honest, calls = reference.logprobs, []

    def first_wrong(policy, rows, *rest):
        calls.append(1)
        shift = 0.5 if len(calls) == 1 else 0.0
        return [
            None if found is None else found - shift * (row.train != 0)
            for found, row in zip(honest(policy, rows, *rest), rows, strict=True)
        ]

    monkeypatch.setattr(reference, "logprobs", first_wrong)
    with pytest.raises(ModelError) as caught:
        train(made, fresh=True)
    assert caught.value.code == "reference_differs"


@pytest.mark.parametrize("name", ["simpo", "orpo", "reward", "nll"])
def test_a_reference_that_nothing_reads_is_refused(wish, tree, name):
    made = tree("lora") if name == "nll" else wish(name, "lora")
    for section in ({"model": "base"}, {"cache": False}):
        made["reference"] = section
        error = refusal(made)
        assert (error.code, error.where) == ("unread_setting", "reference")
        assert "dpo" in error.remedy


def test_stages_may_share_a_reference_that_one_of_them_reads():
    stages = [{"name": "sft"}, {"name": "dpo", "objective": [{"name": "dpo"}]}]
    shared = {"model": {"base": "pocket"}, "data": {"train": "rows.jsonl"}, "reference": {"cache": False}}
    first, second = with_what_they_read(load_tree({**shared, "stages": stages}))
    assert (first.recipe.reference.cache, second.recipe.reference.cache) == (True, False)
    for tree in (
        {**shared, "stages": stages[:1]},  # nobody reads it
        {**shared, "stages": [{"name": "sft", "reference": {"cache": False}}, stages[1]]},  # written where it is not read
    ):
        with pytest.raises(RecipeError) as caught:
            demand_reference(with_what_they_read(load_tree(tree))[0].recipe)
        assert caught.value.code == "unread_setting"
