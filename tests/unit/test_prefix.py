"""``PrefixIndex``: keys, names, eviction."""

from dataclasses import replace

import numpy as np
import pytest
from cache_rig import Clock, block_pool

from kvcached.errors import InvalidInput
from kvcached.layout import CacheSpec
from kvcached.prefix import PrefixIndex, child_key, contents_key, root_key
from kvcached.testing import FakeBackend

TOKENS = np.arange(9, dtype=np.int64)


@pytest.fixture
def pool():
    backend = FakeBackend(16)
    pool = block_pool(backend, clock=Clock(), block_bytes=16, num_blocks=16)
    yield pool
    pool.check()
    pool.close()
    backend.shutdown()


@pytest.fixture
def index(pool):
    return PrefixIndex(pool, 4)


def named(pool, index, tokens=TOKENS, salt=""):
    """Blocks for the whole blocks of ``tokens``, in use and named."""
    blocks, key = pool.alloc(len(tokens) // 4), root_key(salt)
    for i, block in enumerate(blocks.tolist()):
        key = child_key(key, tokens[4 * i : 4 * i + 4])
        assert index.publish(block, key)
    return blocks


def test_a_key_stands_for_the_whole_prefix_and_the_salt():
    keys = {root_key(), root_key("a"), child_key(root_key(), TOKENS[:4]),
            child_key(root_key("a"), TOKENS[:4]), child_key(root_key(), TOKENS[4:8]),
            child_key(child_key(root_key(), TOKENS[:4]), TOKENS[4:8])}  # fmt: skip
    assert len(keys) == 6
    assert {len(key) for key in keys} == {32}
    assert root_key("\ud800")  # whatever a string holds


def test_a_key_stands_for_the_model_and_for_what_a_block_holds():
    spec = CacheSpec(2, 4, 64)
    changes = [{"num_layers": 3}, {"num_kv_heads": 2}, {"head_dim": 32}, {"dtype": "float16"},
               {"block_size": 32}, {"head_dim_v": 32}, {"layout": "per_layer"},
               {"head_dim_v": 0}, {"head_dim_v": 0, "mla_value_dim": 16}]  # fmt: skip
    contents = {contents_key(spec, model) for model in ("llama", "qwen", "")}
    contents |= {contents_key(replace(spec, **change), "llama") for change in changes}
    assert len(contents) == 3 + len(changes)
    assert contents_key(replace(spec, head_dim_v=64), "llama") in contents  # says the same
    roots = {root_key(salt, each) for salt in ("", "a", "llama") for each in contents}
    assert len(roots) == 3 * len(contents)
    assert not roots & {root_key(), root_key("a")}
    with pytest.raises(InvalidInput, match="model is 7"):
        contents_key(spec, 7)


def test_a_match_takes_a_reference_and_leaves_a_token(pool, index):
    blocks = named(pool, index)
    for length, found in ((0, 0), (4, 0), (5, 1), (8, 1), (9, 2)):
        ids, keys = index.match(TOKENS[:length], root_key())
        assert ids.tolist() == blocks[:found].tolist()
        assert len(keys) == found
        pool.free(ids)
    assert (index.hits, index.queries) == (4, 4)


def test_the_second_block_with_the_same_content_gets_no_name(pool, index):
    blocks = named(pool, index)
    other = pool.alloc(1)
    assert not index.publish(int(other[0]), child_key(root_key(), TOKENS[:4]))
    pool.free(other)
    pool.free(blocks)
    assert (pool.num_cached, len(index)) == (2, 2)


def test_eviction_takes_the_name_with_it(pool, index):
    pool.free(named(pool, index)[::-1].copy())
    assert pool.evict_oldest(1) == 1
    ids, _ = index.match(TOKENS, root_key())
    assert len(ids) == 1  # the end of the prefix went first
    pool.free(ids)
    pool.trim()
    assert len(index) == 0
    index.check()


def test_a_withdrawn_block_is_free_after_its_last_use(pool, index):
    blocks = named(pool, index)
    index.withdraw(blocks[1:].tolist())
    index.withdraw(blocks[1:].tolist())  # no name any more: nothing to do
    pool.free(blocks)
    assert (pool.num_cached, pool.num_free > 0, len(index)) == (1, True, 1)


def test_a_withdrawn_block_that_others_hold_stays_theirs(pool, index):
    blocks = named(pool, index)
    ids, _ = index.match(TOKENS, root_key())
    index.withdraw(blocks.tolist())
    pool.free(blocks)
    assert pool.num_used == 2
    assert len(index.match(TOKENS, root_key())[0]) == 0
    pool.free(ids)
    assert (pool.num_used, pool.num_cached) == (0, 0)
