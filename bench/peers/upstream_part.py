"""One part of the measurement of the C++ peer, in a process where ``kvcached`` is the peer's.

``upstream_kvcached.py`` starts it, with the peer's settings and path in the environment. Records
go to a file, a line of JSON each, as they come: a crash loses none that was written.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

GIB = 1 << 30
# Llama-3.1-8B: 16 tokens are 32 KiB of K in one layer and 2 MiB of K and V over all layers.
LAYERS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, ITEM_BYTES = 32, 8, 128, 16, 2
CELL_BYTES = KV_HEADS * HEAD_DIM * ITEM_BYTES
BLOCK_BYTES = BLOCK_TOKENS * CELL_BYTES * 2 * LAYERS
# The peer's page is 2 MiB in each of K and V of each layer: its smallest growth is 128 MiB.
PAGE_BYTES = 2 << 20
BUNDLE_BYTES = PAGE_BYTES * 2 * LAYERS
BUNDLE_BLOCKS = BUNDLE_BYTES // BLOCK_BYTES

WARM_UP = 2


def shorten(text: str) -> str:
    """An error for the notes: file names without their folders, one line, no essay."""
    return re.sub(r"(?<!\w)/(?:[^\s/'\":]+/)+", "", " ".join(text.split()))[:300]


class Records:
    """The file that a part's process leaves its rows and notes in."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")

    def note(self, text: str) -> None:
        """Append one note."""
        self.write({"note": text})

    def row(self, ident: str, unit: str, samples: Sequence[float], **more: Any) -> None:
        """Append one row; ``samples`` are seconds, or plain figures if ``unit`` is none of time."""
        scale = {"ms": 1e3, "us": 1e6}.get(unit, 1.0)
        ordered = sorted(sample * scale for sample in samples)
        p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
        self.write({
            "id": ident, "unit": unit, "median": round(statistics.median(ordered), 4),
            "p99": round(p99, 4), "min": round(ordered[0], 4), "repeats": len(ordered), **more,
        })  # fmt: skip

    def attempt(self, what: str, step: Callable[[], Any]) -> Any:
        """What ``step`` gives; if it fails, a note with its error and None."""
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - every failure of the peer is a result
            self.note(shorten(f"{what}: {type(error).__name__}: {error}"))
            return None


def part_main(part: str, out: Path) -> int:
    """One part, in the peer's process: 0 even if the peer failed, since that is noted."""
    faulthandler.enable()
    records = Records(out)
    if records.attempt("import", lambda: import_peer(records)) is not None:
        records.attempt(part, lambda: MEASURES[part](records))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # its destructors are no part of the rows, and may hang


def import_peer(records: Records) -> bool:
    """The CUDA context before any clock, then the peer, which must be the one that was built."""
    import torch

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    import kvcached.integration.vllm.interfaces

    import kvcached

    expected = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    if not str(kvcached.__file__).startswith(expected):
        raise ImportError("another kvcached than the peer was imported")
    device = torch.cuda.get_device_properties(0).name
    records.write({"device": device, "torch": torch.__version__, "version": kvcached.__version__})
    return True


