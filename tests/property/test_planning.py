"""``fit`` and ``plan`` keep their word: backing the runs makes that many more blocks usable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached.errors import OutOfPages
from kvcached.layout import Geometry
from kvcached.planning import fit, plan
from kvcached.runs import FreeRuns


@st.composite
def landscapes(draw):
    """A geometry, a page table with holes, and the runs of its unbacked pages."""
    page_bytes = draw(st.integers(1, 12))
    g = Geometry(
        block_bytes=draw(st.integers(1, 40)), num_planes=draw(st.integers(1, 3)),
        num_blocks=draw(st.integers(1, 40)), page_bytes=page_bytes,
    )  # fmt: skip
    page = np.asarray(draw(st.lists(st.booleans(), min_size=g.num_pages, max_size=g.num_pages)))
    runs = FreeRuns(g.num_pages)
    for index in np.flatnonzero(page):
        runs.take(int(index), 1)
    return g, page.astype(np.int32), runs


def usable(g, page):
    return {b for b in range(g.num_blocks) if all(page[p] for p in g.pages_of(b))}


@settings(max_examples=300)
@given(landscapes(), st.integers(1, 45))
def test_a_fit_serves_the_blocks_that_it_promises(landscape, wanted):
    g, page, runs = landscape
    before = usable(g, page)
    for run in runs:
        got = fit(g, page, run, wanted)
        after = page.copy()
        if got is None:
            after[run[0] : run[0] + run[1]] = 1
            assert usable(g, after) == before, "a run that serves a block was turned down"
            continue
        assert run[0] <= got.first and got.first + got.pages <= run[0] + run[1]
        after[got.first : got.first + got.pages] = 1
        assert len(usable(g, after) - before) >= got.blocks
        assert 0 < got.blocks <= wanted


@settings(max_examples=400)
@given(landscapes(), st.integers(1, 45))
def test_a_plan_makes_the_wanted_blocks_usable(landscape, wanted):
    g, page, runs = landscape
    before = usable(g, page)
    if wanted > g.num_blocks - len(before):
        with pytest.raises(OutOfPages, match="no room"):
            plan(g, page, runs, wanted)
        return
    after, taken = page.copy(), 0
    for first, count in plan(g, page, runs, wanted):
        assert not after[first : first + count].any(), "the plan backs a page twice"
        after[first : first + count] = 1
        taken += count
    assert len(usable(g, after) - before) >= wanted
    assert taken <= wanted * (g.block_bytes // g.page_bytes + 2)
