"""The picture: memory over time of both runs, as SVG written by hand.

Stacked areas by engine, the budget as a dashed line, bursts and events as marks. Colours are
Okabe-Ito's; the ground is transparent and text a mid grey, so it reads on light and dark pages.
"""

from __future__ import annotations

from html import escape
from typing import Any

from kvcached.config import format_size
from kvcached.demo.figures import Mark, Point, Recording
from kvcached.demo.workload import ENGINES

WIDTH, HEIGHT = 860, 560
_LEFT, _RIGHT, _TOP, _PANEL, _GAP = 64, 16, 92, 170, 80
_TEXT, _AXIS = "#767676", "#8a8a8a"
_COLOURS = {"chat": ("#0072B2", "#56B4E9"), "code": ("#D55E00", "#E69F00")}
_MOST_POINTS = 400
_LETTER = 5.6
"""About the width of a letter of a mark's label."""


def picture(document: dict[str, Any], static: Recording, elastic: Recording) -> str:
    """The SVG document as text."""
    budget = document["budget_bytes"]
    end = max(_end(static), _end(elastic))
    panels = [
        _panel(recording, budget, end, _TOP + i * (_PANEL + _GAP), title)
        for i, (recording, title) in enumerate(
            ((static, "static split in two"), (elastic, "elastic, one shared budget"))
        )
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="t d" font-family="system-ui, sans-serif" font-size="13" fill="{_TEXT}">'
    )
    title = "Memory of two engines over time, static split and elastic"
    caption = (
        f'<text x="{_LEFT}" y="{HEIGHT - 8}" font-size="11">{escape(_caption(document))}</text>'
    )
    texts = f'<title id="t">{title}</title><desc id="d">{escape(_describe(document))}</desc>'
    return "\n".join([head, texts, _legend(), *panels, caption, "</svg>\n"])


def _end(recording: Recording) -> float:
    return recording.timeline[-1].t if recording.timeline else 1.0


def _x(t: float, end: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * max(0.0, t) / end


def _y(nbytes: float, budget: int, top: float) -> float:
    return top + _PANEL * (1 - nbytes / (1.12 * budget))


def _legend() -> str:
    parts, x = [], _LEFT
    for engine in ENGINES:
        for colour, label in zip(_COLOURS[engine], ("in use", "cached, spare"), strict=True):
            parts.append(
                f'<rect x="{x}" y="12" width="14" height="14" fill="{colour}"/>'
                f'<text x="{x + 20}" y="24">{engine}: {label}</text>'
            )
            x += 160
    return "".join(parts)


def _panel(recording: Recording, budget: int, end: float, top: float, title: str) -> str:
    points = _thinned(recording.timeline)
    base, parts = [0.0] * len(points), []
    for engine in ENGINES:
        for key, colour in zip(("in_use", "rest"), _COLOURS[engine], strict=True):
            upper = [b + _held(p, engine, key) for b, p in zip(base, points, strict=True)]
            parts.append(_area(points, base, upper, colour, budget, end, top))
            base = upper
    line = _y(budget, budget, top)
    bottom, right = top + _PANEL, WIDTH - _RIGHT
    parts.append(
        f'<path d="M{_LEFT} {line:.1f}H{right}" stroke="{_TEXT}" stroke-dasharray="6 4"/>'
        f'<path d="M{_LEFT} {top}V{bottom}H{right}" stroke="{_AXIS}" fill="none"/>'
        f'<text x="{_LEFT}" y="{top - 38}" font-weight="600">{title}</text>'
        f'<text x="{_LEFT - 6}" y="{line + 4:.1f}" text-anchor="end" font-size="11">'
        f"{format_size(budget)}</text>"
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end" font-size="11">0</text>'
    )
    parts += _marks(recording.marks, end, top)
    parts += [_tick(second, end, bottom) for second in range(0, int(end) + 1, 5)]
    return "".join(parts)


def _held(point: Point, engine: str, key: str) -> int:
    stats = point.engines.get(engine, {})
    used = stats.get("in_use", 0)
    return used if key == "in_use" else stats.get("backed", 0) - used


def _thinned(points: list[Point]) -> list[Point]:
    """At most ``_MOST_POINTS`` points; of each group the one that holds most, so peaks stay."""
    size = -(-len(points) // _MOST_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [max(group, key=lambda p: p.total("backed")) for group in groups]


def _area(
    points: list[Point], lower: list[float], upper: list[float], colour: str, budget: int,
    end: float, top: float,
) -> str:  # fmt: skip
    there = _line(points, upper, budget, end, top)
    back = _line(points, lower, budget, end, top)
    if not there:
        return ""
    return f'<path d="M{"L".join(there)}L{"L".join(reversed(back))}Z" fill="{colour}"/>'


def _line(
    points: list[Point], values: list[float], budget: int, end: float, top: float
) -> list[str]:
    pairs = zip(points, values, strict=True)
    return [f"{_x(p.t, end):.1f} {_y(value, budget, top):.1f}" for p, value in pairs]


def _marks(marks: list[Mark], end: float, top: float) -> list[str]:
    """A line and a label for each mark; labels that would overlap go one row up."""
    rows, parts = [-1.0, -1.0, -1.0], []
    for mark in marks:
        x, width = _x(mark.t, end), _LETTER * len(mark.text) + 8
        left = min(x, WIDTH - width)
        row = next((i for i, taken in enumerate(rows) if taken <= left), 0)
        rows[row] = left + width
        colour = _AXIS if mark.text.startswith(("burst", "idle")) else "#CC79A7"
        parts.append(
            f'<path d="M{x:.1f} {top - 4 - 11 * row}V{top + _PANEL}" stroke="{colour}" '
            f'stroke-dasharray="2 3"/><text x="{left + 3:.1f}" y="{top - 5 - 11 * row}" '
            f'font-size="10">{escape(mark.text)}</text>'
        )
    return parts


def _tick(second: int, end: float, bottom: float) -> str:
    place = f'x="{_x(second, end):.1f}" y="{bottom + 15}"'
    return f'<text {place} font-size="10" text-anchor="middle">{second} s</text>'


def _describe(document: dict[str, Any]) -> str:
    static, elastic = document["static"], document["elastic"]
    return (
        f"Two instances of {document['model']} under one budget of "
        f"{format_size(document['budget_bytes'])}. Split in two, memory stays at "
        f"{format_size(static['peak_backed_bytes'])}; {static['requests_queued']} requests wait "
        f"for memory and {static['preemptions']} are preempted. Elastic, memory follows the "
        f"bursts up to {format_size(elastic['peak_backed_bytes'])} (mean "
        f"{format_size(elastic['mean_backed_bytes'])}); {elastic['requests_queued']} requests "
        f"wait and {elastic['preemptions']} are preempted. Then a limit is lowered, and one "
        f"engine is killed and its memory taken by the other."
    )


def _caption(document: dict[str, Any]) -> str:
    machine = document["machine"]
    where = machine.get("gpu") or f"{machine['cpus']} CPUs, {machine['arch']}"
    return (
        f"{document['model']}, {document['dtype']}, {where}, seed {document['seed']}; "
        "kvcached demo --svg"
    )
