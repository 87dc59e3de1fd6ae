"""The command line as a stranger meets it: help, wrong words, exit statuses, one JSON document on stdout."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tunesmith.cli.main import main
from tunesmith.core.recipe import Recipe

ROWS = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} and {n + 1}"}]} for n in range(12)]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


VERBS = ("demo", "train", "check", "show", "generate", "chat", "eval", "score", "data", "schema", "verify", "doctor")


def run(capsys, *words):
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_help_imports_nothing_heavy():
    code = "import sys; from tunesmith.cli.main import main; main(['--help']); print(sorted(m for m in sys.modules if '.' not in m))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = out[out.rindex("[") :]
    for heavy in ("torch", "transformers", "peft", "datasets", "pydantic", "numpy", "matplotlib", "yaml"):
        assert f"'{heavy}'" not in loaded, heavy
    for verb in VERBS:
        assert verb in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_a_runnable_example(capsys, verb):
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0
    assert f"tunesmith {verb}" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train", "--modle", "x"], "--model"),
        (["train"], "missing: --method, --model, --data, --out"),
        (["train", "--method", "stf", "--model", "pocket", "--data", "x", "--out", "y"], "did you mean 'sft'"),
        (["train", "nowhere.yaml"], "does not exist"),
        (["show", "nowhere.jsonl"], "nowhere.jsonl"),
        (["generate", "pocket"], "either --prompt or --prompts"),
        (["generate", "pocket", "--prompt", "hi", "--dtype", "fp61"], "model.dtype: unknown precision 'fp61'"),
        (["generate", "pocket", "--prompt", "hi", "--raw", "--template", "chatml"], "--raw and --template are given together"),
        (["generate", "pocket", "--prompts", os.devnull], "this is a pipe or a device"),
        (["show", "rows.jsonl", "--max-length", "0"], "--max-length"),
    ],
)
def test_wrong_words_end_with_status_2_and_a_remedy(capsys, words, said):
    status, out, err = run(capsys, *words)
    assert status == 2
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_an_error_is_one_json_document_with_json(capsys):
    status, out, _ = run(capsys, "train", "nowhere.yaml", "--json")
    assert status == 2
    assert set(json.loads(out)["error"]) == {"code", "where", "message", "remedy"}


def test_the_short_form_is_the_recipe_that_it_prints(capsys, rows, tmp_path):
    words = ["train", "--method", "sft", "--model", "pocket", "--data", rows, "--out", tmp_path / "run", "--set", "optim.lr=1e-3"]
    status, out, _ = run(capsys, *words, "--print-recipe")
    assert status == 0
    assert "lr: 0.001  # from: set" in out
    recipe = Recipe(**yaml.safe_load(out))
    assert recipe.model.adapter is not None
    assert recipe.data.train[0].path == str(rows)
    # What the base takes is in it, so that it is a recipe that runs.
    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    assert recipe.tokens.max_length == 1024
    assert run(capsys, "check", printed)[0] == 0


def test_show_gives_one_piece_per_id_and_the_whole_text(capsys, rows):
    status, out, _ = run(capsys, "show", rows, "--model", "pocket", "-n", "2", "--json")
    assert status == 0
    shown = json.loads(out)
    assert set(shown["template"]) >= {"source", "hash"}
    assert len(shown["rows"]) == 2
    for row, given in zip(shown["rows"], ROWS, strict=False):
        assert len(row["ids"]) == len(row["trained"]) == len(row["pieces"])
        trained = "".join(piece for piece, flag in zip(row["pieces"], row["trained"], strict=True) if flag)
        assert trained == given["messages"][1]["content"] + "<|im_end|>"
        assert given["messages"][0]["content"] in "".join(row["pieces"])


def test_show_prints_text_for_people(capsys, rows):
    status, out, _ = run(capsys, "show", rows, "-n", "1")
    assert status == 0
    assert "0 and 1" in out


def test_check_reports_every_problem_and_the_ledger(capsys, rows, tmp_path):
    words = ["--method", "sft", "--model", "pocket", "--data", rows, "--out", tmp_path / "run", "--json"]
    status, out, _ = run(capsys, "check", *words)
    report = json.loads(out)
    assert status == 0
    assert report["problems"] == []
    assert report["origin"]["model.base"] == report["origin"]["run.out"] == "set"
    assert report["origin"]["optim.eps"] == "default"
    assert report["recipe"]["model"]["base"] == "pocket"
    bad = rows.with_name("bad.jsonl")
    bad.write_text(rows.read_text() + "{broken\n")
    status, out, _ = run(capsys, "check", *[bad if word is rows else word for word in words])
    assert status == 1
    assert "bad.jsonl:13" in out


def test_train_gives_one_json_document_and_a_whole_run_folder(capsys, rows, tmp_path):
    words = ["train", "--method", "sft", "--model", "pocket", "--data", rows, "--out", tmp_path / "run", "--set", "run.steps=2"]
    status, out, err = run(capsys, *words, "--set", "run.samples=1", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert set(result) >= {"run", "steps", "final", "metrics", "best", "seconds", "tokens_per_s", "receipt"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "ledger.json", "checkpoints", "final", "report.json", "report.html", "receipt.json", "metrics.jsonl"} <= names
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    expected = {"step", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_s", "seconds", "memory_gb"}
    assert expected <= set(row)
    assert "# from: default" in (tmp_path / "run/recipe.yaml").read_text()

    status, out, _ = run(capsys, "verify", tmp_path / "run", "--json")
    assert status == 0
    assert json.loads(out)["passed"] is True

    status, out, _ = run(capsys, "generate", tmp_path / "run", "--prompt", "Say 3.", "--greedy", "--max-new-tokens", "5")
    assert status == 0
    line = json.loads(out)
    assert line["prompt"] == "Say 3."
    completion = line["completions"][0]
    assert len(completion["ids"]) == len(completion["logprobs"]) <= 5
    assert completion["stop_reason"] in ("stop", "length")

    status, out, _ = run(capsys, "eval", tmp_path / "run", "--tasks", "perplexity", "--data", rows, "--json")
    assert status == 0
    [score] = json.loads(out)["scores"]
    assert set(score) >= {"task", "metric", "value", "n", "low", "high", "base_value", "seed"}
    assert score["low"] <= score["value"] <= score["high"]
    assert score["base_value"] is not None


def test_verify_sees_a_changed_file(capsys, rows, tmp_path):
    words = ["train", "--method", "sft", "--model", "pocket", "--data", rows, "--out", tmp_path / "run", "--set", "run.steps=1"]
    assert run(capsys, *words, "--set", "run.samples=0")[0] == 0
    card = tmp_path / "run/final/tunesmith.json"
    card.write_text(card.read_text().replace("pocket", "other"))
    status, out, _ = run(capsys, "verify", tmp_path / "run", "--json")
    assert status == 1
    assert json.loads(out)["changed_files"] == ["tunesmith.json"]


def test_the_schema_is_a_json_schema_of_recipes(capsys):
    status, out, _ = run(capsys, "schema")
    assert status == 0
    schema = json.loads(out)
    assert {"model", "data", "objective", "tokens", "optim", "run", "stages"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_doctor_says_what_this_machine_can_do(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    assert {"torch", "transformers", "device", "cpu", "memory_gb"} <= set(json.loads(out))
