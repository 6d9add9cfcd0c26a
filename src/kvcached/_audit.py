"""The slow, plain recount behind ``BlockPool.check()``: everything again from the block states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcached.layout import Geometry

if TYPE_CHECKING:
    from kvcached.blocks import BlockPool


def audit(pool: BlockPool) -> None:
    """Assert that counters, lists and page table agree with the states of all blocks."""
    _audit_pages(pool)
    _audit_states(pool)
    _audit_lists(pool)
    _audit_levels(pool)
    in_use, cached, spare, quarantined = pool.bytes_by_claim()
    total = in_use + cached + spare + quarantined
    assert total == pool.pages.backed_bytes and spare >= 0, "I1: claims do not add up"


def extents_of(pool: BlockPool, block: int) -> set[int]:
    """Ids of the extents that a block touches; 0 stands for an unbacked page."""
    return {int(pool.page[p]) for p in pool.geometry.pages_of(block)}


def _audit_pages(pool: BlockPool) -> None:
    want = {p: e.id for e in pool.pages.extents.values() for p in range(e.first, e.first + e.pages)}
    got = {int(p): int(pool.page[p]) for p in pool.page.nonzero()[0]}
    assert want == got, "I1: the page table disagrees with the extents"


def _audit_states(pool: BlockPool) -> None:
    h, g = pool.hot, pool.geometry
    count = dict.fromkeys((h.FREE, h.USED, h.CACHED, h.QUARANTINED), 0)
    rows = {h.USED: h.X_USED, h.CACHED: h.X_CACHED, h.QUARANTINED: h.X_QUARANTINED}
    want = {(row, e): 0 for row in rows.values() for e in pool.pages.extents}
    for block in _touched(pool, g):
        state, refs = int(pool.blk[block, h.STATE]), pool.refs(block)
        touched = extents_of(pool, block)
        if state == h.UNBACKED:
            assert block == 0 or 0 in touched, "BlockPool: a backed block is not usable"
            continue
        assert 0 not in touched, "I3: a block with a claim, or a free one, is not backed"
        assert (refs > 0) == (state == h.USED), "I2: references and state disagree"
        count[state] += 1
        for extent in touched if state in rows else ():
            want[rows[state], extent] += 1
    got = {(row, e): int(pool.ext[e, row]) for row, e in want}
    assert want == got, f"I1: extent counters {got} differ from the recount {want}"
    assert count[h.FREE] == pool.num_free, "BlockPool: free blocks miscounted"
    assert count[h.USED] - 1 == pool.num_used, "BlockPool: blocks in use miscounted"
    assert count[h.CACHED] == pool.num_cached, "BlockPool: cached blocks miscounted"
    assert count[h.QUARANTINED] == pool.num_quarantined, "BlockPool: quarantine miscounted"
    spare = sum(all(want[row, e] == 0 for row in rows.values()) for e in pool.pages.extents)
    assert spare == pool.num_spare_extents, "BlockPool: spare extents miscounted"


def _touched(pool: BlockPool, g: Geometry) -> set[int]:
    """All blocks that touch a backed page, and all that claim to be more than unbacked."""
    touching = (g.blocks_touching(e.first, e.first + e.pages) for e in pool.pages.extents.values())
    claimed = pool.blk[:, pool.hot.STATE].nonzero()[0].tolist()
    return {b for blocks in touching for b in blocks} | set(claimed)


def _audit_lists(pool: BlockPool) -> None:
    h = pool.hot
    listed = 0
    for extent in pool.pages.extents:
        block, previous, length = int(pool.ext[extent, h.X_HEAD]), 0, 0
        while block:
            assert pool.blk[block, h.STATE] == h.FREE, "BlockPool: a listed block is not free"
            assert pool.blk[block, h.PREV] == previous, "BlockPool: free list broken"
            previous, block, length = block, int(pool.blk[block, h.NEXT]), length + 1
        assert length == pool.ext[extent, h.X_FREE], "BlockPool: free list miscounted"
        listed += length
    assert listed == pool.num_free, "BlockPool: a free block is on no list"
    block, length = int(pool.meta[h.M_LRU_OLD]), 0
    while block:
        assert pool.blk[block, h.STATE] == h.CACHED, "BlockPool: a block on the LRU is not cached"
        block, length = int(pool.blk[block, h.NEXT]), length + 1
    assert length == pool.num_cached, "BlockPool: a cached block is not on the LRU"


def _audit_levels(pool: BlockPool) -> None:
    h = pool.hot
    seen = set()
    for level in range(1, h.LEVELS + 1):
        extent = int(pool.meta[h.M_LEVEL + level])
        while extent:
            assert extent not in seen, "BlockPool: an extent is on two level lists"
            assert pool.ext[extent, h.X_LEVEL] == level, "BlockPool: level list broken"
            seen.add(extent)
            extent = int(pool.ext[extent, h.X_NEXT])
    want = {e for e in pool.pages.extents if pool.ext[e, h.X_FREE] > 0}
    assert seen == want, "BlockPool: an extent with free blocks cannot be found"
