"""Where to grow: runs of free pages that make a wanted number of blocks usable.

Pure functions over the geometry, the page table and the free runs. A run is filled from its start,
next to what is backed already, so that the block that straddles the two becomes usable; it ends
with the page that completes the last wanted block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kvcached.errors import OutOfPages
from kvcached.layout import Geometry, cdiv
from kvcached.runs import FreeRuns


class Fit(NamedTuple):
    """Backing pages ``[first, first + pages)`` makes ``blocks`` more blocks usable."""

    first: int
    pages: int
    blocks: int


def fit(g: Geometry, page: Any, run: tuple[int, int], wanted: int) -> Fit | None:
    """The part of a free run that serves up to ``wanted`` blocks; ``None`` if it serves none.

    ``page`` is the page table: 0 where nothing is backed.
    """
    first, end, page_bytes, block_bytes = run[0], run[0] + run[1], g.page_bytes, g.block_bytes
    start, over = divmod(first * page_bytes, block_bytes)
    if over and not _backed(page, start * block_bytes // page_bytes, first):
        start += 1
    stop, over = divmod(end * page_bytes, block_bytes)
    if over and stop < g.num_blocks and _backed(page, end, g.pages_of(stop).stop):
        stop += 1
    stop = min(stop, g.num_blocks, start + wanted)
    if stop <= start:
        return None
    low = max(first, start * block_bytes // page_bytes)
    high = min(end, -(-stop * block_bytes // page_bytes))
    return Fit(low, high - low, stop - start) if high > low else None


def plan(g: Geometry, page: Any, runs: FreeRuns, wanted: int) -> list[tuple[int, int]]:
    """Runs whose backing makes at least ``wanted`` more blocks usable; few and well fitting.

    Raises ``OutOfPages`` if the address space has no room for them.
    """
    nbytes, page_bytes = wanted * g.block_bytes, g.page_bytes
    pages = nbytes // page_bytes
    if nbytes == pages * page_bytes:
        # Blocks that are whole pages, nearly always: then nothing straddles, and ``fit`` says the
        # same of a run that begins with a block and is long enough.
        first, count = runs.best(pages) or (0, 0)
        start = first * page_bytes
        inside = start + nbytes <= g.num_blocks * g.block_bytes
        if inside and pages <= count and start % g.block_bytes == 0:
            return [(first, pages)]
    pages = max(1, cdiv(nbytes, page_bytes) - 1)  # a straddling page may exist
    best = runs.best(pages)
    got = fit(g, page, best, wanted) if best else None
    if got is not None and got.blocks >= wanted:
        return [(got.first, got.pages)]
    chosen: list[Fit] = []
    missing = wanted
    for run in runs.candidates(pages):
        got = fit(g, page, run, missing)
        if got is None:
            continue
        if got.blocks >= wanted:
            return [(got.first, got.pages)]
        chosen.append(got)
        missing -= got.blocks
        if missing <= 0:
            return [(f.first, f.pages) for f in chosen]
    return _patch(g, page, runs, wanted)


def chop(g: Geometry, run: tuple[int, int], most: int) -> Iterator[tuple[int, int]]:
    """Cut a run into pieces of at most ``most`` pages, at ends of blocks where that is possible."""
    first, end = run[0], run[0] + run[1]
    while first < end:
        stop = min(end, first + most)
        if stop < end:
            aligned = stop * g.page_bytes // g.block_bytes * g.block_bytes // g.page_bytes
            stop = aligned if aligned > first else stop
        yield first, stop - first
        first = stop


def _patch(g: Geometry, page: Any, runs: FreeRuns, wanted: int) -> list[tuple[int, int]]:
    """As ``plan``, block by block, those that need the fewest pages first.

    Finds also a block that needs pages of two runs, with something backed between them. Pages that
    are neither backed nor free are in transit: blocks on them cannot be had now.
    """
    free = np.zeros(g.num_pages, np.bool_)
    for start, count in runs:
        free[start : start + count] = True
    edges = np.arange(g.num_blocks + 1, dtype=np.int64) * g.block_bytes
    first, end = edges[:-1] // g.page_bytes, -(-edges[1:] // g.page_bytes)
    holes, transit = _sums(page == 0), _sums((page == 0) & ~free)
    missing = np.where(transit[end] == transit[first], holes[end] - holes[first], 0)
    blocks = np.flatnonzero(missing)
    if len(blocks) < wanted:
        raise _no_room(g, wanted)
    wants = np.zeros(g.num_pages, np.bool_)
    for block in blocks[np.argsort(missing[blocks], kind="stable")][:wanted]:
        wants[first[block] : end[block]] = True
    edge = np.flatnonzero(np.diff(wants & (page == 0), prepend=False, append=False))
    return [(int(a), int(b - a)) for a, b in zip(edge[::2], edge[1::2], strict=True)]


def _sums(mask: Any) -> Any:
    """How many are set before each index, and in all."""
    return np.concatenate(([0], np.cumsum(mask)))


def _no_room(g: Geometry, wanted: int) -> OutOfPages:
    return OutOfPages(
        f"the address space has no room for {wanted} more blocks "
        f"({g.num_blocks} blocks of {g.block_bytes * g.num_planes} bytes in all)",
        hint="Free sequences, or make the cache with a larger max_tokens.",
    )


def _backed(page: Any, first: int, end: int) -> bool:
    return all(page[p] for p in range(first, end))
