"""The pieces of the report page: every value escaped, no scripts, nothing fetched from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--panel:#f6f7f9;--ink:#14181f;--soft:#5c6675;--rule:#e2e6eb;--tuned:#0b62d6;
--base:#c2571a;--good:#12734a;--bad:#b3261e;--good-wash:#e5f4ec;--bad-wash:#fbeae9}
@media (prefers-color-scheme:dark){:root{--paper:#111418;--panel:#191e25;--ink:#e8ecf1;--soft:#97a3b3;--rule:#2a313b;--tuned:#6cb0ff;
--base:#f0985c;--good:#62d39b;--bad:#ff8f85;--good-wash:#16301f;--bad-wash:#371c1b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1040px;margin:0 auto;padding:44px 28px 72px}
h1{font-size:28px;line-height:1.2;letter-spacing:-.015em;margin:0 0 6px}
h2{font-size:17px;letter-spacing:-.005em;margin:48px 0 14px}
h3{font-size:14px;margin:28px 0 10px}
h2 small{font-weight:400;font-size:13px;color:var(--soft);margin-left:8px;letter-spacing:0}
p{margin:0 0 12px;max-width:72ch}.soft,figcaption,dt{color:var(--soft)}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:12.5px}
.facts{display:flex;flex-wrap:wrap;gap:4px 22px;margin:14px 0 0;padding:0;color:var(--soft);font-size:13.5px}
.facts b{color:var(--ink);font-weight:600}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:500;color:var(--soft);text-align:left;font-size:12.5px;padding:0 16px 8px 0;border-bottom:1px solid var(--rule);
vertical-align:bottom}
td{padding:9px 16px 9px 0;border-bottom:1px solid var(--rule);vertical-align:top}
.scores td{vertical-align:middle}
th:last-child,td:last-child{padding-right:0}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.scores .value{font-size:17px;font-weight:600}.scores .range{color:var(--soft);font-size:12.5px;display:block}
.scores .task{font-weight:600}.scores .task span{display:block;font-weight:400;color:var(--soft);font-size:12.5px}
.better{color:var(--good)}.worse{color:var(--bad)}
.bars{width:190px}.bars svg{display:block;width:190px;height:34px}
.whisker{stroke-width:3;stroke-linecap:round;opacity:.45}
.key{display:inline-flex;gap:16px;font-size:12.5px;color:var(--soft);margin:0 0 10px}
.key i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:6px}
.curves{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:18px 22px}
.curves figure{margin:0}.curves .wide-figure{grid-column:1/-1}.curves svg{display:block;width:100%;height:auto}
.curves svg text{font-family:inherit}
.sample{border:1px solid var(--rule);border-radius:8px;margin:0 0 16px;overflow:hidden;break-inside:avoid}
.sample>div{padding:12px 16px}.sample .ask{background:var(--panel);border-bottom:1px solid var(--rule)}
.sample .pair{display:grid;grid-template-columns:1fr 1fr;padding:0}
.sample .pair>div{padding:12px 16px;min-width:0}.sample .pair>div+div{border-left:1px solid var(--rule)}
.sample .truth{border-top:1px solid var(--rule);color:var(--soft)}
.sample h3{font-size:12.5px;font-weight:500;color:var(--soft);margin:0 0 6px;display:flex;flex-wrap:wrap;gap:6px 8px;align-items:center}
.sample pre,.block{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;max-height:340px;overflow:auto}
.mark{border-radius:4px;padding:0 7px;font-size:12px;font-weight:600;line-height:19px}
.mark.yes{background:var(--good-wash);color:var(--good)}.mark.no{background:var(--bad-wash);color:var(--bad)}
.mark.part{background:var(--panel);color:var(--soft)}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:5px 18px;margin:0;font-size:13.5px}
dd{margin:0;overflow-wrap:anywhere}
details{border-top:1px solid var(--rule)}details:last-of-type{border-bottom:1px solid var(--rule)}
summary{cursor:pointer;padding:10px 0;font-weight:500}details>*:not(summary){margin-bottom:16px}
.block{background:var(--panel);border-radius:8px;padding:14px 16px;max-height:560px}
details>.block{margin-bottom:18px}
.meter{display:flex;height:10px;border-radius:3px;overflow:hidden;background:var(--panel);margin:6px 0 0}
.meter span{display:block;height:100%}
footer{margin-top:56px;color:var(--soft);font-size:12.5px}
@media (max-width:720px){main{padding:28px 18px 48px}.curves,.sample .pair{grid-template-columns:minmax(0,1fr)}
.sample .pair>div+div{border-left:0;border-top:1px solid var(--rule)}
.curves .wide-figure{overflow-x:auto}.curves .wide-figure svg{min-width:560px}.curves figure:not(.wide-figure) svg{max-width:330px}}
@media print{:root{--paper:#fff;--panel:#f6f7f9;--ink:#000;--soft:#444;--rule:#ccc;--tuned:#0b62d6;--base:#c2571a;
--good:#12734a;--bad:#b3261e;--good-wash:#e5f4ec;--bad-wash:#fbeae9}body{font-size:11pt}main{max-width:none;padding:0}
details::details-content{content-visibility:visible;block-size:auto}.block,.sample pre{max-height:none}
h2{break-after:avoid}tr,figure{break-inside:avoid}}
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def head(title: str, subtitle: str, facts: Mapping[str, Any]) -> str:
    """The title and the few facts that a reader wants first."""
    words = "".join(f"<span>{escape(name)} <b>{escape(str(value))}</b></span>" for name, value in facts.items() if value not in (None, ""))
    said = f'<p class="soft">{escape(subtitle)}</p>' if subtitle else ""
    return f'<header><h1>{escape(title)}</h1>{said}<div class="facts">{words}</div></header>'


def section(title: str, body: str, note: str = "") -> str:
    """A headed part, or nothing when it would be empty."""
    small = f" <small>{escape(note)}</small>" if note else ""
    return f"<section><h2>{escape(title)}{small}</h2>\n{body}</section>" if body else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Iterable[int] = (), kind: str = "") -> str:
    """A table of ready HTML cells; `numeric` columns are set to the right."""
    right = set(numeric)
    top = "".join(f'<th scope="col"{_right(place in right)}>{escape(name)}</th>' for place, name in enumerate(columns))
    lines = "".join(
        "<tr>" + "".join(f"<td{_right(place in right)}>{cell}</td>" for place, cell in enumerate(row)) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{lines}</tbody></table></div>' if rows else ""


def facts(values: Mapping[str, Any]) -> str:
    """Names and values as a definition list; nested mappings get dotted names."""
    rows = "".join(f'<dt>{escape(name)}</dt><dd class="mono">{escape(text)}</dd>' for name, text in _flat(values))
    return f"<dl>{rows}</dl>" if rows else ""


def folded(title: str, body: str) -> str:
    """A part that opens at a click, and stands open on paper."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def block(text: str) -> str:
    """Preformatted text that wraps."""
    return f'<pre class="block">{escape(text)}</pre>' if text.strip() else ""


