"""Space lost to geometry, for the caches of real models at pages of 2 MiB.

Lost are backed bytes that no usable block covers: at most 2 % once 64 MiB and 64 blocks are
backed, and never more than one block a side of an extent. Growth is random, and so are the frees
and reclaims between; the backend holds nothing, so gigabytes cost nothing.
"""

import random

import numpy as np
import pytest
from cache_rig import HollowBackend, block_pool

from kvcached.layout import Geometry
from kvcached.testing import model_specs

PAGE = 2 << 20
ROUNDS = 40
CASES = [
    pytest.param(spec, id=f"{name}-{dtype}-{size}")
    for dtype in ("bfloat16", "float8_e4m3fn")
    for size in (16, 32, 64)
    for name, spec in model_specs(dtype=dtype, block_size=size).items()
]


def lost_bytes(pool):
    """Backed bytes less the bytes of usable blocks on backed pages, the null block among them."""
    states = pool.blk[:, pool.hot.STATE]
    usable = int((states != pool.hot.UNBACKED).sum())
    return pool.pages.backed_bytes - usable * pool.geometry.block_bytes


def check_loss(pool):
    g = pool.geometry
    lost = lost_bytes(pool)
    assert 0 <= lost < 2 * g.block_bytes * len(pool.pages.extents)
    for extent in pool.pages.extents.values():
        end = extent.first + extent.pages
        blocks = g.blocks_touching(extent.first, end)
        states = pool.blk[blocks.start : blocks.stop, pool.hot.STATE]
        unusable = np.flatnonzero(states == pool.hot.UNBACKED) + blocks.start
        inside = g.blocks_inside(extent.first, end)
        assert not [b for b in unusable if b in inside], "a block inside an extent is not usable"
        assert len(unusable) <= 2, "more than one block a side is lost"
    return lost


@pytest.mark.parametrize("spec", CASES)
def test_at_most_two_percent_are_lost(spec):
    g = Geometry.of(spec, page_bytes=PAGE, num_blocks=(64 << 30) // spec.block_bytes)
    backend = HollowBackend(PAGE)
    pool = block_pool(backend, block_bytes=g.block_bytes, num_blocks=g.num_blocks, longest=128)
    rng, held = random.Random(spec.block_bytes), []
    for _ in range(ROUNDS):
        held.append(pool.alloc(rng.choice([1, 1, 2, rng.randint(3, 40), rng.randint(40, 600)])))
        if rng.random() < 0.4:
            pool.free(held.pop(rng.randrange(len(held))))
        if rng.random() < 0.2:
            pool.reclaim(rng.randint(1, 2 << 30))
        lost = check_loss(pool)
        blocks = pool.pages.backed_bytes // spec.block_bytes
        if pool.pages.backed_bytes >= 64 << 20 and blocks >= 64:
            share = lost / pool.pages.backed_bytes
            assert share <= 0.02, f"{share:.1%} of {pool.pages.backed_bytes >> 20} MiB are lost"
    pool.check()
    pool.close()
    backend.shutdown()


@pytest.mark.parametrize("spec", CASES)
def test_a_split_ends_at_the_pages_that_blocks_in_use_lie_on(spec):
    """Ids stay, so scattered blocks of odd sizes cost up to two partial pages a run: no more."""
    g = Geometry.of(spec, page_bytes=PAGE, num_blocks=4000)
    pool = block_pool(HollowBackend(PAGE), block_bytes=g.block_bytes, num_blocks=4000, longest=128)
    ids = pool.alloc(3000)
    kept = ids[::40]
    pool.free(np.setdiff1d(ids, kept))
    pool.trim()
    backed = pool.pages.backed_bytes
    assert backed == pool.split_floor_bytes()
    floor = g.packed_floor_bytes(len(kept) + 1)
    assert floor <= backed <= floor + 2 * PAGE * (len(kept) + 1)
    if spec.block_bytes % PAGE == 0:
        assert backed == floor
    pool.close()


@pytest.mark.parametrize("spec", CASES)
def test_addresses_are_linear_in_the_id(spec):
    backend = HollowBackend(PAGE)
    g = Geometry.of(spec, page_bytes=PAGE, num_blocks=1000)
    pool = block_pool(backend, block_bytes=g.block_bytes, num_blocks=1000)
    ids = pool.alloc(50)
    backed = {p for e in pool.pages.extents.values() for p in range(e.first, e.first + e.pages)}
    for block in ids.tolist():
        start = block * g.block_bytes
        assert set(range(start // PAGE, (start + g.block_bytes - 1) // PAGE + 1)) <= backed
    pool.close()
