"""An idle engine whose memory is all cached prefixes gives it to a peer that asks, every time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcached import CacheSpec, KVCache

SPEC = CacheSpec(num_layers=4, num_kv_heads=2, head_dim=64)
BUDGET = 64 << 20


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
@pytest.mark.parametrize("mode", ["at-once", "by-block"])
def test_a_peers_request_never_fails(mode, memory):
    os.environ |= {"KVCACHED_BUDGET": str(BUDGET), "KVCACHED_HOST_MEMORY": memory}
    script = Path(__file__).with_name("idle_peer.py")
    with subprocess.Popen(
        [sys.executable, str(script), "idle"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as peer, KVCache(SPEC, name="asks", max_tokens=1 << 20) as cache:  # fmt: skip
        for _ in range(8):
            peer.stdin.write(f"{mode}\n")
            peer.stdin.flush()
            word, cached = peer.stdout.readline().split()
            assert word == "ready"
            assert int(cached) > BUDGET * 2 // 3, "the budget is full of its prefixes"
            sequence = cache.new_sequence()
            cache.extend(sequence, (BUDGET * 3 // 4) // SPEC.token_bytes)
            assert cache.stats().in_use_bytes >= BUDGET * 3 // 4
            cache.free(sequence, discard=True)
            cache.trim()
        peer.stdin.close()
        assert peer.wait(30) == 0
