"""``KVCache``: the promises of its docstrings, one by one."""

import gc
import time
from contextlib import nullcontext

import numpy as np
import pytest
from cache_rig import FOREVER, tiny_cache, tiny_spec

from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.config import Config
from kvcached.errors import BudgetExceeded, ClosedError, OutOfPages, OwnershipError
from kvcached.layout import CacheSpec
from kvcached.memory.host import HostBackend
from kvcached.testing import FakeBackend, ManualFence


def test_a_new_cache_backs_the_null_block_and_nothing_else():
    with tiny_cache(max_tokens=4000) as cache:
        stats = cache.stats()
        assert stats.backed_bytes == stats.in_use_bytes == 32
        assert stats.reserved_bytes == 1001 * 32
        assert stats.blocks_in_use == 0


def test_extend_gives_slots_of_whole_blocks_in_token_order():
    with tiny_cache() as cache:
        sequence = cache.new_sequence()
        slots = np.concatenate([cache.extend(sequence, 3), cache.extend(sequence, 6)])
        table = cache.block_tables([sequence])[0]
        assert slots.dtype == np.int32
        assert slots.tolist() == [table[i // 4] * 4 + i % 4 for i in range(9)]
        assert sequence.num_tokens == 9
        assert tuple(table) == sequence.block_ids
        assert 0 not in table


def test_block_tables_are_padded_with_the_null_block():
    with tiny_cache() as cache:
        short, long, empty = (cache.new_sequence() for _ in range(3))
        cache.extend(short, 1)
        cache.extend(long, 12)
        tables = cache.block_tables([short, long, empty])
        assert tables.shape == (3, 3)
        assert tables.dtype == np.int32
        assert tables[0, 1:].tolist() == [0, 0]
        assert tables[2].tolist() == [0, 0, 0]
        assert cache.block_tables([]).shape == (0, 1)


def test_a_prefix_is_found_again_in_whole_blocks_but_never_the_last_token():
    with tiny_cache() as cache:
        first = cache.new_sequence(list(range(10)))
        cache.extend(first, 10)
        assert cache.new_sequence(range(8)).num_cached_tokens == 4
        assert cache.new_sequence(list(range(9))).num_cached_tokens == 8
        ids = first.block_ids
        cache.free(first)
        again = cache.new_sequence(list(range(10)))
        assert again.num_cached_tokens == again.num_tokens == 8
        assert again.block_ids == ids[:2]


def test_a_salt_separates_and_another_token_ends_the_match():
    with tiny_cache() as cache:
        cache.extend(cache.new_sequence(salt="a"), list(range(10)))
        assert cache.new_sequence(list(range(10)), salt="b").num_cached_tokens == 0
        assert cache.new_sequence([0, 1, 2, 3, 9, 5, 6, 7, 8], salt="a").num_cached_tokens == 4


def test_prefixes_of_another_model_dtype_or_salt_have_other_keys():
    def keys(salt="", **options):
        with tiny_cache(**options) as cache:
            sequence = cache.new_sequence(salt=salt)
            cache.extend(sequence, list(range(8)))
            return tuple(sequence.keys)

    others = [{"salt": "a"}, {"model": "qwen"}, {"model": "llama"},
              {"spec": tiny_spec(dtype="uint8")}]  # fmt: skip
    found = [keys(), *(keys(**other) for other in others)]
    assert keys() == found[0]
    assert len({key for chain in found for key in chain}) == 2 * len(found)


def test_without_prefix_caching_nothing_is_kept():
    with tiny_cache(prefix_caching=False) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, list(range(12)))
        cache.free(sequence)
        assert cache.stats().blocks_cached == 0
        assert cache.new_sequence(list(range(12))).num_cached_tokens == 0


def test_discard_forgets_what_the_newest_extend_named():
    with tiny_cache() as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, list(range(4)))
        cache.extend(sequence, list(range(4, 12)))
        cache.free(sequence, discard=True)
        assert cache.new_sequence(list(range(12))).num_cached_tokens == 4


def test_tokens_named_ahead_are_published_by_counts_and_by_ids():
    with tiny_cache() as cache:
        ahead = cache.new_sequence(list(range(12)))
        cache.extend(ahead, [0, 1, 2])
        cache.extend(ahead, [])
        cache.extend(ahead, 9)
        assert cache.new_sequence(list(range(20))).num_cached_tokens == 12


def test_tokens_after_a_gap_are_not_published():
    with tiny_cache() as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 4)
        cache.extend(sequence, list(range(4, 12)))
        cache.free(sequence)
        assert cache.stats().blocks_cached == 0


