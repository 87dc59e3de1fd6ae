"""The demo, cut short: its parts fit together; its quality is for the demo itself to show."""

import json

from tunesmith import demo


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
