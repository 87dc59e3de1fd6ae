"""The report page: complete, escaped, and in need of nothing else."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith.core.types import Score
from tunesmith.evals import page
from tunesmith.evals.curves import curves, smooth
from tunesmith.evals.report import environment, write_report
from tunesmith.evals.result import Result, gap, number, places, sample_row, span
from tunesmith.evals.stats import Difference, Interval
from tunesmith.evals.terminal import score_table

EVIL = '<script>alert("1")</script> & \'"'
RIGHT = Result(
    Score("json_valid", "valid", 0.985, 200, 0.957, 0.995, 0, 0.005),
    Interval(0.005, 0.001, 0.028, 200),
    Difference(0.98, 0.96, 0.995, 1e-9, 200),
)
WORSE = Result(
    Score("general", "perplexity", 6.64, 200, 6.45, 6.81, 7, 6.42),
    Interval(6.42, 6.25, 6.59, 200),
    Difference(0.211, 0.199, 0.223, 0.001, 200),
)
METRICS = [{"step": step, "loss": 3.0 / step, "lr": 2e-4, "grad_norm": 1.0, "tokens_per_s": 5.0, "eval/loss": 1.0} for step in range(1, 60)]
LEDGER = {
    "totals": {"read": 3, "trained": {"assistant": 40}, "untrained": {EVIL: 60}},
    "overlap": 2,
    "parts": [
        {
            **dict.fromkeys(("read", "used", "refused", "dropped", "rows", "tokens"), 3),
            **{"source": EVIL, "split": "train", "format": "messages", "trained": {"assistant": 40}},
            "reasons": [{"fate": "dropped", "code": "x", "message": EVIL, "count": 9, "keys": [EVIL] * 7}],
        }
    ],
}


class Reader(HTMLParser):
    """Collects tags, and fails on one that is closed out of order."""

    VOID = ("meta", "line", "circle", "path", "use", "br", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = sample_row(EVIL, EVIL, EVIL, EVIL, {"json_valid": 1, EVIL: 0.5}, base="", base_grades={"json_valid": 0})
    return write_report(
        tmp_path_factory.mktemp("run"),
        title=EVIL,
        subtitle=EVIL,
        facts={EVIL: EVIL},
        scores=[RIGHT, WORSE, Score("loss", "loss", 0.5, 3, 0.4, 0.6, 0)],
        metrics=[*METRICS, {"step": 60, "loss": float("nan")}],
        samples=[sample],
        ledger=LEDGER,
        recipe_yaml=f"a: {EVIL}",
        receipt={"hashes": {"base": EVIL}, "probes": ["left out"]},
        environment={**environment("cpu"), EVIL: EVIL},
        notes=[EVIL],
        names=(EVIL, "ours"),
    )


def test_every_value_is_escaped_and_every_tag_is_closed(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    assert "script" not in reader.tags
    assert "<script" not in html
    assert reader.text.count(EVIL) >= 15


def test_nothing_is_fetched_from_elsewhere(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|src=|<link|<img|url\((?!#)", html)
    for target in re.findall(r'href="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html):
        assert target.startswith("#")
        assert f'id="{target[1:]}"' in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "pictures on one page share no id"


def test_numbers_stand_with_n_interval_and_base(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    for words in (
        "98.5 %",
        "95.7–99.5",
        "0.5 %",
        "+98.0 pp",
        "p &lt; 0.001",
        "6.64",
        "6.45–6.81",
        "+0.211",
        ">200<",
        "seed 0, 7",
    ):
        assert words in html, words
    assert 'class="value better">+98.0' in html
    assert 'class="value worse">+0.211' in html
    assert "40.0 % trained" in html
    assert "2 validation rows are also trained on" in html
    assert "and 4 more" in html


def test_the_json_is_strict_and_has_the_same_numbers(written: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    tree = json.loads((written.parent / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert tree["scores"][0]["value"] == 0.985
    assert tree["scores"][1]["difference"]["p_value"] == 0.001
    assert tree["last"] == {"step": 60, "loss": None}
    assert tree["samples"][0]["prompt"] == EVIL
    assert tree["environment"]["torch"]


def test_an_empty_report_is_a_page_too(tmp_path: Path) -> None:
    html = write_report(tmp_path / "new" / "run", title="nothing").read_text(encoding="utf-8")
    assert "<h1>nothing</h1>" in html
    assert "<h2>" not in html


def test_a_change_within_chance_is_neither_better_nor_worse() -> None:
    assert (RIGHT.change, WORSE.change) == ("better", "worse")
    unclear = Result(RIGHT.score, RIGHT.base, Difference(0.1, -0.1, 0.3, 0.2, 20))
    assert unclear.change == "unclear"


def test_numbers_show_as_many_digits_as_their_interval_supports() -> None:
    assert (places(6.45, 6.81), places(0.0001, 0.0002), places(1000, 3000)) == (2, 5, 0)
    assert number(6.4444, 2) == "6.44"
    assert span(1000.4, 3000.4, 0) == "1,000–3,000"
    assert gap(Difference(-0.025, -0.05, 0.0, 0.04, 100), share=True) == "-2.5 pp"


def test_curves_leave_out_what_was_not_measured() -> None:
    found = curves(METRICS)
    assert [curve.title for curve in found] == ["Loss", "Learning rate", "Gradient norm", "Speed"]
    assert list(found[0].lines) == ["training", "validation"]
    assert found[1].unit == "× 10⁻⁴"
    assert found[1].lines["lr"][0] == (1.0, pytest.approx(2.0))
    assert curves([{"step": 1, "loss": float("inf")}]) == []
    assert smooth([(0, 0.0), (1, 3.0), (2, 6.0), (3, 0.0)], 3) == [(0, 1.5), (1, 3.0), (2, 3.0), (3, 3.0)]


def test_the_terminal_table_shows_base_beside_model_and_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(score_table([RIGHT, WORSE], model="runs/mine", base="[bold]pocket"))
    text = console.export_text()
    assert "[bold]pocket" in text
    assert re.search(r"json_valid valid +200 +0\.5 % \[0\.1–2\.8\] +98\.5 % \[95\.7–99\.5\] +\+98\.0 pp +p < 0\.001", text)
    assert re.search(r"general +200 +6\.42 \[6\.25–6\.59\] +6\.64 \[6\.45–6\.81\] +\+0\.211 +p = 0\.001", text)


def test_what_cannot_be_seen_is_said() -> None:
    assert page.said("a\n\nb") == "a\n\nb"
    assert page.said("a" + "\n" * 40) == 'a <span class="soft">⏎ × 40</span>'
    assert page.said("a" + "\n" * 9 + "<b>") == 'a\n<span class="soft">⏎ × 9</span>\n&lt;b&gt;'
    assert page.said("\x00\x1b") == "␀␛"
    assert page.said(" \n") == '<span class="soft">(2 blank characters)</span>'
    assert page.said("") == '<span class="soft">(nothing)</span>'
