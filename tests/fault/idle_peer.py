"""An engine that fills its budget with cached prefixes when told to, and then does nothing.

``idle_peer.py NAME``: each line of input is ``at-once`` or ``by-block``; answers ``ready BYTES``.
"""

import sys
from contextlib import suppress

from kvcached import CacheSpec, KVCache

SPEC = CacheSpec(num_layers=4, num_kv_heads=2, head_dim=64)  # a block of 16 tokens: 32 KiB


def fill(cache, mode):
    """Until nothing more is to be had; then all of it is cached prefixes."""
    batch, step = [cache.new_sequence() for _ in range(8)], SPEC.block_size
    step *= 1 if mode == "by-block" else 20
    start = 0
    with suppress(MemoryError):
        while True:
            for number, sequence in enumerate(batch):
                cache.extend(sequence, [1000 * number + t for t in range(start, start + step)])
            start += step
    for sequence in batch:
        cache.free(sequence)


def main():
    cache = KVCache(SPEC, name=sys.argv[1], max_tokens=1 << 20)
    for line in sys.stdin:
        fill(cache, line.strip())
        sys.stdout.write(f"ready {cache.stats().cached_bytes}\n")
        sys.stdout.flush()
    cache.close()


if __name__ == "__main__":
    main()
