"""A process that holds memory of the GPU until it is killed: ``holder.py NAME MIB BYTE``.

Fills what it holds with one byte, says ``ready``, and waits for the end of its input.
"""

import sys

from cuda.bindings import driver as cu

from kvcached import CacheSpec, KVCache

SPEC = CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128)


def main(name, mib, byte):
    cache = KVCache(SPEC, device="cuda", name=name, max_tokens=1 << 20)
    sequence = cache.new_sequence()
    blocks = (mib << 20) // SPEC.block_bytes
    cache.extend(sequence, blocks * SPEC.block_size)
    base = cache._blocks.pages.address_of(0)
    with cache.backend._call.in_context(cache.backend._context):
        for block in sequence.block_ids:
            (status,) = cu.cuMemsetD8(base + block * SPEC.block_bytes, byte, SPEC.block_bytes)
            assert int(status) == 0, status
        (status,) = cu.cuStreamSynchronize(0)
    print("ready", flush=True)
    sys.stdin.read()
    cache.free(sequence)
    cache.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
