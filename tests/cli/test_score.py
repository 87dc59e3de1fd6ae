"""`tunesmith score`: a line a row with the scores that plain transformers gives, and every reason why there is none."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tunesmith.cli.main import main
from tunesmith.core import recipe
from tunesmith.data.template import choose_template
from tunesmith.evals.score import score, summarise
from tunesmith.model import reward
from tunesmith.model.build import build_policy
from tunesmith.model.tokenizer import load_tokenizer

CHATS = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} and {n + 1}"}] for n in range(9)]
PAIRS = [{"prompt": f"What is {n} and {n}?", "chosen": f"It is {2 * n}.", "rejected": "Find out."} for n in range(7)]
STEPS = [{"prompt": "Add 2, 3 and 4.", "completions": ["2 and 3 is 5.", "5 and 4 is 9."], "labels": [True, True]}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small language model with pocket's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer("pocket")
    torch.manual_seed(0)
    names = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=1, **names)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward_model(base, folder, position="last"):
    policy = build_policy(recipe.Model(base=str(base), dtype="fp32"), "cpu", seed=0, head="score")
    tokenizer = load_tokenizer(str(base))
    template = choose_template(tokenizer, "auto")
    pad = reward.choose_pad(policy.causal.config, tokenizer, [3])
    policy.save(folder)
    tokenizer.save_pretrained(folder)
    reward.write_card(folder, reward.RewardCard(position, template.hash, template.source, pad))
    return folder


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    return reward_model(base, tmp_path_factory.mktemp("reward"))


@pytest.fixture
def write(tmp_path):
    def written(rows, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return written


def run(capsys, *words):
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


def plain(model, messages):
    """The score of a conversation from transformers alone."""
    tokenizer = load_tokenizer(str(model))
    ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)])
    with torch.no_grad():
        return float(AutoModelForSequenceClassification.from_pretrained(model).eval()(ids).logits[0, 0])


def test_a_conversation_scores_what_transformers_says(capsys, model, write):
    file = write([{"messages": chat} for chat in CHATS])
    status, rows, err = run(capsys, "score", model, file, "--json")
    assert status == 0
    assert [row["key"] for row in rows] == [f"{file}:{n}" for n in range(1, 10)]
    np.testing.assert_allclose([row["score"] for row in rows], [plain(model, chat) for chat in CHATS], rtol=0, atol=1e-5)
    assert f"9 rows, mean score {np.mean([row['score'] for row in rows]):.4g} [" in err


def test_several_turns_are_read_at_their_last_token(capsys, model, write):
    chat = [*CHATS[0], *CHATS[1]]
    _, [row], _ = run(capsys, "score", model, write([{"messages": chat}]))
    assert row["score"] == pytest.approx(plain(model, chat), abs=1e-5)


def test_a_pair_has_two_scores_and_an_accuracy(capsys, model, write):
    status, rows, err = run(capsys, "score", model, write(PAIRS))
    assert status == 0
    for row, pair in zip(rows, PAIRS, strict=True):
        for side in ("chosen", "rejected"):
            chat = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            assert row[side] == pytest.approx(plain(model, chat), abs=1e-5)
    right = np.mean([row["chosen"] > row["rejected"] for row in rows])
    assert f"chosen over rejected in {right:.4g} [" in err
    assert list(rows[0]) == ["key", "chosen", "rejected"]


def test_steps_are_scored_at_their_ends(capsys, base, tmp_path, write):
    model = reward_model(base, tmp_path / "prm", "steps")
    status, [row], _ = run(capsys, "score", model, write(STEPS))
    assert status == 0
    tokenizer = load_tokenizer(str(model))
    answer = "\n".join(STEPS[0]["completions"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": STEPS[0]["prompt"]}, {"role": "assistant", "content": answer}], tokenize=False
    )
    likely = AutoModelForSequenceClassification.from_pretrained(model).eval()
    truth = []
    for step in STEPS[0]["completions"]:
        # The tokens up to the one that holds the step's last character.
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        end = text.index(step) + len(step)
        count = next(i for i, (_, stop) in enumerate(encoded["offset_mapping"]) if stop >= end) + 1
        with torch.no_grad():
            truth.append(float(likely(torch.tensor([encoded["input_ids"][:count]])).logits[0, 0]))
    np.testing.assert_allclose(row["scores"], truth, rtol=0, atol=1e-5)
    # Whole answers for a model of steps, and the other way round.
    for other, rows in ((model, PAIRS), (reward_model(base, tmp_path / "whole"), STEPS)):
        status, [said], _ = run(capsys, "score", other, write(rows), "--json")
        assert (status, said["error"]["code"]) == (2, "position_differs")


def test_labelled_answers_of_one_label_are_scored(capsys, model, write):
    file = write([{"prompt": "Hi", "completion": "Hello.", "label": True}, {"prompt": "Ho", "completion": "Hello.", "label": True}])
    for words in ((), ("--format", "labelled")):
        status, rows, _ = run(capsys, "score", model, file, *words)
        assert status == 0
        assert rows[0]["score"] == pytest.approx(
            plain(model, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]), abs=1e-5
        )


def test_rows_that_cannot_be_scored_are_listed(capsys, model, write):
    long = {"prompt": "Hi", "chosen": "word " * 300, "rejected": "No."}
    file = write([PAIRS[0], {"prompt": "Hi", "chosen": "Yes.", "rejected": ""}, PAIRS[1], long])
    status, rows, err = run(capsys, "score", model, file)
    assert (status, rows) == (1, [])
    assert "2 rows cannot be scored" in err
    assert f"{file}:2" in err
    assert f"{file}:4" in err
    assert "256" in err
    status, rows, err = run(capsys, "score", model, file, "--json")
    assert (status, rows[0]["error"]["code"]) == (1, "rows_refused")
    status, rows, err = run(capsys, "score", model, file, "--on-bad", "drop")
    assert (status, len(rows)) == (0, 2)
    assert "not scored: 2 of 4 rows in all" in err
    assert f"{file}:2" in err
    assert f"{file}:4" in err
    status, [said], _ = run(capsys, "score", model, write([long]), "--on-bad", "drop", "--json")
    assert (status, said["error"]["code"]) == (2, "no_rows")
    assert "--max-length" in said["error"]["remedy"]
    assert "tokens." not in said["error"]["remedy"]


def test_columns_have_their_names_on_the_command_line(capsys, model, write):
    _, truth, _ = run(capsys, "score", model, write(PAIRS))
    named = [{"question": row["prompt"], "better": row["chosen"], "worse": row["rejected"]} for row in PAIRS]
    words = ("--columns", "prompt=question,chosen=better,rejected=worse")
    status, rows, _ = run(capsys, "score", model, write(named), *words)
    assert (status, rows) == (0, truth)


def test_of_many_rows_that_are_left_out_ten_are_listed_and_all_are_counted(capsys, model, write):
    bad = [{"prompt": f"Hi {n}", "chosen": "Yes.", "rejected": ""} for n in range(14)]
    file = write([*PAIRS, *bad])
    status, rows, err = run(capsys, "score", model, file, "--on-bad", "drop")
    assert (status, len(rows)) == (0, len(PAIRS))
    assert sum(f"not scored: {file}" in line for line in err.splitlines()) == 10
    assert "not scored: 14 of 21 rows in all" in err


def test_another_template_than_the_models_is_refused(capsys, model, tmp_path, write):
    file = write(PAIRS)
    changed = reward_model(model, tmp_path / "changed")
    card = reward.read_card(changed)
    reward.write_card(changed, reward.RewardCard("last", "f" * 64, "named:llama3", card.pad))
    status, [said], _ = run(capsys, "score", changed, file, "--json")
    assert (status, said["error"]["code"]) == (2, "template_differs")
    assert "ffffffffffff" in said["error"]["message"]
    assert card.template[:12] in said["error"]["message"]
    status, rows, err = run(capsys, "score", changed, file, "--template", "simple")
    assert (status, len(rows)) == (0, len(PAIRS))
    assert "ffffffffffff" in err


def test_a_reward_model_that_is_trained_on_keeps_its_template(capsys, model, tmp_path, write):
    changed = reward_model(model, tmp_path / "changed")
    reward.write_card(changed, reward.RewardCard("last", "f" * 64, "named:llama3"))
    words = ("--method", "reward", "--model", changed, "--data", write(PAIRS), "--out", tmp_path / "run")
    for verb in ("check", "train"):
        status, [said], _ = run(capsys, verb, *words, "--json")
        problem = said["problems"][0] if verb == "check" else said["error"]
        assert (status, problem["code"], problem["where"]) == (1 + (verb == "train"), "template_differs", "model.template")
    status, _, err = run(capsys, "check", *words, "--template", "simple", "--json")
    assert status == 0
    assert "ffffffffffff" in err


@pytest.mark.parametrize(("words", "code"), [(("pocket",), "no_score_head"), (("no/such/place/here",), "no_model")])
def test_only_a_reward_model_scores(capsys, write, words, code):
    status, [said], _ = run(capsys, "score", *words, write(PAIRS), "--json")
    assert (status, said["error"]["code"]) == (2, code)


def test_a_score_that_is_no_number_names_its_row(capsys, base, tmp_path, write):
    model = reward_model(base, tmp_path / "broken")
    file = model / "model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights["score.weight"] *= 1e30
    weights["model.norm.weight"] *= 1e30  # each is finite, and their product is not
    save_file(weights, file, metadata={"format": "pt"})
    data = write(PAIRS)
    status, [said], _ = run(capsys, "score", model, data, "--json")
    assert (status, said["error"]["code"], said["error"]["where"]) == (2, "nan_score", f"{data}:1")


def test_the_function_gives_what_the_verb_prints(model, write):
    file = write(PAIRS)
    rows = list(score(str(model), file))
    summary = summarise(rows)
    assert summary.n == len(rows) == summary.accuracy.n
    assert summary.accuracy.value == np.mean([row["chosen"] > row["rejected"] for row in rows])
    assert summarise([{"key": "a", "chosen": 1.0, "rejected": 1.0}]).accuracy.value == 0.5