class Opened:
    """The peer over the whole card, as its vLLM integration opens it in one process."""

    def __init__(self) -> None:
        import torch
        from kvcached.integration.vllm import interfaces

        total = torch.cuda.get_device_properties(0).total_memory
        shape = (2, total // BUNDLE_BYTES * BUNDLE_BLOCKS, BLOCK_TOKENS, KV_HEADS, HEAD_DIM)
        self.interfaces = interfaces
        interfaces.init_kvcached(is_worker=True, device="cuda:0", async_sched=False)
        self.views = interfaces.alloc_kv_cache(
            shape, BLOCK_TOKENS, torch.bfloat16, "cuda:0", LAYERS, attention_type="GQA"
        )
        self.manager = interfaces.get_kv_cache_manager(None, BLOCK_TOKENS, CELL_BYTES, LAYERS)
        self.pages = self.manager.page_allocator
        self.held = [self.alloc(1)]

    def alloc(self, count: int) -> list[int]:
        """Blocks, or an error if it has none to give."""
        ids = self.manager.alloc(count)
        if ids is None or len(ids) != count:
            raise MemoryError(f"alloc({count}) gave {ids if ids is None else len(ids)}")
        return ids

    def backed(self) -> int:
        """Bytes behind its pages, in use or spare."""
        pages = self.pages.get_num_inuse_pages() + self.pages.get_num_reserved_pages()
        return int(pages) * BUNDLE_BYTES

    def close(self) -> None:
        """Give everything back."""
        for ids in self.held:
            self.manager.free(ids)
        self.held, self.views = [], []
        if self.interfaces.shutdown_kvcached() is False:
            raise RuntimeError("shutdown_kvcached() asks to be called again")


def timed(
    step: Callable[[], Any],
    repeats: int,
    *,
    before: Callable[[], Any] = lambda: None,
    after: Callable[[Any], Any] = lambda _: None,
) -> list[float]:
    """Seconds of each of ``repeats`` runs after some that are not counted."""
    samples = []
    for index in range(WARM_UP + repeats):
        before()
        start = time.perf_counter()
        result = step()
        taken = time.perf_counter() - start
        after(result)
        if index >= WARM_UP:
            samples.append(taken)
    return samples


def measure_setup(records: Records) -> None:
    """From ``init_kvcached`` to the first block, again and again in one process."""
    import torch

    samples: list[float] = []
    for _ in range(5):
        free, _total = torch.cuda.mem_get_info()
        start = time.perf_counter()
        opened = records.attempt("set-up", Opened)
        if opened is None:
            return
        samples.append(time.perf_counter() - start)
        used = free - torch.cuda.mem_get_info()[0]
        first = round(samples[0] * 1e3, 4)  # the last row written counts, of however many came
        records.row("setup_ms", "ms", samples, first=first, device_bytes=used)
        if not records.attempt("shut-down", lambda opened=opened: opened.close() or True):
            return


def measure_alloc_free(records: Records) -> None:
    """Pairs of alloc and free with its default reserve, so that nothing needs the driver."""
    opened = Opened()
    time.sleep(0.5)  # its thread fills the reserve
    for count in (1, 16, 256):

        def pairs(count: int = count) -> None:
            for _ in range(200):
                opened.manager.free(opened.alloc(count))

        def measured(count: int = count, pairs: Callable[[], None] = pairs) -> None:
            pairs()
            time.sleep(0.2)
            before = opened.backed()
            samples = [sample / 200 for sample in timed(pairs, 30)]
            moved = opened.backed() - before
            records.row(f"alloc_free_us_{count}", "us", samples, inner=200)
            if moved:
                records.note(f"alloc_free_us_{count}: {moved} bytes more mapped at its end")

        records.attempt(f"alloc_free_us_{count}", measured)
    records.attempt("shut-down", opened.close)


def measure_growth(records: Records) -> None:
    """Cold growth and shrink: nothing is mapped ahead or kept, each page is the driver's work."""
    opened = Opened()

    def give_back(ids: list[int]) -> None:
        opened.manager.free(ids)
        opened.manager.trim()

    fill_page(opened, give_back)

    def grown(ident: str, blocks: int, repeats: int, unit: str) -> None:
        floor = opened.backed()
        ids = opened.alloc(blocks)
        mapped = opened.backed() - floor
        give_back(ids)
        samples = timed(lambda: opened.alloc(blocks), repeats, after=give_back)
        left = opened.backed() - floor
        records.row(ident, unit, samples, bytes=mapped)
        if left:
            records.note(f"{ident}: {left} bytes still mapped after free and trim")

    def shrunk(blocks: int) -> None:
        ids: list[int] = []

        def fill() -> None:
            ids[:] = opened.alloc(blocks)

        samples = timed(lambda: give_back(ids), 15, before=fill)
        records.row("shrink_1gib_ms", "ms", samples, bytes=blocks * BLOCK_BYTES)

    one, eight = GIB // BLOCK_BYTES, 8 * GIB // BLOCK_BYTES
    records.attempt("grow_1gib_ms", lambda: grown("grow_1gib_ms", one, 15, "ms"))
    records.attempt("shrink_1gib_ms", lambda: shrunk(one))
    records.attempt("grow_block_us", lambda: grown("grow_block_us", 1, 300, "us"))
    records.attempt("grow_block_over_raw", lambda: over_raw(records, opened, give_back))
    records.attempt("grow_8gib_ms", lambda: grown("grow_8gib_ms", eight, 7, "ms"))
    records.attempt("shut-down", opened.close)


def fill_page(opened: Opened, give_back: Callable[[list[int]], None]) -> None:
    """Hold the rest of the page that the first block lies on: from here on whole pages are asked.

    Whether that page holds a null block, too, is the peer's secret, so it is tried out.
    """
    for _ in range(BUNDLE_BLOCKS):
        before = opened.backed()
        ids = opened.alloc(1)
        if opened.backed() > before:
            give_back(ids)
            return
        opened.held.append(ids)


def over_raw(records: Records, opened: Opened, give_back: Callable[[list[int]], None]) -> None:
    """Its growth by one block over the driver's for one block's bytes, alternating."""
    raw, floor = RawBlock(), opened.backed()
    ids = opened.alloc(1)
    mapped = opened.backed() - floor
    give_back(ids)
    ratios, driver = [], []
    for _ in range(300):
        start = time.perf_counter()
        ids = opened.alloc(1)
        taken = time.perf_counter() - start
        give_back(ids)
        driver.append(raw.seconds())
        ratios.append(taken / driver[-1])
    records.row(
        "grow_block_over_raw", "x", ratios, raw_us=round(statistics.median(driver) * 1e6, 4),
        bytes=mapped, raw_bytes=BLOCK_BYTES,
    )  # fmt: skip


class RawBlock:
    """The three driver calls that back the bytes of one block."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self.prop = driver.CUmemAllocationProp()
        self.prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.prop.location.id = 0
        self.access = driver.CUmemAccessDesc()
        self.access.location = self.prop.location
        self.access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.base = self.call("cuMemAddressReserve", BLOCK_BYTES, 0, 0, 0)

    def call(self, name: str, *args: Any) -> Any:
        """The value of a driver call, which must succeed."""
        status, *values = getattr(self.driver, name)(*args)
        if int(status):
            raise RuntimeError(f"{name}: {status}")
        return values[0] if values else None

    def seconds(self) -> float:
        """Create, map and grant access; undone off the clock."""
        start = time.perf_counter()
        handle = self.call("cuMemCreate", BLOCK_BYTES, self.prop, 0)
        self.call("cuMemMap", self.base, BLOCK_BYTES, 0, handle, 0)
        self.call("cuMemSetAccess", self.base, BLOCK_BYTES, [self.access], 1)
        taken = time.perf_counter() - start
        self.call("cuMemUnmap", self.base, BLOCK_BYTES)
        self.call("cuMemRelease", handle)
        return taken


MEASURES: dict[str, Callable[[Records], None]] = {
    "setup": measure_setup,
    "alloc_free": measure_alloc_free,
    "growth": measure_growth,
}


if __name__ == "__main__":
    sys.exit(part_main(sys.argv[1], Path(sys.argv[2])))
