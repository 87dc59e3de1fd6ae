"""report.json and report.html: what came out, from what, and how far to trust it, in one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from tunesmith.core import files
from tunesmith.core.types import Score
from tunesmith.evals import page
from tunesmith.evals.curves import curves, picture
from tunesmith.evals.result import Result, gap, gap_span, number, p_text, places, span
from tunesmith.evals.stats import Interval

_ROLES = {"assistant": "var(--tuned)", "user": "var(--soft)", "system": "var(--base)", "tool": "var(--good)"}


def write_report(
    folder: Path,
    *,
    title: str,
    subtitle: str = "",
    facts: Mapping[str, Any] | None = None,
    scores: Sequence[Score | Result] = (),
    metrics: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    ledger: Mapping[str, Any] | None = None,
    recipe_yaml: str = "",
    receipt: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    names: tuple[str, str] = ("base", "tuned"),
) -> Path:
    """Write report.json and report.html into `folder`, each whole or not at all; the path of the page.

    metrics are the rows of metrics.jsonl; samples those of `result.sample_row`; ledger what ledger.json holds; notes are sentences that
    belong above the numbers (rows left out, a comparison that could not be made); names call the two models.
    Every part may be empty and is then left out. Raises CapacityError when the disk is full.
    """
    results = [score if isinstance(score, Result) else Result(score) for score in scores]
    written = datetime.now(UTC)
    value = {
        "title": title,
        "written": written.isoformat(timespec="seconds"),
        "facts": dict(facts or {}),
        "notes": list(notes),
        "scores": [result.as_dict() for result in results],
        "samples": [dict(sample) for sample in samples],
        "last": dict(metrics[-1]) if metrics else {},
        "ledger": dict((ledger or {}).get("totals") or ledger or {}),
        "recipe": recipe_yaml,
        "receipt": dict(receipt or {}),
        "environment": dict(environment or {}),
    }
    body = [
        page.head(title, subtitle, {**(facts or {}), "written": f"{written:%Y-%m-%d %H:%M} UTC"}),
        "".join(f"<p>{escape(note)}</p>" for note in notes),
        page.section("Results", _scores(results, names), _scores_note(results)),
        page.section("Curves", _curves(metrics)),
        page.section("Samples", _samples(samples, names), "prompts that were held out" if samples else ""),
        page.section("Data", _ledger(ledger or {})),
        page.section("How it was made", _making(recipe_yaml, receipt or {}, environment or {})),
        "<footer>Written by tunesmith. The numbers of this page are in report.json beside it.</footer>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "report.json", _plain(value))
    files.write_text(folder / "report.html", page.document(title, body))
    return folder / "report.html"


def environment(device: str = "") -> dict[str, Any]:
    """What a result may depend on outside the recipe: versions, device, threads."""
    import platform
    from importlib import metadata

    import torch

    from tunesmith.model import native

    versions = {}
    for package in ("tunesmith", "torch", "transformers", "peft", "tokenizers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    place: dict[str, Any] = {"device": device or ("cuda" if gpu else "cpu"), **({"gpu": gpu} if gpu else {})}
    place |= {"threads": torch.get_num_threads(), "native": "compiled" if native.kernels(torch.float32) else "off"}
    return {"python": platform.python_version(), **versions, **place, "system": f"{platform.system()} {platform.machine()}"}


def _scores_note(scores: Sequence[Result]) -> str:
    if not scores:
        return ""
    seeds = sorted({result.score.seed for result in scores})
    return f"value and 95 % interval; seed {', '.join(map(str, seeds))}"


def _scores(scores: Sequence[Result], names: tuple[str, str]) -> str:
    if not scores:
        return ""
    paired = any(result.score.base_value is not None for result in scores)
    rows = []
    for result in scores:
        score = result.score
        row = [f'<div class="task">{escape(score.task)}<span>{escape(_reading(result))}</span></div>', str(score.n)]
        if paired:
            row.append(_value(score.base_value, result.base, result))
        row += [_value(score.value, Interval(score.value, score.low, score.high, score.n), result), _bars(result)]
        if paired:
            row.append(_change(result))
        rows.append(row)
    columns = ["Task", "n", *([names[0]] if paired else []), names[1], "", *(["difference"] if paired else [])]
    key = "".join(
        f'<span><i style="background:var(--{kind})"></i>{escape(name)}</span>' for kind, name in zip(("base", "tuned"), names, strict=True)
    )
    place = {1, 2, 3, 5} if paired else {1, 2}
    return (f'<div class="key">{key}</div>' if paired else "") + page.table(columns, rows, numeric=place, kind="scores")


def _reading(result: Result) -> str:
    way = "higher is better" if result.better == "higher" else "lower is better"
    return f"{result.score.metric.replace('_', ' ')}, {way}" if result.score.metric != result.score.task else way


def _value(value: float | None, ends: Interval | None, result: Result) -> str:
    if value is None:
        return "–"
    decimals = result.decimals if ends else min(result.decimals, places(0, value) + 1)
    said = f'<span class="value">{number(value, decimals, share=result.share)}</span>'
    return said + (f'<span class="range">{span(ends.low, ends.high, result.decimals, share=result.share)}</span>' if ends else "")


def _change(result: Result) -> str:
    if result.difference is None:
        return "–"
    sure = result.change if result.change != "unclear" else ""
    said = f"{gap_span(result.difference, share=result.share)}; {p_text(result.difference.p_value)}"
    return f'<span class="value {sure}">{gap(result.difference, share=result.share)}</span><span class="range">{escape(said)}</span>'


def _bars(result: Result) -> str:
    score = result.score
    lines = [("tuned", score.value, score.low, score.high)]
    if score.base_value is not None:
        ends = result.base or Interval(score.base_value, score.base_value, score.base_value, score.n)
        lines.insert(0, ("base", ends.value, ends.low, ends.high))
    least, most = (0.0, 1.0) if result.share else (min(line[2] for line in lines), max(line[3] for line in lines))
    room = 0.0 if result.share else 0.08 * (most - least or 1.0)
    left, width = least - room, (most - least) + 2 * room
    drawn = []
    for place, (kind, value, low, high) in enumerate(lines):
        x = [6 + 178 * (point - left) / width for point in (low, value, high)]
        y = 17 if len(lines) == 1 else 10 + 14 * place
        drawn.append(
            f'<line x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="{y}" y2="{y}" class="whisker" stroke="var(--{kind})"/>'
            f'<circle cx="{x[1]:.1f}" cy="{y}" r="4" fill="var(--{kind})"/>'
        )
    frame = '<line x1="6" x2="184" y1="33" y2="33" stroke="var(--rule)"/>'
    if result.share:
        frame += "".join(f'<line x1="{x}" x2="{x}" y1="30" y2="33" stroke="var(--rule)"/>' for x in (6, 95, 184))
    return f'<div class="bars"><svg viewBox="0 0 190 34" aria-hidden="true">{frame}{"".join(drawn)}</svg></div>'


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    drawn = [
        f'<figure class="{"wide-figure" if curve.wide else ""}">{picture(curve, f"curve{place}")}</figure>'
        for place, curve in enumerate(curves(metrics))
    ]
    return f'<div class="curves">{"".join(drawn)}</div>' if drawn else ""


def _samples(samples: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> str:
    out = []
    for sample in samples:
        truth = str(sample.get("truth") or "")
        sides = [_side(names[1], str(sample["tuned"]), sample.get("grades"), truth)]
        if sample.get("base") is not None:
            sides.insert(0, _side(names[0], str(sample["base"]), sample.get("base_grades"), truth))
        key = f'<span class="mono">{escape(str(sample.get("key", "")))}</span>'
        ask = f'<div class="ask"><h3>prompt {key}</h3><pre>{escape(str(sample["prompt"]))}</pre></div>'
        wanted = f'<div class="truth"><h3>expected</h3><pre>{escape(truth)}</pre></div>' if truth else ""
        both = f'<div class="pair">{"".join(sides)}</div>' if len(sides) == 2 else sides[0]
        out.append(f'<div class="sample">{ask}{both}{wanted}</div>')
    return "\n".join(out)


def _side(name: str, answer: str, grades: Mapping[str, float] | None, truth: str) -> str:
    # Without grades only an answer equal to the truth is marked: a different one may be as good.
    known = grades if grades else {"": 1.0} if truth and answer.strip() == truth.strip() else {}
    return f"<div><h3>{escape(name)} {_marks(known)}</h3><pre>{page.said(answer)}</pre></div>"


def _marks(grades: Mapping[str, float]) -> str:
    return "".join(page.mark(value, "" if len(grades) == 1 else name.replace("_", " ")) for name, value in grades.items())


def _ledger(ledger: Mapping[str, Any]) -> str:
    if "totals" not in ledger:
        return page.facts(ledger)
    totals = ledger["totals"]
    parts = page.table(
        ["source", "split", "format", "read", "used", "refused", "dropped", "rows", "tokens", "trained"],
        [
            [f'<span class="mono">{escape(str(part["source"]))}</span>', escape(part["split"]), escape(part["format"])]
            + [f"{part[name]:,}" for name in ("read", "used", "refused", "dropped", "rows", "tokens")]
            + [f"{sum(part['trained'].values()):,}"]
            for part in ledger["parts"]
        ],
        numeric=range(3, 10),
    )
    reasons = [(part, reason) for part in ledger["parts"] for reason in part["reasons"]]
    why = page.table(
        ["rows", "what", "why", "which"],
        [
            [
                f"{reason['count']:,}",
                escape(reason["fate"]),
                f"{escape(reason['message'])}",
                f'<span class="mono">{escape(_some(reason))}</span>',
            ]
            for _, reason in sorted(reasons, key=lambda pair: -pair[1]["count"])
        ],
        numeric={0},
    )
    seen = ledger.get("overlap")
    warning = f"<p class=worse>{int(seen):,} validation rows are also trained on.</p>" if seen else ""
    return parts + warning + _roles(totals["trained"], totals["untrained"]) + (f"<h3>Rows with a reason</h3>{why}" if why else "")


def _roles(trained: Mapping[str, int], untrained: Mapping[str, int]) -> str:
    roles = [role for role in dict.fromkeys([*trained, *untrained]) if trained.get(role, 0) + untrained.get(role, 0)]
    whole = sum(trained.values()) + sum(untrained.values())
    if not whole:
        return ""
    rows = [
        [
            escape(role),
            f"{trained.get(role, 0):,}",
            f"{untrained.get(role, 0):,}",
            _meter(trained.get(role, 0), untrained.get(role, 0), whole),
        ]
        for role in roles
    ]
    rows.append(
        [
            "all",
            f"{sum(trained.values()):,}",
            f"{sum(untrained.values()):,}",
            f'<span class="soft">{100 * sum(trained.values()) / whole:.1f} % trained</span>',
        ]
    )
    return "<h3>Tokens by role</h3>" + page.table(["role", "trained", "context", ""], rows, numeric={1, 2})


def _meter(trained: int, context: int, whole: int) -> str:
    return (
        f'<div class="meter"><span style="width:{100 * trained / whole:.2f}%;background:var(--tuned)"></span>'
        f'<span style="width:{100 * context / whole:.2f}%;background:var(--soft);opacity:.35"></span></div>'
    )


def _some(reason: Mapping[str, Any]) -> str:
    shown = [str(key) for key in reason["keys"][:5]]
    return ", ".join(shown) + (f", and {reason['count'] - len(shown):,} more" if reason["count"] > len(shown) else "")


def _making(recipe_yaml: str, receipt: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    hashes = {name: value for name, value in receipt.items() if name not in ("probes", "environment")}
    return (
        page.folded("Recipe, resolved", page.block(recipe_yaml))
        + page.folded("Environment", page.facts(environment))
        + page.folded("Receipt", page.facts(hashes))
    )


def _plain(value: Any) -> Any:
    """The value with NaN and infinity, which JSON does not know, as null, and other things as their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)
