"""The elastic cache on a GPU beside the raw driver calls, in one run: ``gpu_memory.json``.

``python bench/gpu.py [part ...] [--peers FILE]``; the parts are the functions in ``PARTS``. The
geometry is Llama-3.1-8B's: a block of 16 tokens over all layers is 2 MiB. ``target`` is what the
project asks of itself; ``peers`` hold what was measured beside it: the raw calls, and upstream
(``bench/peers``), if its file is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import time
import timeit
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_peers
import gpu_raw
import torch
from common import RESULTS, SCHEMA_VERSION, commit

from kvcached import CacheSpec, Config, KVCache
from kvcached.blocks import BlockPool
from kvcached.broker.budget import LocalBudget
from kvcached.layout import Geometry
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.views import tensor_from_address
from kvcached.pages import PagePool

GIB, MIB = 1 << 30, 1 << 20
SCRUB_S = 0.05
"""Cold growth, ours and the raw calls', is measured this long after a release; see ``settle``."""
SPEC = CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128)
ROWS: list[dict[str, Any]] = []
CORES: list[dict[str, float]] = []
ALL_CORES = os.sched_getaffinity(0)
_SCALE = {"ms": 1e3, "us": 1e6}


def timed(run: Callable[[], Any], repeats: int, before: Callable[[], Any] | None = None) -> Any:
    """Seconds of each of ``repeats`` runs, after two that are not recorded."""
    samples = []
    for index in range(repeats + 2):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        if index >= 2:
            samples.append(time.perf_counter() - start)
    return samples


def tail(samples: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]


def add(ident: str, samples: Sequence[float], unit: str, target: float | None, **more: Any) -> None:
    """One row; ``samples`` are seconds, or figures if ``unit`` is none of time."""
    figures = [s * _SCALE.get(unit, 1.0) for s in samples]
    row = {"id": ident, "value": round(statistics.median(figures), 4), "unit": unit,
           "target": target, "repeats": len(figures), "p99": round(tail(figures), 4)}  # fmt: skip
    ROWS.append(row | more)


def setup(backend: CudaBackend) -> None:
    """Open a cache over the whole card, ready for the first token."""
    caches: list[KVCache] = []
    tokens = backend.total_bytes // SPEC.token_bytes

    def once() -> None:
        caches.append(KVCache(SPEC, backend=backend, max_tokens=tokens, name="setup",
                              budget=LocalBudget(backend.total_bytes),
                              config=Config(broker=False)))  # fmt: skip

    samples = timed(once, 9, before=lambda: caches and caches.pop().close())
    backed = caches[0].stats().backed_bytes
    caches.pop().close()
    add("setup_ms", samples, "ms", 50, backed_bytes=backed, tokens=tokens)


def take_quickest_core() -> None:
    """Go to the core on which Python is quickest just now, both sides of a comparison alike.

    Cores of a shared machine differ by a factor of up to two, as their neighbours work or do not;
    growth and shrink, ours and the raw calls', are mostly the processor's time.
    """
    seconds = {}
    for core in ALL_CORES:
        os.sched_setaffinity(0, {core})
        seconds[core] = min(timeit.repeat("sum(range(2000))", number=5, repeat=8)) / 5
    os.sched_setaffinity(0, {min(seconds, key=seconds.__getitem__)})
    CORES.append({"quickest_us": round(min(seconds.values()) * 1e6, 2),
                  "slowest_us": round(max(seconds.values()) * 1e6, 2)})  # fmt: skip


