"""``PrefixIndex`` against a dictionary from (salt, tokens of the prefix) to its block."""

import random

import numpy as np
import pytest
from cache_rig import block_pool, machine_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcached.prefix import PrefixIndex, child_key, root_key
from kvcached.testing import FakeBackend, ManualFence

STEPS = {"run": 0, "hits": 0}
SEED = st.integers(0, 1 << 30)
TOKENS = st.lists(st.integers(0, 1), max_size=10)
SALT = st.sampled_from(["", "a", "b"])


class PrefixMachine(RuleBasedStateMachine):
    """The model: ``named`` prefix -> block, and ``held``, the lists of references taken."""

    @initialize(size=st.integers(1, 3), blocks=st.integers(3, 16))
    def start(self, size, blocks):
        self.backend, self.size = FakeBackend(16), size
        self.pool = block_pool(self.backend, block_bytes=24, num_blocks=blocks)
        self.index = PrefixIndex(self.pool, size)
        forget = self.pool.on_evict

        def on_evict(ids):
            gone = set(ids.tolist())
            assert gone <= set(self.named.values())
            self.named = {k: b for k, b in self.named.items() if b not in gone}
            forget(ids)

        self.pool.on_evict = on_evict
        self.named, self.held, self.fences = {}, [], []

    def keys(self, tokens, salt):
        """(prefix, key) of each full block."""
        key = root_key(salt)
        for end in range(self.size, len(tokens) + 1, self.size):
            key = child_key(key, np.asarray(tokens[end - self.size : end], np.int64))
            yield (salt, tuple(tokens[:end])), key

    @rule(tokens=TOKENS, salt=SALT)
    def compute(self, tokens, salt):
        """A request: match, compute the rest in new blocks, name them."""
        ids = self.look_up(tokens, salt)
        chain = list(self.keys(tokens, salt))
        try:
            fresh = self.pool.alloc(len(chain) - len(ids)).tolist()
        except MemoryError:
            return
        self.held[-1] += fresh
        for (prefix, key), block in zip(chain[len(ids) :], fresh, strict=True):
            new = prefix not in self.named
            assert self.index.publish(block, key) == new
            assert self.index.publish(block, key) == new  # again changes nothing
            if new:
                self.named[prefix] = block

    @rule(tokens=TOKENS, salt=SALT)
    def match(self, tokens, salt):
        self.look_up(tokens, salt)

    def look_up(self, tokens, salt):
        best = []
        for prefix, _ in self.keys(tokens[:-1], salt):  # the last token is never matched
            if prefix not in self.named:
                break
            best.append(self.named[prefix])
        refs = [self.pool.refs(block) for block in best]
        ids, keys = self.index.match(np.asarray(tokens, np.int64), root_key(salt))
        assert ids.dtype == np.int32 and ids.tolist() == best
        assert keys == [key for _, key in self.keys(tokens, salt)][: len(best)]
        assert [self.pool.refs(block) for block in best] == [r + 1 for r in refs]
        STEPS["hits"] += len(best)
        self.held.append(best.copy())
        return best

    @precondition(lambda self: self.held)
    @rule(seed=SEED, fenced=st.booleans())
    def finish(self, seed, fenced):
        ids = self.held.pop(random.Random(seed).randrange(len(self.held)))
        fence = ManualFence() if fenced else None
        self.fences += [fence] if fenced else []
        self.pool.free(np.asarray(ids[::-1], np.int32), fence)

    @rule()
    def fences_pass(self):
        for fence in self.fences:
            fence.done = True
        self.fences = []
        self.pool.poll_fences()

    @precondition(lambda self: any(self.held))
    @rule(seed=SEED)
    def withdraw(self, seed):
        ids = random.Random(seed).choice([ids for ids in self.held if ids])
        self.index.withdraw(ids[-1:])
        self.named = {k: b for k, b in self.named.items() if b != ids[-1]}

    @rule(count=st.integers(0, 4), what=st.sampled_from(["evict", "reclaim", "trim"]))
    def give_back(self, count, what):
        if what == "evict":
            self.pool.evict_oldest(count)
        elif what == "reclaim":
            self.pool.reclaim(count * 16)
        else:
            self.pool.trim()
            assert self.pool.num_cached == 0

    @invariant()
    def the_index_is_the_dictionary(self):
        STEPS["run"] += 1
        self.pool.check()
        self.index.check()
        assert len(self.index) == len(self.named) == len(set(self.named.values()))

    def teardown(self):
        if hasattr(self, "pool"):
            self.pool.close()
            self.backend.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_prefix_index_is_a_dictionary():
    run_state_machine_as_test(PrefixMachine, settings=machine_settings(300, 50))
    assert STEPS["run"] > 11_000 and STEPS["hits"] > 200, STEPS