def test_a_fork_shares_blocks_until_one_of_them_writes():
    with tiny_cache() as cache:
        one = cache.new_sequence()
        cache.extend(one, 6)
        address = cache._blocks.pages.address_of(0) + one.block_ids[1] * 32
        cache.backend.write(address, bytes(range(32)))
        two = cache.fork(one)
        assert cache.stats().blocks_in_use == 2
        cache.extend(two, 1)
        assert two.block_ids[0] == one.block_ids[0]
        assert two.block_ids[1] != one.block_ids[1]
        copied = cache._blocks.pages.address_of(0) + two.block_ids[1] * 32
        assert cache.backend.read(copied, 32) == bytes(range(32))
        kept = one.block_ids
        cache.extend(one, 1)  # alone on its block again: no copy
        assert one.block_ids == kept


def test_blocks_wait_for_their_fence_even_if_they_are_found_again():
    with tiny_cache() as cache:
        fence, sequence = ManualFence(), cache.new_sequence()
        cache.extend(sequence, list(range(8)))
        cache.free(sequence, fence=fence)
        assert cache.stats().blocks_quarantined == 2
        assert cache.stats().quarantined_bytes == 64
        again = cache.new_sequence(list(range(9)))
        assert again.num_cached_tokens == 8
        cache.free(again)  # no fence of its own, but the first has not passed
        cache.trim()
        assert cache.stats().blocks_quarantined == 2
        fence.done = True
        cache.trim()
        assert cache.stats().backed_bytes == 32


def test_a_sharer_without_a_fence_does_not_undo_the_fence_of_another():
    with tiny_cache(prefix_caching=False) as cache:
        fence, one = ManualFence(), cache.new_sequence()
        cache.extend(one, 4)
        two = cache.fork(one)
        cache.free(one, fence=fence)
        cache.free(two)
        cache.trim()
        assert cache.stats().quarantined_bytes == 32, "I3"
        fence.done = True
        cache.trim()
        assert cache.stats().quarantined_bytes == 0


def test_out_of_budget_and_out_of_pages_are_memory_errors_that_change_nothing():
    with tiny_cache(limit=5 * 32) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 12)
        before = cache.stats().to_dict()
        with pytest.raises(BudgetExceeded, match="held") as refused:
            cache.extend(sequence, 9)
        assert isinstance(refused.value, MemoryError)
        assert refused.value.hint
        assert cache.stats().to_dict() == before
        cache.extend(sequence, 1)
    with tiny_cache(capacity_pages=3) as cache:
        with pytest.raises(OutOfPages):
            cache.extend(cache.new_sequence(), 12)
        cache.extend(cache.new_sequence(), 8)
    with tiny_cache(max_tokens=8) as cache, pytest.raises(OutOfPages, match="max_tokens"):
        cache.extend(cache.new_sequence(), 9)
    with tiny_cache() as cache, pytest.raises(OutOfPages):
        cache.extend(cache.new_sequence(), 1 << 50)


def test_cached_prefixes_make_room_the_oldest_and_the_end_of_a_prefix_first():
    with tiny_cache(limit=6 * 32) as cache:
        for start in (0, 100):
            sequence = cache.new_sequence()
            cache.extend(sequence, list(range(start, start + 8)))
            cache.free(sequence)
        assert cache.stats().blocks_cached == 4
        cache.extend(cache.new_sequence(), 12)  # what is left and, growth refused, three blocks
        assert cache.new_sequence(list(range(9))).num_cached_tokens == 0
        assert cache.new_sequence(list(range(100, 109))).num_cached_tokens == 4
        assert cache.stats().counters.evicted_blocks == 3


def test_a_lower_limit_is_obeyed_as_far_as_blocks_in_use_allow():
    with tiny_cache() as cache:
        sequence, other = cache.new_sequence(), cache.new_sequence()
        cache.extend(sequence, 8)
        cache.extend(other, list(range(16)))
        cache.free(other)
        record = cache.set_limit(3 * 32)
        assert record.applied
        assert record.held_bytes == cache.stats().backed_bytes == 3 * 32
        record = cache.set_limit(32)  # below what is in use
        assert not record.applied
        assert record.held_bytes == 3 * 32
        with pytest.raises(BudgetExceeded):
            cache.extend(sequence, 1)
        cache.free(sequence)
        assert cache.set_limit("32").applied


def test_evict_prefixes_returns_the_bytes_it_gave_back():
    with tiny_cache() as cache:
        sequence = cache.new_sequence()
        for start in range(0, 16, 4):  # an extent for each block
            cache.extend(sequence, list(range(start, start + 4)))
        cache.free(sequence)
        assert cache.evict_prefixes(64) == 64
        assert cache.stats().cached_bytes == 64
        assert cache.new_sequence(list(range(16))).num_cached_tokens == 8  # the beginning stays


