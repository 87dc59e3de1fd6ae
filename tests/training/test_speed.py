"""What a run says of its speed."""

import json
import time
from pathlib import Path

import pytest

from tunesmith.core.load import build
from tunesmith.model.flops import Gemm, Work
from tunesmith.training.run import train
from tunesmith.training.speed import Gauge, process_start, summary


def test_the_share_of_the_ceiling_is_weighted_by_time_and_the_median_is_of_steps():
    names = ("mfu", "tflops", "seconds", "tokens_per_s")
    rows = [dict(zip(names, row, strict=True)) for row in ((0.1, 1.0, 9.0, 10), (0.5, 5.0, 1.0, 50), (0.1, 1.0, 0.0, 12))]
    found = summary([{**rows[0], "first_step_seconds": 3.0}, *rows[1:], {"eval/loss": 1.0}])
    assert found == pytest.approx({"mfu": 0.14, "tflops": 1.4, "median_tokens_per_s": 12, "first_step_seconds": 3.0})
    assert summary([]) == {}


def test_steps_are_held_against_all_processes_together():
    gauge = Gauge(Work(0, 0, (0, 0), ()), Gemm(1e12, 512, "float32"), ceiling=2e12)
    assert gauge.of([], 1.0) == {"tflops": 0.0, "mfu": 0.0}
    assert gauge.as_dict()["gemm_tflops"] == 2.0


def test_the_process_began_before_now_and_not_long_ago():
    assert 0 < time.perf_counter() - process_start() < 24 * 3600
    assert process_start() == pytest.approx(process_start(), abs=0.01)


def test_every_step_and_the_receipt_say_how_fast(tree):
    result = train(build(tree("lora", steps=4, save_every=2, eval_every=0)).recipe)
    rows = [json.loads(line) for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert all(row["tflops"] > 0 and row["mfu"] > 0 for row in rows)
    assert ["first_step_seconds" in row for row in rows] == [True, False, False, False]
    assert rows[0]["first_step_seconds"] >= rows[0]["seconds"]
    receipt = json.loads((Path(result["run"]) / "receipt.json").read_text())
    assert receipt["speed"] == result["speed"]
    assert set(receipt["speed"]) >= {"formula", "weights", "not_counted", "gemm", "gemm_tflops", "tflops", "mfu", "median_tokens_per_s"}
    ratio = receipt["speed"]["tflops"] / receipt["speed"]["gemm_tflops"]
    assert receipt["speed"]["mfu"] == pytest.approx(ratio)
    assert "model FLOPs utilisation" in (Path(result["run"]) / "report.html").read_text()
