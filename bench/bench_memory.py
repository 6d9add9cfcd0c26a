"""The block pool on the host backend: taking and giving blocks, growing, shrinking, splitting.

Blocks of 2 MiB (Llama-3.1-8B at 16 tokens, cross-layer) and of 360 KiB (SmolLM2-135M). Memory is
mapped but not touched, so the figures are the bookkeeping and the system calls, not page faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common import measure, row, write

from kvcached.blocks import BlockPool
from kvcached.broker.budget import LocalBudget
from kvcached.config import Config
from kvcached.layout import CacheSpec, Geometry
from kvcached.memory.host import HostBackend
from kvcached.pages import PagePool
from kvcached.resources import host_page_bytes

GIB = 1 << 30
SPECS = {
    "8B": CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128),
    "135M": CacheSpec(num_layers=30, num_kv_heads=3, head_dim=64),
}


@contextmanager
def pool_for(spec: CacheSpec) -> Iterator[BlockPool]:
    """A pool with 64 GiB of addresses and as much budget."""
    page_bytes = host_page_bytes(spec, Config())
    geometry = Geometry.of(spec, page_bytes=page_bytes, num_blocks=64 * GIB // spec.block_bytes)
    backend = HostBackend(page_bytes)
    pool = BlockPool(PagePool(backend, geometry, LocalBudget(64 * GIB), (256 << 20) // page_bytes))
    try:
        yield pool
    finally:
        pool.close()
        backend.shutdown()


def take_and_give(pool: BlockPool, count: int) -> Callable[[], None]:
    """Take and give back ``count`` blocks that are mapped already."""
    pool.free(pool.alloc(count))

    def run() -> None:
        pool.free(pool.alloc(count))

    return run


def grow_and_shrink(pool: BlockPool, name: str, count: int, repeats: int) -> list[dict[str, Any]]:
    """Grow by ``count`` blocks with nothing spare, then give them back."""
    held: list[Any] = []
    label = f"{count} blocks" if count > 1 else "1 block"

    def grow() -> None:
        held.append(pool.alloc(count))

    def empty() -> None:
        while held:
            pool.free(held.pop())
        pool.trim()

    def refill() -> None:
        empty()
        grow()
        pool.free(held.pop())

    grown = measure(grow, repeats=repeats, before=empty)
    given = measure(lambda: pool.trim(may_split=False), repeats=repeats, before=refill)
    empty()
    return [row(f"{name}: grow {label}", grown, unit="us"),
            row(f"{name}: give back {label}", given, unit="us")]  # fmt: skip


def split(pool: BlockPool, name: str) -> dict[str, Any]:
    """Split 1 GiB of which one block in 32 lives (touched, so that contents are copied)."""
    kept: list[Any] = []
    count = GIB // pool.geometry.block_bytes

    def prepare() -> None:
        while kept:
            pool.free(kept.pop())
        pool.trim()
        ids = pool.alloc(count)
        kept.append(ids[::32].copy())
        pool.free(ids[[i for i in range(count) if i % 32]])

    samples = measure(pool.trim, repeats=9, warm_up=1, before=prepare)
    pool.free(kept.pop())
    pool.trim()
    return row(f"{name}: split 1 GiB, one block in 32 live", samples, unit="ms")


def main() -> None:
    """Measure and write ``memory.json``."""
    rows = []
    for name, spec in SPECS.items():
        with pool_for(spec) as pool:
            for count in (1, 16, 256):
                samples = measure(take_and_give(pool, count), repeats=200, inner=200)
                rows.append(row(f"{name}: take and give {count} blocks", samples, unit="us"))
            pool.trim()
            rows += grow_and_shrink(pool, name, 1, 200)
            rows += grow_and_shrink(pool, name, GIB // spec.block_bytes, 50)
            rows.append(split(pool, name))
    write("memory", "block pool, host backend", rows)


if __name__ == "__main__":
    main()
