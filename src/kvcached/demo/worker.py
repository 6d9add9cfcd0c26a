"""One engine process of the demo: ``python -m kvcached.demo.worker``.

Commands come as JSON lines on stdin, events go as JSON lines to stdout; the end of stdin ends the
process, so nothing outlives the demo. The main thread computes, one thread reads, one samples.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcached.config import Config
from kvcached.demo.device import describe, page_bytes
from kvcached.demo.engine import Engine, Task
from kvcached.demo.figures import SAMPLE_SECONDS
from kvcached.demo.model import DTYPE
from kvcached.demo.workload import scale_of
from kvcached.errors import KvcachedError
from kvcached.memory.host import HostBackend

if TYPE_CHECKING:
    from kvcached.cache import KVCache

_RETRY_SECONDS = 0.002


class Worker:
    """A model, and at most one open cache with its engine."""

    def __init__(self, name: str, model: Any, device: str, emit: Any) -> None:
        self.name, self.model, self.device, self.emit = name, model, device, emit
        self.cache: KVCache | None = None
        self.engine: Engine | None = None

    # --- commands ---

    def open(
        self, *, runtime_dir: str, budget: int, limit: int, floor: int, resident: bool
    ) -> None:
        """Open a cache. ``resident``: back all of ``limit`` now and keep it, as a split does."""
        from kvcached.cache import KVCache
        from kvcached.layout import CacheSpec

        config = Config(runtime_dir=runtime_dir, budget=str(budget))
        spec = CacheSpec.from_hf(self.model.config, dtype=DTYPE)
        self.cache = KVCache(
            spec, device=self.device, name=self.name, max_tokens=4 * budget // spec.token_bytes,
            limit=limit, floor=floor, config=config,
        )  # fmt: skip
        if resident:
            _fill(self.cache)
        scale = scale_of(self.device)
        self.engine = Engine(
            self.model, self.cache, max_batch=scale.max_batch, step_tokens=scale.step_tokens,
            on_first=self._first, on_done=self._done,
        )  # fmt: skip
        self.emit("opened", stats=self._stats())

    def request(self, *, number: int, tokens: list[int], max_new_tokens: int) -> None:
        """Queue a request."""
        assert self.engine is not None, "open comes first"
        self.engine.submit(Task(number, list(tokens), max_new_tokens))

    def settle(self) -> None:
        """Give back everything that nothing uses: cached prefixes, then spares."""
        assert self.cache is not None, "open comes first"
        cached = self.cache.stats().cached_bytes
        self.cache.trim()
        self.emit("settled", cached_bytes=cached, stats=self._stats())

    def stay(self) -> None:
        """Say what is held while idle, and give nothing back (the static split)."""
        assert self.cache is not None, "open comes first"
        self.emit("settled", cached_bytes=self.cache.stats().cached_bytes, stats=self._stats())

    def claim(self, *, nbytes: int) -> None:
        """Take ``nbytes`` for a sequence, trying until the memory is there; hold it until close."""
        assert self.cache is not None, "open comes first"
        spec = self.cache.spec
        tokens = nbytes // spec.block_bytes * spec.block_size
        self.emit("claiming", nbytes=nbytes)
        sequence = self.cache.new_sequence()
        tries = 1
        while True:
            try:
                self.cache.extend(sequence, tokens)
                break
            except MemoryError:
                tries += 1
                time.sleep(_RETRY_SECONDS)
        self.emit("claimed", t=time.monotonic(), tries=tries, stats=self._stats())

    def close(self) -> None:
        """Close the cache; the process stays and can open another."""
        engine, cache = self.engine, self.cache
        self.engine = self.cache = None
        if engine is not None:
            engine.abort()
        if cache is not None:
            cache.close()
        self.emit("closed")

    # --- events ---

    def _first(self, task: Task) -> None:
        self.emit("first", id=task.id, t=time.monotonic())

    def _done(self, task: Task) -> None:
        self.emit(
            "done", id=task.id, t=time.monotonic(), tokens=task.generated,
            preemptions=task.preemptions, queued=task.queued,
        )  # fmt: skip

    def _stats(self) -> dict[str, Any]:
        cache, engine = self.cache, self.engine
        if cache is None:
            return {}
        stats = cache.stats()
        return {
            "backed": stats.backed_bytes,
            "in_use": stats.in_use_bytes,
            "cached": stats.cached_bytes,
            "spare": stats.spare_bytes,
            "lease": stats.lease_bytes,
            "limit": stats.limit_bytes,
            "floor": stats.packed_floor_bytes,
            **kernel_bytes(cache),
            "running": 0 if engine is None else len(engine.running),
            "waiting": 0 if engine is None else len(engine.waiting),
        }

    def sample_forever(self) -> None:
        """Send what is held every ``SAMPLE_SECONDS``, from a thread of its own."""
        while True:
            # At whole multiples, so that the samples of two engines belong to the same moment.
            time.sleep(SAMPLE_SECONDS - time.monotonic() % SAMPLE_SECONDS)
            try:
                stats = self._stats()
            except KvcachedError:  # closed between the look and the call
                continue
            if stats:
                self.emit("sample", t=time.monotonic(), stats=stats)

    # --- the loop ---

    def run(self, commands: queue.SimpleQueue[dict[str, Any]]) -> None:
        """Obey commands and compute, until told to exit."""
        while True:
            command = self._next_command(commands)
            if command.get("op") == "exit":
                self.close()
                return
            if command:
                getattr(self, command.pop("op"))(**command)
            elif self.engine is not None and not self.engine.step():
                time.sleep(_RETRY_SECONDS)  # all wait for memory that a neighbour holds

    def _next_command(self, commands: queue.SimpleQueue[dict[str, Any]]) -> dict[str, Any]:
        """The next command; waits for it if there is nothing to compute."""
        if self.engine is not None and self.engine.busy:
            with contextlib.suppress(queue.Empty):
                return commands.get_nowait()
            return {}
        with contextlib.nullcontext() if self.cache is None else self.cache.idle():
            return commands.get()


def _fill(cache: KVCache) -> None:
    """Back as much as the cache may hold, and keep it: as cached blocks that nobody asks for."""
    sequence = cache.new_sequence(salt="resident")
    step = range(cache.spec.block_size)
    try:
        while True:
            cache.extend(sequence, list(step))
    except MemoryError:
        cache.free(sequence)


def kernel_bytes(cache: KVCache) -> dict[str, int]:
    """What the kernel counts for the cache's memory: the check on our own books.

    Nothing on a GPU, whose driver counts by device only.
    """
    backend = cache.backend
    return {"kernel": backend.resident_bytes()} if isinstance(backend, HostBackend) else {}


def _emitter(stream: Any) -> Any:
    lock = threading.Lock()

    def emit(event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields})
        with lock:
            stream.write(line + "\n")
            stream.flush()

    return emit


def _read(commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    # Stdin ended: the demo is gone. Leave even from within a forward pass; the kernel takes the
    # memory back and the broker credits it.
    os._exit(0)


def main() -> None:
    """Load the model, say so, obey."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but events may reach the pipe
    emit = _emitter(events)
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    settings = json.loads(sys.stdin.readline())
    import torch

    from kvcached.demo.model import load_model

    torch.set_num_threads(1)
    import kvcached.engines.transformers  # noqa: F401 - registers the attention function
    from kvcached.demo.speed import measure

    device = settings["device"]
    model = load_model(Path(settings["model"]), attention="kvcached", device=device)
    worker = Worker(settings["name"], model, device, emit)
    threading.Thread(target=_read, args=(commands,), daemon=True).start()
    threading.Thread(target=worker.sample_forever, daemon=True).start()
    emit(
        "ready", pid=os.getpid(), sizes=_sizes(model.config, device), machine=describe(device),
        speed=measure(model, device, scale_of(device)),
    )  # fmt: skip
    worker.run(commands)


def _sizes(config: Any, device: str) -> dict[str, int]:
    from kvcached.layout import CacheSpec

    spec = CacheSpec.from_hf(config, dtype=DTYPE)
    return {
        "token": spec.token_bytes,
        "block": spec.block_bytes,
        "block_size": spec.block_size,
        "page": page_bytes(device, spec),
    }


if __name__ == "__main__":
    main()
