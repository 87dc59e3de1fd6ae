"""Evaluation end to end on tiny models: against plain transformers loops, and with the base beside the tuned model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.cli.main import main
from tunesmith.core.card import Card, write_card
from tunesmith.core.errors import DataError, GradeError, ModelError, RecipeError, TemplateError
from tunesmith.core.ports import SampleSettings
from tunesmith.core.types import Score, Tokens
from tunesmith.data.render import render, render_prompt
from tunesmith.data.template import choose_template
from tunesmith.evals.likelihood import row_sums
from tunesmith.evals.measure import credit, final_words, measure
from tunesmith.evals.opening import Opened, open_model
from tunesmith.evals.rows import as_text, read_cases
from tunesmith.evals.run import evaluate, evaluate_policy, perplexity_score
from tunesmith.evals.task import parse_tasks
from tunesmith.infer.generate import chat_sampler, generate, lead_of, raw_ids, read_prompts
from tunesmith.model.policy import Policy

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = ["one", "two", "three hundred", "four", "five six seven", "eight"]


def dialogs(answers: list[str] = ANSWERS) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"question {place} " * (place + 1)}, {"role": "assistant", "content": answer}]}
        for place, answer in enumerate(answers)
    ]


def texts() -> list[dict[str, Any]]:
    return [{"text": "a short line"}, {"text": "the second line is quite a bit longer " * 3}, {"text": "over the context " * 30}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny base and an adapter on it that changes what it says."""
    root = tmp_path_factory.mktemp("models")
    letters = sorted(ByteLevel.alphabet())
    inner = Tokenizer(BPE({letter: place for place, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), Bytes()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape["attention_dropout"] = 0.5  # must never be felt here
    config = LlamaConfig(vocab_size=264, max_position_embeddings=256, initializer_range=0.3, eos_token_id=None, bos_token_id=None, **shape)
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tuned.peft_config["default"].base_model_name_or_path = str(root / "base")
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)
    tuned.save_pretrained(root / "adapter")
    for name in ("base", "adapter"):
        tokenizer.save_pretrained(root / name)
    return {"base": str(root / "base"), "adapter": str(root / "adapter")}


@pytest.fixture(scope="module")
def base(folders: dict[str, str]) -> Opened:
    return open_model(folders["base"], device="cpu")


@pytest.fixture(scope="module")
def tuned(folders: dict[str, str]) -> Opened:
    return open_model(folders["adapter"], device="cpu")


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


def plain(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def answer_nll(model: Any, opened: Opened, question: str, answer: str, *, stop: bool) -> tuple[float, int]:
    """The plain way: ids by hand, one forward, no packing."""
    prompt = opened.tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    words = opened.tokenizer(answer + ("<|im_end|>" if stop else ""))["input_ids"]
    logp = logits_of(model, prompt + words)
    return -sum(float(logp[len(prompt) - 1 + k, token]) for k, token in enumerate(words)), len(words)


def test_perplexity_of_answers_is_what_a_plain_loop_gives(base: Opened, folders: dict[str, str]) -> None:
    report = evaluate_policy(base, ["perplexity"], dialogs(), seed=3)
    model = plain(folders["base"])
    pairs = [answer_nll(model, base, f"question {k} " * (k + 1), answer, stop=True) for k, answer in enumerate(ANSWERS)]
    score = report.scores[0]
    assert score.value == pytest.approx(math.exp(sum(x for x, _ in pairs) / sum(n for _, n in pairs)), rel=1e-5)
    assert (score.n, score.seed, score.base_value) == (len(ANSWERS), 3, None)
    assert score.low < score.value < score.high


def test_perplexity_of_text_counts_every_token_once_even_over_the_context(base: Opened, folders: dict[str, str]) -> None:
    report = evaluate_policy(base, ["perplexity"], texts())
    model, total, count = plain(folders["base"]), 0.0, 0
    for row in texts():
        ids = base.tokenizer(row["text"] + "<|endoftext|>")["input_ids"]
        while len(ids) > 1:
            part = ids[:256]
            logp = logits_of(model, part)
            total -= sum(float(logp[k, token]) for k, token in enumerate(part[1:]))
            count += len(part) - 1
            # The next piece begins with the last token of this one.
            ids = ids[255:]
    assert report.scores[0].value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert report.scores[0].n == 3, "pieces of one text are one row of the bootstrap"


def test_the_base_beside_an_adapter_is_the_base(tuned: Opened, base: Opened, folders: dict[str, str]) -> None:
    tasks: list[Any] = ["perplexity", "exact_match", {"name": "choice", "options": ANSWERS}]
    report = evaluate(folders["adapter"], tasks, dialogs(), max_new_tokens=6, device="cpu")
    alone = evaluate_policy(base, tasks, dialogs(), max_new_tokens=6)
    own = evaluate(folders["adapter"], tasks, dialogs(), base="none", max_new_tokens=6, device="cpu")
    assert report.base == folders["base"]
    assert own.base is None
    for result, other, mine in zip(report.results, alone.results, own.results, strict=True):
        assert result.score.base_value == pytest.approx(other.score.value, rel=1e-5)
        assert (result.base.low, result.base.high) == pytest.approx((other.score.low, other.score.high), rel=1e-5)
        assert replace(result.score, base_value=None) == mine.score
    assert [row["base"] for row in report.samples] == [row["tuned"] for row in alone.samples]
    assert [row["base"] for row in report.samples] != [row["tuned"] for row in report.samples]
    ppl = report.get("perplexity")
    assert ppl.difference.value == pytest.approx(ppl.score.value - ppl.score.base_value)
    assert evaluate(folders["adapter"], tasks, dialogs(), base=folders["base"], max_new_tokens=6, device="cpu").results == report.results


def test_the_base_of_an_adapter_is_what_it_started_from(base: Opened, tuned: Opened, folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["adapter"], tmp_path / "second")
    card = Card("", None, "fp32", True, "tokenizer", base.template.hash)
    expected = {
        folders["base"]: (base, folders["base"]),
        folders["adapter"]: (tuned, folders["adapter"]),
        "./gone": (base, folders["base"]),
    }
    for recorded, (same, named) in expected.items():
        write_card(tmp_path / "second", replace(card, base=recorded))
        report = evaluate(str(tmp_path / "second"), ["perplexity"], dialogs(), device="cpu")
        assert report.base == named
        assert report.scores[0].base_value == pytest.approx(evaluate_policy(same, ["perplexity"], dialogs()).scores[0].value)


def test_a_whole_model_is_scored_beside_the_base_that_its_card_names(
    base: Opened, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = plain(folders["base"])
    with torch.no_grad():
        trained.lm_head.weight.mul_(0.5)
    trained.save_pretrained(tmp_path / "final")
    base.tokenizer.save_pretrained(tmp_path / "final")
    card = Card(folders["base"], None, "fp32", False, "tokenizer", base.template.hash)
    write_card(tmp_path / "final", card)
    tasks = ["perplexity", "exact_match"]
    report = evaluate(str(tmp_path), tasks, dialogs(), max_new_tokens=4, device="cpu")
    alone = evaluate_policy(base, tasks, dialogs(), max_new_tokens=4)
    assert report.base == folders["base"]
    assert [result.score.base_value for result in report.results] == pytest.approx([score.value for score in alone.scores])
    assert report.scores[0].value != pytest.approx(alone.scores[0].value)
    write_card(tmp_path / "final", replace(card, base=str(tmp_path / "gone")))
    with monkeypatch.context() as patch:
        patch.setattr("tunesmith.evals.run.measure", lambda *_, **__: pytest.fail("the model was measured before its base was looked for"))
        with pytest.raises(ModelError, match="the base that this run records") as caught:
            evaluate(str(tmp_path), tasks, dialogs(), max_new_tokens=4, device="cpu")
        with pytest.raises(ModelError, match="gone"):
            evaluate(str(tmp_path), tasks, dialogs(), base=str(tmp_path / "gone"), max_new_tokens=4, device="cpu")
    assert "--base none" in caught.value.remedy
    assert evaluate(str(tmp_path), tasks, dialogs(), base="none", max_new_tokens=4, device="cpu").scores == alone_scores(report.scores)


def alone_scores(scores: list[Score]) -> list[Score]:
    return [replace(score, base_value=None) for score in scores]


def test_perplexities_over_different_tokens_are_not_compared(base: Opened, folders: dict[str, str], tmp_path: Path) -> None:
    other = open_model(folders["base"], device="cpu")
    other.tokenizer.add_tokens(["question"])
    report = evaluate_policy(base, ["perplexity", "exact_match"], dialogs()[:2], base=other, max_new_tokens=2)
    assert report.get("perplexity").score.base_value is None
    assert report.get("exact_match").score.base_value is not None
    assert any("another tokenizer" in note for note in report.notes)


def test_the_json_has_the_keys_that_are_promised(base: Opened) -> None:
    report = evaluate_policy(base, ["perplexity", "exact_match"], dialogs(), max_new_tokens=3, name="mine")
    tree = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert {"model", "base", "scores", "samples"} <= tree.keys()
    assert (tree["model"], tree["base"]) == ("mine", None)
    for row in tree["scores"]:
        assert {"task", "metric", "value", "n", "low", "high", "base_value", "seed"} <= row.keys()
    again = evaluate_policy(base, ["perplexity", "exact_match"], dialogs(), max_new_tokens=3, name="mine").as_dict()
    assert {**again, "seconds": 0} == {**report.as_dict(), "seconds": 0}, "same seed, same numbers"
    assert report.settings_hash != evaluate_policy(base, ["perplexity", "exact_match"], dialogs(), max_new_tokens=4).settings_hash


def test_grades_follow_the_answers(base: Opened) -> None:
    asked = [row["messages"][:1] for row in dialogs()]
    prompts = [case.prompt().messages for case in read_cases(dialogs())]
    rows = generate(base.policy, base.tokenizer, base.template, prompts, SampleSettings(max_new_tokens=5, temperature=0.0))
    said = [row["completions"][0]["text"] for row in rows]
    assert all(text.strip() for text in said)
    truths = [text if place < 4 else "something else" for place, text in enumerate(said)]
    data = [{"messages": [*turns, {"role": "assistant", "content": truth}]} for turns, truth in zip(asked, truths, strict=True)]
    report = evaluate_policy(base, ["exact_match", {"name": "json_valid", "label": "valid"}], data, max_new_tokens=5)
    assert report.get("exact_match").score.value == pytest.approx(4 / 6)
    assert report.get("valid").score.metric == "valid"
    assert [row["grades"]["exact_match"] for row in report.samples] == [1, 1, 1, 1, 0, 0]
    assert [row["tuned"] for row in report.samples] == said
    assert final_words("<think>{</think>\n{}") == "\n{}"


def test_a_choice_is_made_by_the_options_own_log_probability(base: Opened, folders: dict[str, str]) -> None:
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh "), size)).strip() + "." for size in random.integers(2, 9, 90)]
    data = [{"question": f"which {k}?", "choices": words[3 * k : 3 * k + 3], "answer": k % 3} for k in range(30)]
    found = measure(base, parse_tasks(["choice"]), read_cases(data), max_new_tokens=1).values["choice"]
    model = plain(folders["base"])
    for place, row in enumerate(data):
        logps = np.array([-answer_nll(model, base, row["question"], text, stop=False)[0] for text in row["choices"]])
        sizes = [len(text.encode()) for text in row["choices"]]
        assert found["accuracy"][place] == (float(np.argmax(logps) == row["answer"]), 1.0)
        assert found["accuracy_per_byte"][place] == (float(np.argmax(logps / sizes) == row["answer"]), 1.0)
    assert credit(np.array([1.0, 2.0, 2.0]), 1) == 0.5, "a tie is no matter of order"


def test_sampled_log_probs_are_the_scored_ones(tuned: Opened) -> None:
    """Through the adapter, the packed attention and its switching off for generation."""
    prompts = [render_prompt(case.prompt().messages, (), tuned.template, tuned.tokenizer) for case in read_cases(dialogs())]
    before = tuned.policy.causal.config._attn_implementation
    for temperature in (0.0, 1.3):
        settings = SampleSettings(max_new_tokens=12, temperature=temperature)
        answers = [row[0] for row in chat_sampler(tuned.policy, tuned.tokenizer, tuned.template).sample(prompts, settings)]
        rows = [
            Tokens(np.array([*ids, *one.ids], np.int32), np.r_[np.zeros(len(ids)), np.ones(len(one.ids))].astype(np.float32), "row")
            for ids, one in zip(prompts, answers, strict=True)
        ]
        sums, counts = row_sums(tuned.policy, rows)
        assert [-sum(one.logprobs) for one in answers] == pytest.approx(sums.tolist(), abs=1e-4)
        assert counts.tolist() == [len(one.ids) for one in answers]
    assert tuned.policy.causal.config._attn_implementation == before


def test_row_sums_weigh_tokens_and_leave_modes_alone(base: Opened) -> None:
    row = render(read_cases(dialogs())[4].example, base.template, base.tokenizer)[0].tokens
    half = replace(row, train=row.train * 0.5)
    base.policy.model.train()
    sums, weights = row_sums(base.policy, [row, half], capacity=8)
    assert base.policy.model.training
    base.policy.model.eval()
    assert sums[1] == pytest.approx(sums[0] / 2)
    assert sums[0] == pytest.approx(row_sums(base.policy, [row])[0][0])
    assert weights.tolist() == [row.train.sum(), row.train.sum() / 2]
    score = perplexity_score(base.policy, [row, half, row], base_value=9.0)
    assert score.value == pytest.approx(math.exp(sums[0] / weights[0]))
    assert score.base_value == 9.0


def test_weights_with_nan_are_an_error_and_no_number(folders: dict[str, str]) -> None:
    model = plain(folders["base"])
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    broken = open_model(folders["base"], device="cpu")
    policy = Policy(model, torch.float32)
    with pytest.raises(ModelError, match="not a number"):
        evaluate_policy(replace(broken, policy=policy), ["perplexity"], dialogs())


@pytest.mark.parametrize(
    ("tasks", "rows", "error", "words"),
    [
        (["perplexty"], dialogs(), RecipeError, "did you mean 'perplexity'"),
        ([{"name": "exact_match", "ignore_cas": True}], dialogs(), RecipeError, "did you mean 'ignore_case'"),
        ([{"name": "perplexity", "stride": 1}], dialogs(), RecipeError, "no setting 'stride'"),
        (["exact_match", "exact_match"], dialogs(), RecipeError, "two tasks"),
        ([], dialogs(), RecipeError, "no task"),
        (["json_fields"], dialogs(), GradeError, "row:1: truth"),
        (["exact_match"], texts(), DataError, "no question"),
        ([{"name": "choice", "options": ["x", "y"]}], dialogs(), RecipeError, "none of the options"),
        (["choice"], [{"question": "?", "choices": ["a", "b"], "answer": "c"}], DataError, "none of the 2 options"),
        (["choice"], [{"question": "?", "choices": ["a", "a"], "answer": "a"}], DataError, "two options are the same"),
        (["perplexity"], [{"messages": []}, {"messages": "x"}], DataError, "rows cannot be evaluated|no known format"),
    ],
)
def test_misuse_is_refused_before_anything_is_generated(
    base: Opened, tasks: list[Any], rows: list[dict[str, Any]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        evaluate_policy(base, tasks, rows)


def test_a_limit_is_a_seeded_part_and_options_may_be_letters(tmp_path: Path) -> None:
    rows = dialogs([f"answer {k}" for k in range(50)])
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kept = [case.key for case in read_cases(path, limit=10, seed=1)]
    assert kept == [case.key for case in read_cases(path, limit=10, seed=1)]
    assert kept != [case.key for case in read_cases(path, limit=10, seed=2)]
    assert kept == sorted(kept, key=lambda key: int(key.rpartition(":")[2]))
    assert kept[-1] != "held.jsonl:10", "not simply the first rows"
    [case] = read_cases([{"question": "?", "choices": ["x", "y"], "answer": "b"}])
    assert (case.prompt().truth, case.options) == ("y", ("x", "y"))


def test_prompts_of_a_file_and_raw_text(base: Opened, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "hi"}\n{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n', encoding="utf-8"
    )
    lines = read_prompts(path)
    asks = [line.ask for line in lines]
    rows = generate(base.policy, base.tokenizer, base.template, asks, SampleSettings(max_new_tokens=3, n=2))
    assert [line.place for line in lines] == [f"{path}:1", f"{path}:2"]
    assert [row["prompt"] for row in rows] == ["hi", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]]
    assert all(len(row["completions"]) == 2 for row in rows)
    [raw] = generate(base.policy, base.tokenizer, base.template, ["ab"], SampleSettings(max_new_tokens=3, temperature=0.0), raw=True)
    assert raw_ids("ab", base.tokenizer) == base.tokenizer("ab")["input_ids"]
    assert raw["completions"][0]["ids"]
    for row, said in (('{"promt": "hi"}', "did you mean 'prompt'"), ('{"question": "hi"}', "no prompt in the row")):
        (tmp_path / "bad.jsonl").write_text(row + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=said):
            read_prompts(tmp_path / "bad.jsonl")
    assert as_text(asks[1].messages) == "[system]\ns\n\n[user]\nu"


def test_rows_that_name_the_base_go_through_the_base_also_when_all_do(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"

    def said(row: str, *words: str) -> Any:
        path.write_text(row + "\n", encoding="utf-8")
        status = main(["generate", folders["base"], "--prompts", str(path), "--greedy", "--max-new-tokens", "8", "--json", *words])
        [line] = capsys.readouterr().out.splitlines()
        found = json.loads(line)
        return found["completions"][0]["ids"] if status == 0 else found["error"]["code"]

    tuned = ("--lora", f"tuned={folders['adapter']}")
    alone = said('{"prompt": "hi"}')
    assert said('{"prompt": "hi", "adapter": null}', *tuned) == alone != said('{"prompt": "hi"}', *tuned)
    assert said('{"prompt": "hi", "adapter": null}', "--plain") == alone
    assert said('{"prompt": "hi", "adapter": "tuned"}', "--plain") == "unknown_adapter"
    assert said('{"prompt": "hi", "adapter": ["tuned"]}', *tuned) == "wrong_key"


def test_what_a_template_refuses_is_said_with_its_row(base: Opened, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hi"}\n{"messages": [{"role": "user", "content": "no"}]}\n', encoding="utf-8")
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0].content == 'no' %}{{ raise_exception('no words') }}{% endif %}" + TEMPLATE, encoding="utf-8"
    )
    strict = replace(base, template=choose_template(base.tokenizer, str(tmp_path / "strict.jinja")))
    with pytest.raises(TemplateError) as caught:
        generate(base.policy, base.tokenizer, strict.template, [line.ask for line in read_prompts(path)], SampleSettings(max_new_tokens=3))
    assert caught.value.where == f"{path}:2"
    for raw in (False, True):
        with pytest.raises(DataError, match="half of a surrogate pair") as half:
            generate(base.policy, base.tokenizer, base.template, ["whole", "\udcff"], SampleSettings(max_new_tokens=3), raw=raw)
        assert (half.value.where, half.value.code) == ("prompt 1", "half_character")


def test_white_space_that_the_template_writes_is_no_part_of_the_answer(base: Opened) -> None:
    opened = replace(base, template=choose_template(base.tokenizer, "simple"))
    lead = lead_of(opened.template, base.tokenizer)
    assert lead == " ", "User: ...\n\nAssistant: ..."
    assert lead_of(base.template, base.tokenizer) == ""
    assert lead_of(choose_template(base.tokenizer, "none"), base.tokenizer) == ""
