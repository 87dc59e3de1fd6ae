"""The demo, cut short: its parts fit together; its quality is for the demo itself to show."""

import json

import pytest

from tunesmith.demo import alignment
from tunesmith.demo import quickstart as demo
from tunesmith.pocket import answers, chains


def test_the_demo_trains_evaluates_before_and_after_and_writes_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN", 24)
    monkeypatch.setattr(demo, "VALID", 6)
    monkeypatch.setattr(demo, "TEST", 6)
    monkeypatch.setitem(demo.RUN, "epochs", 0.2)
    result = demo.demo(tmp_path / "demo")
    for side in ("before", "after"):
        assert set(result[side]) == {"valid_json", "accuracy", "general_perplexity"}
    assert result["before"]["valid_json"] <= 0.2
    assert 1 < result["before"]["general_perplexity"] < 20
    assert result["intervals"]["accuracy"]["n"] == 6
    page = (tmp_path / "demo/report.html").read_text()
    assert "general_perplexity" in page
    assert json.loads((tmp_path / "demo/report.json").read_text())["samples"]
    demo.print_demo(result)


def repeated(write, count, times):
    """As `write`, but few rows many times: something to learn by heart."""
    return lambda _, seed: write(count, seed) * times


def labelled(rows):
    """Each answer of the pairs alone, with whether it is the better one."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row in rows for side in ("chosen", "rejected")
    ]


def test_the_second_half_learns_what_it_is_measured_on(tmp_path, monkeypatch):
    """Its held-out rows are its training rows here: every stage has to know them, and the saved model has to say what training said."""
    pairs, sums = answers.preference_rows, chains.chain_rows
    monkeypatch.setattr(answers, "preference_rows", repeated(pairs, 16, 4))
    monkeypatch.setattr(answers, "held_out_rows", repeated(pairs, 16, 1))
    monkeypatch.setattr(answers, "labelled_rows", repeated(lambda count, seed: labelled(pairs(count, seed)), 16, 4))
    monkeypatch.setattr(chains, "chain_rows", repeated(sums, 16, 24))
    monkeypatch.setattr(chains, "held_out_chains", repeated(sums, 16, 1))
    result = alignment.align(tmp_path / "demo")
    stages = {row["name"]: row for row in result["stages"]}
    assert list(stages) == ["dpo", "ipo", "simpo", "orpo", "kto", "reward", "prm"]
    for name, row in stages.items():
        assert row["n"] == 16
        assert row["before"] == 0.5 if name in ("dpo", "ipo", "kto") else row["before"] < 0.7, name
        assert row["after"] >= row["before"] + 0.2, name
        assert row["low"] < row["after"] <= row["high"], name
    bins = result["calibration"]
    assert sum(one["n"] for one in bins) == 16
    assert sum(one["n"] * one["right"] for one in bins) / 16 == pytest.approx(stages["reward"]["after"])
    scores = json.loads((tmp_path / "demo/align/report.json").read_text())["scores"]
    assert [(one["task"], one["value"], one["base_value"]) for one in scores] == [(n, r["after"], r["before"]) for n, r in stages.items()]
    alignment.print_align(result)