def said(text: str) -> str:
    """What a model said, as HTML: invisible characters are shown, and runs of blank lines, at its end too, are counted instead."""
    plain = "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text)
    if not plain.strip():
        return f'<span class="soft">({len(plain)} blank characters)</span>' if plain else '<span class="soft">(nothing)</span>'
    body = plain.rstrip()
    out = "".join(_lines(part) if place % 2 else escape(part) for place, part in enumerate(re.split(r"(\n(?:[ \t]*\n){3,})", body)))
    after = plain[len(body) :].count("\n")
    return out + (f' <span class="soft">⏎ × {after}</span>' if after else "")


def _lines(run: str) -> str:
    return f'\n<span class="soft">⏎ × {run.count(chr(10))}</span>\n'


def mark(grade: float, word: str = "") -> str:
    """A small badge: right, wrong, or the fraction in between; with a word, that word ticked or crossed."""
    kind = "yes" if grade >= 1 else "no" if grade <= 0 else "part"
    said = {"yes": "right", "no": "wrong", "part": f"{grade:.2f}"}[kind]
    text = f"{ {'yes': '✓', 'no': '✗', 'part': said}[kind] } {word}" if word else said
    return f'<span class="mark {kind}" title="{escape(said)}">{escape(text)}</span>'


def _right(yes: bool) -> str:
    return ' class="num"' if yes else ""


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, str):
            yield f"{before}{name}", value
        else:
            yield f"{before}{name}", json.dumps(value, ensure_ascii=False, default=str)
