"""``trim()`` of a cache whose blocks in use are scattered over its extents, on real memory."""

import ctypes
import hashlib

import numpy as np
import pytest
from cache_rig import stop_caretaker

from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.config import HOST_MEMORY, Config
from kvcached.testing import model_specs

KEPT, APART = 100, 8
SMALL, LARGE = "SmolLM2-135M", "Llama-3.1-8B"  # blocks of 360 KiB and of 2 MiB


def scattered(cache):
    """Sequences of one block each; the other seven of the extent are a cached prefix."""
    size, kept = cache.spec.block_size, []
    for start in range(0, KEPT << 20, 1 << 20):
        tokens = list(range(start, start + APART * size))
        whole = cache.new_sequence()
        cache.extend(whole, tokens)
        kept.append(cache.new_sequence(tokens[: size + 1]))
        assert kept[-1].num_tokens == size
        cache.free(whole)
    return kept


def place(cache, sequence):
    (block,) = sequence.block_ids
    nbytes = cache.geometry.block_bytes
    return cache._blocks.pages.address_of(0) + block * nbytes, nbytes


def fill(cache, sequence, number):
    """Random bytes for all of its block, others for each number."""
    address, nbytes = place(cache, sequence)
    ctypes.memmove(address, np.random.default_rng(number).bytes(nbytes), nbytes)


def digest(cache, sequence):
    return hashlib.blake2b(ctypes.string_at(*place(cache, sequence))).hexdigest()


@pytest.mark.parametrize("memory", HOST_MEMORY)
@pytest.mark.parametrize(
    ("name", "page"),
    [(SMALL, ""), (SMALL, "4KiB"), pytest.param(LARGE, "", marks=pytest.mark.slow)],
)
def test_trim_ends_at_the_packed_floor_with_ids_and_contents_unchanged(name, page, memory):
    config = Config(broker=False, spare_seconds=1e5, host_page=page, host_memory=memory)
    spec, budget = model_specs()[name], LocalBudget(1 << 40)
    with KVCache(spec, name="trim", max_tokens=32_000, budget=budget, config=config) as cache:
        stop_caretaker(cache)
        kept = scattered(cache)
        for number, sequence in enumerate(kept):
            fill(cache, sequence, number)
        before, ids = [digest(cache, s) for s in kept], [s.block_ids for s in kept]
        assert len(set(before)) == KEPT
        stats = cache.stats()
        assert stats.extents >= KEPT
        assert stats.backed_bytes > 4 * stats.packed_floor_bytes
        assert stats.blocks_in_use == KEPT
        cache.trim()
        stats = cache.stats()
        assert stats.counters.split >= KEPT, "they were not scattered one an extent"
        assert stats.backed_bytes <= 1.02 * stats.packed_floor_bytes
        assert [s.block_ids for s in kept] == ids
        assert [digest(cache, s) for s in kept] == before
        cache.check()
