"""One process of the stress test: a pattern in every block it owns, checked by kernels.

``python stress_worker.py NAME SECONDS SEED`` prints a line of JSON. Every block of a sequence holds
one number in all of its 32-bit words. Kernels write it, read it back and count what is wrong while
blocks are freed behind fences, memory grows, is split, and goes to other processes and comes back.
"""

import json
import random
import sys
import time

import torch

from kvcached import CacheSpec, KVCache
from kvcached.memory.views import tensor_from_address

SPECS = [
    CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128),  # a block is a page of 2 MiB
    CacheSpec(num_layers=30, num_kv_heads=3, head_dim=64),  # 360 KiB: blocks straddle pages
]
MAX_TOKENS = 1 << 17


class Worker:
    """Sequences with numbers in their blocks; ``wrong`` counts words on the device."""

    def __init__(self, name, seed):
        self.rng, self.spec = random.Random(seed), SPECS[seed % 2]
        self.cache = KVCache(self.spec, device="cuda", name=name, max_tokens=MAX_TOKENS)
        base, g = self.cache._blocks.pages.address_of(0), self.cache.geometry
        words = tensor_from_address(base, g.reserved_bytes, self.cache.backend.device)
        self.words = words.view(torch.int32).as_strided(
            (g.num_blocks, self.spec.block_bytes // 4), (self.spec.block_bytes // 4, 1)
        )
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.live, self.prefixes, self.stamp, self.count = [], {}, seed << 20, {}

    def tally(self, what, by=1):
        self.count[what] = self.count.get(what, 0) + by

    def compare(self, ids, numbers):
        want = torch.tensor(numbers, dtype=torch.int32, device="cuda")
        got = self.words[torch.tensor(ids, device="cuda")]
        self.wrong += (got != want[:, None]).sum()
        self.tally("blocks_checked", len(ids))

    def begin(self):
        """A new sequence, now and then with a prefix that was seen before."""
        size, known = self.spec.block_size, self.rng.random() < 0.5
        key = self.rng.randrange(40) if known else None
        blocks = self.rng.choice([1, 2, 5, 17, 60])
        tokens = [key * 1000 + i for i in range(blocks * size + 1)] if known else []
        sequence = self.cache.new_sequence(tokens)
        cached = sequence.num_cached_tokens // size
        if cached:  # what the cache kept must be what was written when it was named
            self.compare(sequence.block_ids[:cached], self.prefixes[key][:cached])
            self.tally("prefix_hits")
        try:
            rest = tokens[cached * size : -1] if known else blocks * size
            self.cache.extend(sequence, rest)
        except MemoryError:
            self.cache.free(sequence)
            self.tally("refused")
            self.end(len(self.live) // 2 + 1)
            return
        numbers = self.prefixes[key][:cached] if cached else []
        numbers = numbers + [self.stamp + i for i in range(len(sequence.block_ids) - cached)]
        self.stamp += len(numbers)
        fresh = torch.tensor(sequence.block_ids[cached:], device="cuda", dtype=torch.int64)
        values = torch.tensor(numbers[cached:], dtype=torch.int32, device="cuda")
        self.words[fresh] = values[:, None].expand(-1, self.words.shape[1])
        if known:
            old = self.prefixes.get(key, [])
            self.prefixes[key] = numbers if len(numbers) > len(old) else old
            if old and numbers[: len(old)] != old[: len(numbers)]:
                self.prefixes[key] = numbers  # evicted meanwhile, and written anew
        self.live.append((sequence, numbers))
        self.tally("sequences")

    def look(self):
        sequence, numbers = self.rng.choice(self.live)
        self.compare(sequence.block_ids, numbers)

    def end(self, most=1):
        """Free sequences while kernels still read them."""
        for _ in range(min(most, len(self.live))):
            sequence, numbers = self.live.pop(self.rng.randrange(len(self.live)))
            self.compare(sequence.block_ids, numbers)
            self.cache.free(sequence, fence=self.cache.fence())

    def step(self):
        roll = self.rng.random()
        if roll < 0.45 or not self.live:
            self.begin()
        elif roll < 0.70:
            self.look()
        elif roll < 0.95:
            self.end(self.rng.choice([1, 1, 3]))
        elif roll < 0.97:
            self.cache.trim(fence=self.cache.fence())
            self.tally("trims")
        elif roll < 0.985:
            with self.cache.idle(fence=self.cache.fence()):
                time.sleep(0.02)  # others may have us split
        else:
            self.end(len(self.live))

    def run(self, seconds):
        until, steps = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            self.step()
            steps += 1
            if steps % 200 == 0:
                self.cache.check()
                assert int(self.wrong) == 0, f"{int(self.wrong)} words are wrong"
        for sequence, numbers in self.live:
            self.compare(sequence.block_ids, numbers)
        torch.cuda.synchronize()
        counters = self.cache.stats().counters
        report = {"name": self.cache.name, "steps": steps, "wrong": int(self.wrong), **self.count}
        report |= {"grow": counters.grow, "ahead": counters.ahead, "split": counters.split,
                   "shrink": counters.shrink, "reclaim": counters.reclaim}  # fmt: skip
        self.cache.close()
        return report


if __name__ == "__main__":
    worker = Worker(sys.argv[1], int(sys.argv[3]))
    result = worker.run(float(sys.argv[2]))
    print(json.dumps(result), flush=True)
    sys.exit(result["wrong"] != 0)
