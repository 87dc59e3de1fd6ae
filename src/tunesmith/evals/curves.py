"""Curves of a run as inline SVG, drawn by matplotlib without a display and coloured by the page's own style sheet."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that the page replaces by its own colours, so that one drawing serves light and dark.
_INK, _SOFT, _GRID, _LINE, _BASE = "#010203", "#010204", "#010205", "#010206", "#010207"
_COLOURS = {_INK: "var(--ink)", _SOFT: "var(--soft)", _GRID: "var(--rule)", _LINE: "var(--tuned)", _BASE: "var(--base)"}
_MOST_POINTS = 600
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Curve:
    """One picture: a title, the unit of its axis, and named lines of (step, value)."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    wide: bool = False
    from_zero: bool = False


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The pictures that rows of metrics.jsonl allow: loss, learning rate, gradient norm, speed, and the objective's own."""
    out = [Curve("Loss", "nats per token", _present(metrics, {"training": "loss", "validation": "eval/loss"}), wide=True)]
    out.append(_scaled(Curve("Learning rate", "", _present(metrics, {"lr": "lr"}))))
    rest = (("Gradient norm", "before clipping", "grad_norm"), ("Speed", "tokens per second", "tokens_per_s"))
    out += [Curve(title, unit, _present(metrics, {key: key}), from_zero=True) for title, unit, key in rest]
    for key in ("accuracy", "reward_margin", "score_margin", "kl", "reward"):
        both = {"training": key, "validation": f"eval/{key}"}
        out.append(Curve(key.replace("_", " ").capitalize(), "", _present(metrics, both)))
    return [curve for curve in out if curve.lines]


def picture(curve: Curve, name: str) -> str:
    """The curve as an `<svg>` element; `name` keeps its inner ids apart from those of the page's other pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    words = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9, "path.simplify": True}
    with matplotlib.rc_context(words):
        figure = Figure(figsize=(8.6, 3.0) if curve.wide else (2.86, 2.0), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, curve)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(file.getvalue(), name)


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The running mean over `window` points centred on each (fewer at the ends)."""
    half = window // 2
    out = []
    for place, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, place - half) : place + half + 1]]
        out.append((step, sum(near) / len(near)))
    return out


def _draw(axes: Axes, curve: Curve) -> None:
    axes.set_title(curve.title, loc="left", color=_INK, fontsize=10, fontweight="bold")
    if curve.unit:
        axes.set_title(curve.unit, loc="right", color=_SOFT, fontsize=8)
    for name, points in curve.lines.items():
        _line(axes, name, points, dense=len(points) >= 40 and name not in ("validation", "lr"))
    if len(curve.lines) > 1:
        axes.legend(frameon=False, labelcolor=_SOFT, loc="upper right", fontsize=8, handlelength=1.2)
    axes.set_xlabel("step" if curve.wide else "", color=_SOFT, fontsize=8)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_SOFT, labelsize=8)
    axes.locator_params(axis="x", nbins=8 if curve.wide else 4, integer=True)
    axes.locator_params(axis="y", nbins=5)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.margins(x=0.01)
    if curve.from_zero:
        axes.set_ylim(
            bottom=min(0.0, axes.get_ylim()[0]) if min(value for points in curve.lines.values() for _, value in points) < 0 else 0.0
        )


def _line(axes: Axes, name: str, points: Sequence[tuple[float, float]], *, dense: bool) -> None:
    colour = _BASE if name == "validation" else _LINE
    thin = _thinned(points)
    x, y = [step for step, _ in thin], [value for _, value in thin]
    marker = "o" if len(thin) <= 12 else None
    if not dense:
        axes.plot(x, y, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=name)
        return
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
    even = smooth(thin, max(3, len(thin) // 25))
    axes.plot([step for step, _ in even], [value for _, value in even], color=colour, linewidth=1.8, label=name)


def _scaled(curve: Curve) -> Curve:
    """The curve in units of the power of ten below its largest value, which stands in the unit and not at the axis."""
    most = max((value for points in curve.lines.values() for _, value in points), default=0.0)
    if most <= 0 or 0.1 <= most < 1e5:
        return curve
    power = math.floor(math.log10(most))
    lines = {name: [(step, value / 10.0**power) for step, value in points] for name, points in curve.lines.items()}
    return replace(curve, unit=f"× 10{str(power).translate(_RAISED)}", lines=lines)


def _present(metrics: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    out = {}
    for name, key in keys.items():
        points = [(float(row["step"]), float(row[key])) for row in metrics if isinstance(row.get(key), int | float) and "step" in row]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            out[name] = points
    return out


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS of the points; the last one stays."""
    step = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:step], points[-1]]


def _themed(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r"<(style|metadata)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    # Relative size, and no name space to look up: inside a page both are known.
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    return svg.replace("xlink:href", "href")