def test_the_hint_of_free_tokens_can_be_taken():
    with tiny_cache(limit=9 * 32) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 5)
        hint = cache.num_free_tokens_hint
        assert hint == 6 * 4
        cache.extend(cache.new_sequence(), hint)
        assert cache.num_free_tokens_hint == 0


@pytest.mark.parametrize("layout", ["cross_layer", "per_layer"])
def test_layer_views_alias_the_slots(layout):
    pytest.importorskip("torch", reason="a layer is a tensor")
    spec = tiny_spec(num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32", layout=layout)
    with KVCache(spec, name="views", max_tokens=200, budget=LocalBudget(1 << 30),
                 config=FOREVER) as cache:  # fmt: skip
        sequence = cache.new_sequence()
        slots = cache.extend(sequence, 7).tolist()
        for index in range(3):
            for part, view in enumerate(cache.layer(index)):
                assert view.shape == (51, 4, 2, 8)
                for slot in slots:
                    view[slot // 4, slot % 4] = 100 * index + 10 * part + slot
        cache.trim()
        assert [cache.layer(i)[p][s // 4, s % 4].mean().item()
                for i in range(3) for p in range(2) for s in slots] == [
            100 * i + 10 * p + s for i in range(3) for p in range(2) for s in slots
        ]  # fmt: skip


def test_with_check_on_a_corrupted_cache_is_found_by_the_next_call():
    checking = Config.from_env({"KVCACHED_CHECK": "1", "KVCACHED_BROKER": "0"})
    for config in (checking, Config(broker=False)):
        with tiny_cache(config=config) as cache:
            sequence = cache.new_sequence()
            cache.extend(sequence, 4)
            references = cache._blocks.blk[cache._blocks.hot.REFS]
            references[sequence.block_ids[0]] += 1
            with pytest.raises(AssertionError, match="I2") if config.check else nullcontext():
                cache.new_sequence()
            references[sequence.block_ids[0]] -= 1
            cache.new_sequence()


def test_spares_are_gone_about_a_second_after_the_last_growth():
    with tiny_cache(config=Config(broker=False), caretaker=True) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 60)
        cache.free(sequence)
        assert cache.stats().spare_bytes > 0
        deadline = time.monotonic() + 10
        while cache.stats().spare_bytes and time.monotonic() < deadline:
            time.sleep(0.02)
        assert cache.stats().backed_bytes == 32


def test_a_freed_sequence_cannot_be_used_and_a_foreign_one_neither():
    with tiny_cache() as cache, tiny_cache() as other:
        sequence, stranger = cache.new_sequence(), other.new_sequence()
        cache.extend(sequence, 4)
        cache.free(sequence)
        for use in (cache.free, cache.fork, lambda s: cache.extend(s, 1),
                    lambda s: cache.block_tables([s])):  # fmt: skip
            with pytest.raises(OwnershipError, match="freed before"):
                use(sequence)
            with pytest.raises(OwnershipError, match="another cache"):
                use(stranger)


def test_a_closed_cache_refuses_everything_but_close_and_repr():
    with tiny_cache() as cache:
        sequence = cache.new_sequence()
        cache.close()
        cache.close()
        for use in (cache.new_sequence, cache.trim, cache.stats, cache.check, cache.page_runs,
                    lambda: cache.extend(sequence, 1), lambda: cache.fork(sequence),
                    lambda: cache.free(sequence), lambda: cache.set_limit(1),
                    lambda: cache.layer(0), lambda: cache.block_tables([]),
                    lambda: cache.evict_prefixes(1), lambda: cache.num_free_tokens_hint,
                    ):  # fmt: skip
            with pytest.raises(ClosedError, match="'tiny' is closed"):
                use()
        assert repr(cache) == "<KVCache 'tiny', closed>"
        assert cache.reclaim(100) == 0


def test_a_dropped_cache_gives_everything_back():
    backend, budget = FakeBackend(32), LocalBudget(1 << 20)
    cache = KVCache(tiny_spec(), name="dropped", backend=backend, budget=budget, config=FOREVER)
    cache.extend(cache.new_sequence(), 9)
    del cache
    deadline = time.monotonic() + 10
    while budget.claimed_bytes and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert budget.claimed_bytes == 0
    backend.shutdown()


def test_a_backend_of_ones_own_is_left_open_and_the_caches_own_is_not():
    backend = HostBackend(page_bytes=1 << 14)
    spec = CacheSpec(2, 1, 64)
    for name in ("one", "two"):
        KVCache(spec, name=name, budget=LocalBudget(1 << 30), backend=backend).close()
    backend.shutdown()
    cache = KVCache(spec, name="own", budget=LocalBudget(1 << 30))
    cache.close()
    with pytest.raises(ClosedError):
        cache.backend.reserve(cache.backend.page_bytes)
