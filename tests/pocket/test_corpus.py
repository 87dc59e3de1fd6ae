"""The corpus script: the same from the same seed, held-out parts apart, and no answers in it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.core.load import load_recipe
from tunesmith.pocket import tickets

ROOT = Path(__file__).parents[2]


def _write(folder: Path, seed: int = 0) -> dict[str, list[str]]:
    command = [sys.executable, ROOT / "scripts/pocket/corpus.py", "--out", folder, "--seed", str(seed), "--megabytes", "2"]
    subprocess.run(command, check=True, capture_output=True)
    read = {part: (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines() for part in ("train", "valid")}
    return {part: [json.loads(line)["text"] for line in lines] for part, lines in read.items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("corpus"))


def test_corpus_depends_on_the_seed_alone(corpus, tmp_path):
    assert _write(tmp_path / "again") == corpus
    assert _write(tmp_path / "other", seed=1)["valid"] != corpus["valid"]


def test_no_document_is_written_twice_or_held_out_and_trained(corpus):
    assert len(set(corpus["train"])) == len(corpus["train"])
    assert not set(corpus["train"]) & set(corpus["valid"])


def test_corpus_teaches_neither_answers_nor_the_demo(corpus):
    for text in corpus["train"] + corpus["valid"]:
        assert "<|im_start|>assistant" not in text
        assert '"category"' not in text
        assert '"urgency"' not in text


def test_corpus_holds_no_ticket_sentence_of_the_demo(corpus):
    rows = tickets.test_rows(300, 0) + tickets.training_rows(300, 0)
    frames = {line for line in tickets.frames("train") | tickets.frames("test") if len(re.sub(r"\{[^}]*\}", "", line).split()) > 2}
    rules = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts/pocket/grammar").glob("*.txt")).splitlines()
    assert not frames & {part.strip() for line in rules for part in line.split(" | ")}
    text = set(corpus["train"])
    assert not [row for row in rows if row["messages"][1]["content"] in text]


def test_sums_of_the_corpus_are_right(corpus):
    found = [match.groups() for text in corpus["train"] for match in re.finditer(r"\b(\d+) ([-+x/]) (\d+) = (\d+)\b", text)]
    work = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": int.__floordiv__}
    assert len(found) > 500
    assert all(work[sign](int(a), int(b)) == int(c) for a, sign, b, c in found)


def test_recipe_names_what_the_scripts_write():
    (loaded,) = load_recipe(ROOT / "recipes/pretrain-pocket.yaml")
    recipe = loaded.recipe
    assert recipe.model.init == "random"
    assert (ROOT / recipe.model.base / "config.json").is_file()
    assert recipe.data.train[0].path == "runs/pocket-corpus/train.jsonl"
