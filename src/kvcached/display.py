"""How a cache shows itself: one line for ``repr``, an SVG page map for notebooks.

Page states only, never contents. Runs of equal state are merged, so the picture stays small.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from kvcached.config import format_size
from kvcached.stats import CacheStats

if TYPE_CHECKING:
    from kvcached.cache import KVCache

# Okabe-Ito: distinguishable with any colour vision. Height encodes the state a second time.
_STATES = {
    "in use": ("#0072B2", 1.0),
    "quarantined": ("#CC79A7", 0.8),
    "cached": ("#56B4E9", 0.6),
    "spare": ("#E69F00", 0.35),
}
_ROW_PAGES, _MAX_ROWS, _WIDTH, _ROW_HEIGHT = 512, 64, 640, 10


def summary(stats: CacheStats) -> str:
    """One line: who, how much is backed for what, and of how much."""
    return (
        f"<KVCache {stats.name!r} on {stats.device}: {format_size(stats.backed_bytes)} backed "
        f"({format_size(stats.in_use_bytes)} in use, {format_size(stats.cached_bytes)} cached, "
        f"{format_size(stats.spare_bytes)} spare) of {format_size(stats.limit_bytes)}, "
        f"{stats.sequences} sequences, {format_size(stats.reserved_bytes)} of addresses>"
    )


def line(cache: KVCache) -> str:
    """The line for ``repr``, whatever state the cache is in."""
    if cache.state != "open":
        return f"<KVCache {cache.name!r}, {cache.state}>"
    return summary(cache.stats())


def page_map_html(cache: KVCache) -> str:
    """The line above, a table of bytes, and the page map as inline SVG with a text alternative."""
    if cache.state != "open":
        return escape(line(cache))
    stats, runs = cache.stats(), cache.page_runs()
    sizes = zip(
        _STATES,
        (stats.in_use_bytes, stats.quarantined_bytes, stats.cached_bytes, stats.spare_bytes),
        strict=True,
    )
    legend = " &nbsp; ".join(
        f'<span style="color:{_STATES[name][0]}">&#9632;</span> {name} {format_size(size)}'
        for name, size in sizes
    )
    text = escape(summary(stats))
    return (
        f'<div class="kvcached"><code>{text}</code><br>{_svg(runs, text)}'
        f"<br><small>{legend} &nbsp; one row is {_ROW_PAGES} pages of "
        f"{format_size(stats.page_bytes)}</small></div>"
    )


def _svg(runs: list[tuple[int, int, str]], text: str) -> str:
    """``runs`` are (first page, pages, state), in address order."""
    last = max((first + count for first, count, _ in runs), default=1)
    per_row = _ROW_PAGES * max(1, -(-last // (_ROW_PAGES * _MAX_ROWS)))
    rows = -(-last // per_row)
    shapes = "".join(_shape(piece, per_row) for run in runs for piece in _cut(run, per_row))
    height = rows * _ROW_HEIGHT
    return (
        f'<svg role="img" aria-label="{text}" xmlns="http://www.w3.org/2000/svg" '
        f'width="{_WIDTH}" height="{height}" viewBox="0 0 {per_row} {height}" '
        f'preserveAspectRatio="none"><title>{text}</title>'
        f'<rect width="{per_row}" height="{height}" fill="#8884"/>{shapes}</svg>'
    )


def _cut(run: tuple[int, int, str], per_row: int) -> list[tuple[int, int, str]]:
    first, count, state = run
    pieces = []
    while count > 0:
        step = min(count, per_row - first % per_row)
        pieces.append((first, step, state))
        first, count = first + step, count - step
    return pieces


def _shape(piece: tuple[int, int, str], per_row: int) -> str:
    first, count, state = piece
    colour, share = _STATES[state]
    height = (_ROW_HEIGHT - 1) * share
    y = (first // per_row + 1) * _ROW_HEIGHT - height
    return (f'<rect x="{first % per_row}" y="{y:.1f}" width="{count}" height="{height:.1f}" '
            f'fill="{colour}"/>')  # fmt: skip
