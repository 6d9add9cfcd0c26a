"""Another process on the same GPU, for ``gpu.py``: it gives way, or dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from kvcached import CacheSpec, KVCache

PEER = """
import sys
from kvcached import CacheSpec, KVCache
cache = KVCache(CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128), device="cuda",
                name="peer", max_tokens=1 << 20)
tokens = 0
for line in sys.stdin:
    sequence = cache.new_sequence()
    cache.extend(sequence, list(range(tokens, tokens + 16 * 2000)))
    tokens += 16 * 2000
    if line.strip() == "cached":
        cache.free(sequence)
    print("ready", flush=True)
cache.close()
"""
BLOCKS = 2000  # of 2 MiB; the budget holds no second such sequence


@contextlib.contextmanager
def shared_budget(spec: CacheSpec) -> Iterator[KVCache]:
    """A cache of ours in a budget of about 4 GiB, and a broker of our own."""
    with tempfile.TemporaryDirectory(prefix="kvc-", dir="/tmp") as folder:
        own = {"KVCACHED_RUNTIME_DIR": f"{folder}/r", "KVCACHED_BUDGET": "4100MiB",
               "KVCACHED_AHEAD": "0"}  # fmt: skip
        before = {name: os.environ.get(name) for name in own}
        os.environ |= own
        try:
            with KVCache(spec, device="cuda", name="me", max_tokens=1 << 20) as cache:
                yield cache
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ |= {} if value is None else {name: value}


def tell(peer: subprocess.Popen[str], how: str) -> None:
    """Let the peer take 4 GiB."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write(f"{how}\n")
    peer.stdin.flush()
    assert peer.stdout.readline().strip() == "ready"


def start_peer() -> subprocess.Popen[str]:
    """A process with a cache of its own."""
    return subprocess.Popen([sys.executable, "-c", PEER], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


def end(peer: subprocess.Popen[str]) -> None:
    """Let it go in peace."""
    assert peer.stdin is not None
    peer.stdin.close()
    peer.wait(60)


def claims(spec: CacheSpec, *, rounds: int) -> list[float]:
    """Seconds until 4 GiB that are an idle peer's cached prefixes are ours."""
    with shared_budget(spec) as cache:
        peer, samples = start_peer(), []
        for _ in range(rounds + 1):
            tell(peer, "cached")
            sequence = cache.new_sequence()
            start = time.perf_counter()
            cache.extend(sequence, spec.block_size * BLOCKS)
            samples.append(time.perf_counter() - start)
            cache.free(sequence)
            cache.trim()
        end(peer)
    return samples[1:]


def kills(spec: CacheSpec, *, rounds: int) -> list[float]:
    """Seconds from a peer's SIGKILL until its 4 GiB are ours."""
    samples = []
    with shared_budget(spec) as cache:
        for _ in range(rounds):
            peer = start_peer()
            tell(peer, "held")
            sequence = cache.new_sequence()
            start = time.perf_counter()
            peer.kill()
            while True:
                try:
                    cache.extend(sequence, spec.block_size * BLOCKS)
                    break
                except MemoryError:
                    assert time.perf_counter() - start < 20, "the dead peer's memory is not back"
            samples.append(time.perf_counter() - start)
            end(peer)
            cache.free(sequence)
            cache.trim()
    return samples