def make_pool(backend: CudaBackend, gib: int, longest: int = 256 * MIB) -> BlockPool:
    """A pool with ``gib`` GiB of addresses and budget that grows by what is asked for only."""
    blocks, page = gib * GIB // SPEC.block_bytes, backend.page_bytes
    geometry = Geometry.of(SPEC, page_bytes=page, num_blocks=blocks)
    budget = LocalBudget(gib * GIB)
    return BlockPool(PagePool(backend, geometry, budget, longest // page, 64 * MIB // page))


def growth(backend: CudaBackend) -> None:
    """Grow and shrink through the block pool, nothing spare, beside the raw calls."""
    pool = make_pool(backend, 64)
    held: list[Any] = []

    def empty() -> None:
        while held:
            pool.free(held.pop())
        pool.trim(may_split=False)
        gpu_raw.settle(SCRUB_S)

    def full() -> None:
        empty()
        pool.free(pool.alloc(512))

    for gib, target in ((1, 0.6), (8, 3.0)):
        take_quickest_core()
        raw = gpu_raw.grow_ms(gib * GIB, repeats=9, pause_s=SCRUB_S)
        samples = timed(lambda gib=gib: held.append(pool.alloc(gib * 512)), 15, before=empty)
        add(f"grow_{gib}gib_ms", samples, "ms", target, peers=raw)
    take_quickest_core()
    samples = timed(pool.drop_spares, 15, before=full)
    raw = gpu_raw.shrink_ms(GIB, repeats=9, pause_s=SCRUB_S)
    add("shrink_1gib_ms", samples, "ms", 0.9, peers=raw)
    empty()
    take_quickest_core()
    one_block(backend, pool)
    take_quickest_core()
    take_and_give(pool)
    pool.close()


def one_block(backend: CudaBackend, pool: BlockPool) -> None:
    """Grow by one block beside create, map and access of the same size, alternating.

    Each block is given back before the next, and then, ``in_a_row``, only all of them together:
    what growth leaves to be written up later is paid there. The raw calls are slower after we have
    given back, so ``both_after_raw_x`` is the same with raw calls ahead of either side.
    """
    ours, raw, again = [], [], []
    for index in range(520):
        taken, ids = taken_s(pool)
        pool.free(ids)
        pool.trim(may_split=False)
        direct = gpu_raw.one_handle_s(backend.page_bytes)
        second = gpu_raw.one_handle_s(backend.page_bytes)
        if index >= 20:
            ours.append(taken)
            raw.append(direct)
            again.append(second)
    row, beside, held = [], [], []
    for _ in range(520):
        taken, ids = taken_s(pool)
        held.append(ids)
        row.append(taken)
        beside.append(gpu_raw.one_handle_s(backend.page_bytes))
    for ids in held:
        pool.free(ids)
    pool.trim(may_split=False)
    middle = statistics.median(raw)
    add("grow_block_over_raw", [s / middle for s in ours], "x", 1.15,
        both_after_raw_x=round(statistics.median(ours) / statistics.median(again), 3),
        mean_x=round(statistics.fmean(ours) / statistics.fmean(raw), 3),
        in_a_row_x=round(statistics.median(row) / statistics.median(beside), 3),
        in_a_row_mean_x=round(statistics.fmean(row) / statistics.fmean(beside), 3),
        peers={"ours us": round(statistics.median(ours) * 1e6, 2),
               "raw driver us": round(middle * 1e6, 2)})  # fmt: skip


def taken_s(pool: BlockPool) -> tuple[float, Any]:
    """Seconds to take a block, and its id."""
    start = time.perf_counter()
    ids = pool.alloc(1)
    return time.perf_counter() - start, ids


def take_and_give(pool: BlockPool) -> None:
    """Blocks that are there already: no driver call."""
    for count, target in ((1, 3), (16, 4), (256, 9)):
        pool.free(pool.alloc(count))

        def pair(count: int = count) -> None:
            for _ in range(200):
                pool.free(pool.alloc(count))

        add(f"alloc_free_us_{count}", [s / 200 for s in timed(pair, 30)], "us", target)


def decode(backend: CudaBackend) -> None:
    """256 blocks a step for 10,000 steps, the memory grown ahead by the caretaker.

    A wave is a prefill (not counted), 80 steps that take 40 GiB, and a release. A step is followed
    by 5 ms of work on the GPU, waited for as an engine does: in that time the card reads the
    model's weights once, so no forward pass is faster.
    """
    work = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def forward() -> None:
        for _ in range(4):
            torch.mm(work, work)
        torch.cuda.synchronize()

    steps: list[float] = []
    config = Config(broker=False)
    with KVCache(SPEC, backend=backend, max_tokens=64 * GIB // SPEC.token_bytes, name="decode",
                 budget=LocalBudget(64 * GIB), config=config) as cache:  # fmt: skip
        pool = cache._blocks  # noqa: SLF001 - an engine's step takes blocks, not tokens
        for _ in range(125):
            held = [pool_alloc(cache, 1024)]
            forward()
            for _ in range(80):
                start = time.perf_counter()
                held.append(pool_alloc(cache, 256))
                steps.append(time.perf_counter() - start)
                forward()
            with pool.lock:
                for ids in held:
                    pool.free(ids)
            cache.trim()
            time.sleep(SCRUB_S)
        counters = cache.stats().counters
    late = sum(s > 50e-6 for s in steps)
    add("decode_growth_p99_us", [tail(steps)], "us", 50, repeats=len(steps),
        median_us=round(statistics.median(steps) * 1e6, 2), max_us=round(max(steps) * 1e6, 1),
        steps_over_50us=late, extents_ahead=counters.ahead,
        extents_on_demand=counters.grow)  # fmt: skip


def pool_alloc(cache: KVCache, count: int) -> Any:
    """Blocks, as the cache takes them for its sequences."""
    pool = cache._blocks  # noqa: SLF001
    with pool.lock:
        return pool.alloc(count)


def splits(backend: CudaBackend) -> None:
    """8 GiB in extents of 64 MiB with one live block each: back to the packed floor."""
    ratios, rates = [], []
    for index in range(7):
        pool = make_pool(backend, 16, 64 * MIB)
        ids = pool.alloc(4096)
        live = ids[::32].copy()
        base = pool.pages.address_of(0)
        views = [tensor_from_address(base + int(b) * SPEC.block_bytes, SPEC.block_bytes, "cuda:0")
                 for b in live]  # fmt: skip
        for number, view in enumerate(views):
            view.fill_(number % 251)
        torch.cuda.synchronize()
        pool.free(ids[[i for i in range(4096) if i % 32]])
        before, start = pool.pages.backed_bytes, time.perf_counter()
        pool.trim()
        taken = time.perf_counter() - start
        equal = all(bool((v == n % 251).all()) for n, v in enumerate(views))
        assert equal, "a byte was lost"
        floor = pool.geometry.packed_floor_bytes(len(live) + 1)
        if index >= 2:
            ratios.append(pool.pages.backed_bytes / floor)
            rates.append((before - pool.pages.backed_bytes) / GIB / taken)
        pool.close()
    add("split_floor_ratio", ratios, "x", 1.02)
    add("split_gib_per_s", rates, "GiB/s", 230, contents_equal=True)


def bandwidth(backend: CudaBackend) -> None:
    """Torch's copy and sum over elastic memory against its own allocations, alternating."""
    pool = make_pool(backend, 48)
    first = int(pool.alloc(8192).min())  # 16 GiB
    base = pool.pages.address_of(0) + first * SPEC.block_bytes
    mine = tensor_from_address(base, 16 * GIB, "cuda:0").view(torch.float32)
    theirs = torch.empty(16 * GIB // 4, dtype=torch.float32, device="cuda")
    half = mine.numel() // 2
    for tensor in (mine, theirs):
        tensor.uniform_()
    works = {"copy": lambda t: t[:half].copy_(t[half:]), "sum": lambda t: t.sum()}
    for name, work in works.items():
        own = [gpu_seconds(work, mine if i % 2 else theirs) for i in range(32)][6:]
        ours, other = statistics.median(own[1::2]), statistics.median(own[::2])
        add(f"torch_{name}_ratio", [other / ours], "x", 0.99, repeats=len(own) // 2,
            tb_per_s=round(16 * GIB / ours / 1e12, 3),
            peers={"torch.empty TB/s": round(16 * GIB / other / 1e12, 3)})  # fmt: skip
    pool.close()


def gpu_seconds(work: Callable[[Any], Any], tensor: Any) -> float:
    """Seconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work(tensor)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def peers(_: CudaBackend) -> None:
    """4 GiB from an idle peer's prefixes; 4 GiB back after a peer's SIGKILL."""
    add("peer_claim_4gib_ms", gpu_peers.claims(SPEC, rounds=7), "ms", 30)
    add("kill_to_claimed_4gib_ms", gpu_peers.kills(SPEC, rounds=5), "ms", None)


PARTS = {"setup": setup, "growth": growth, "decode": decode, "splits": splits,
         "bandwidth": bandwidth, "peers": peers}  # fmt: skip


def merge_upstream(path: str) -> None:
    """Put upstream's figures of the same run beside ours."""
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    for row in ROWS:
        for layout, figures in document["rows"].get(row["id"], {}).items():
            row.setdefault("peers", {})[f"{document['peer']} {layout}"] = figures["median"]


def driver_version() -> str:
    """Of the kernel module."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "unknown"


def report(failed: list[str]) -> None:
    """Write ``gpu_memory.json``; the table comes last, for a log whose end is what one sees."""
    document = {
        "schema_version": SCHEMA_VERSION, "commit": os.environ.get("COMMIT") or commit(),
        "device": torch.cuda.get_device_name(0), "driver": driver_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "failed": failed, "rows": ROWS,
        "cores": CORES,
    }  # fmt: skip
    out = Path(os.environ.get("OUT") or RESULTS) / "gpu_memory.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for row in ROWS:
        more = {k: v for k, v in row.items()
                if k not in {"id", "value", "unit", "target", "repeats", "p99"}}  # fmt: skip
        print(f"{row['id']:<24} {row['value']:>10} {row['unit']:<5} target {row['target']!s:<6} "
              f"p99 {row['p99']:<10} {more or ''}")  # fmt: skip


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--peers", help="what bench/peers/upstream_kvcached.py has written")
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    backend = CudaBackend("cuda:0")
    failed = []
    for name in options.parts or PARTS:
        try:
            PARTS[name](backend)
        except Exception:  # noqa: BLE001 - one part must not hide the others' figures
            failed.append(name)
            print(f"{name} FAILED:")
            traceback.print_exc()
        os.sched_setaffinity(0, ALL_CORES)  # growth stays on one of them
    if options.peers:
        merge_upstream(options.peers)
    report(failed)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
