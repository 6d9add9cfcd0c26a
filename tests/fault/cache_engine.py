"""A ``KVCache`` on the default memory under random load, for the kill tests.

Run as ``broker_engine.py`` is, with site-packages. Its truth is a lower bound, the bytes of blocks
in use, and at rest what it backs. A block is filled with a number that follows from its tokens, so
what a cached prefix holds is looked at too.
"""

from __future__ import annotations

import ctypes
import random
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1], str(Path(__file__).parent.parent)]

from fault.broker_engine import CAPACITY, Signals, open_truth, pattern, say

from kvcached import CacheSpec, KVCache
from kvcached.config import Config

SPEC = CacheSpec(num_layers=4, num_kv_heads=4, head_dim=128, dtype="float16", block_size=16)


class Load:
    def __init__(self, cache, truth, slot):
        self.cache, self.truth, self.slot = cache, truth, slot
        self.live = []
        self.verified = 0

    def address(self, block):
        return self.cache._blocks.pages.address_of(0) + int(block) * SPEC.block_bytes

    def note(self):
        used = {int(block) for _, sequence in self.live for block in sequence.table}
        self.truth[self.slot] = len(used) * SPEC.block_bytes

    def begin(self, family, blocks):
        """A sequence whose blocks may be known already; the new ones are filled."""
        tokens = [family] * (blocks * SPEC.block_size)
        sequence = self.cache.new_sequence(tokens)
        known = sequence.num_cached_tokens
        try:
            self.cache.extend(sequence, tokens[known:])
        except MemoryError:
            self.cache.free(sequence)
            raise
        for place in range(known // SPEC.block_size, blocks):
            data = pattern(family << 20 | place, SPEC.block_bytes)
            ctypes.memmove(self.address(sequence.table[place]), data, len(data))
        self.live.append((family, sequence))
        self.note()

    def end(self, index):
        family, sequence = self.live.pop(index)
        for place, block in enumerate(sequence.table):
            found = ctypes.string_at(self.address(block), SPEC.block_bytes)
            assert found == pattern(family << 20 | place, SPEC.block_bytes), (family, place)
            self.verified += 1
        self.note()
        self.cache.free(sequence)

    def step(self, rng):
        if self.live and rng.random() < 0.5:
            self.end(rng.randrange(len(self.live)))
            return
        try:
            self.begin(rng.randrange(1, 9), rng.randint(1, 40))
        except MemoryError:
            if self.live:
                self.end(0)


def main():
    _, _, runtime_dir, name, truth_file, slot, seed, _mode = sys.argv
    signals, rng = Signals(), random.Random(int(seed))
    config = Config(runtime_dir=runtime_dir, budget=str(CAPACITY))
    cache = KVCache(SPEC, name=name, max_tokens=CAPACITY // SPEC.token_bytes, config=config)
    load = Load(cache, open_truth(truth_file), int(slot))
    say("ready")
    while not signals.ended.is_set():
        if signals.resting.is_set() and load.live:
            load.truth[load.slot] = cache.stats().backed_bytes
        else:
            load.step(rng)
        time.sleep(0.002)
    while load.live:
        load.end(0)
    cache.check()
    cache.close()
    say(load.verified)


if __name__ == "__main__":
    main()
