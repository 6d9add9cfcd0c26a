"""``Turns``: memory is given back in small parts, and a step that waits goes between two of them.

Both need the tenant's lock. Unmapping costs the driver's time for each extent, and eviction vLLM's
for each block: a neighbour's claim for gigabytes held a step up for as long as all of it took. So a
part is of few extents and of few blocks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger("vllm.kvcached")
_PART_SECONDS = 0.0005
"""What one part is to take: a step waits for one, and perhaps for the call that it is in."""
_PART_HANDLES = 8
"""Most of a part. Beside running kernels the driver took 157 us to unmap and release one."""
_PART_BLOCKS = 256
"""Most of a part: vLLM forgets each by itself, in a microsecond or three."""
_FIRST_PART, _LEAST_PART = 64 << 20, 2 << 20
_WORTH_A_LINE_SECONDS = 0.0005
_MOMENT_SECONDS = 0.05
"""How long a step that waits for the lock has to get it: longer than a busy machine takes."""


class Turns:
    """Who may have ``lock``: the scheduler's thread, or the one that gives memory back.

    ``name`` is the engine's, for the log; an extent has ``handles``, which go together, and a block
    ``block_bytes`` in all of them.
    """

    def __init__(
        self, lock: threading.RLock, name: str, handles: int = 1, block_bytes: int = _FIRST_PART
    ) -> None:
        self._lock, self._free, self._name = lock, threading.Condition(lock), name
        self._waiting = 0
        self.giving = False
        """Whether memory is being given back, perhaps between two parts."""
        self.part_extents = max(1, _PART_HANDLES // handles)
        """Most extents of a part."""
        self._most_bytes = max(_LEAST_PART, _PART_BLOCKS * block_bytes)
        self.part_bytes = min(_FIRST_PART, self._most_bytes)
        """Most bytes of the next part."""
        self._said = self.longest_wait = 0.0
        """Seconds that a step has waited, at most."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """The lock, for the scheduler's thread; nobody starts another part meanwhile."""
        began = time.perf_counter()
        self._waiting += 1  # by one thread only
        try:
            self._lock.acquire()
        finally:
            self._waiting -= 1
        try:
            self._note(time.perf_counter() - began)
            yield
        finally:
            self._free.notify_all()  # who gives memory back, and let this step go first
            self._lock.release()

    def _note(self, waited: float) -> None:
        """Say so if a step has waited longer than any before, by half at least: few lines."""
        if waited > self.longest_wait:
            if waited > max(_WORTH_A_LINE_SECONDS, 1.5 * self._said):
                self._said = waited
                _log.info("%s: a step waited %.2f ms for memory to be given back", self._name,
                          1e3 * waited)  # fmt: skip
            self.longest_wait = waited

    def give(self, nbytes: int, some: Callable[[int], int]) -> int:
        """Give back ``nbytes`` by calls of ``some``, which gets the most it should give.

        Ends when that gives nothing. Holds the lock, and releases it between parts for who waits.
        """
        freed, before = 0, self.giving
        self.giving = True
        try:
            while True:
                asked = min(nbytes - freed, self.part_bytes)
                given = self.part(asked, some)
                freed += given
                if not given or freed >= nbytes:
                    return freed
                if self._waiting:
                    self._free.wait_for(lambda: not self._waiting, _MOMENT_SECONDS)
        finally:
            self.giving = before

    def part(self, asked: int, some: Callable[[int], int]) -> int:
        """One part; the next is larger or smaller by the time that it took."""
        began = time.perf_counter()
        given = some(asked)
        took = time.perf_counter() - began
        if took > _PART_SECONDS:
            self.part_bytes = max(_LEAST_PART, self.part_bytes // 2)
        elif took < _PART_SECONDS / 4 and given >= self.part_bytes:
            self.part_bytes = min(2 * self.part_bytes, self._most_bytes)
        return given

    def check(self) -> None:
        """Assert that nobody is left at the door."""
        assert self._waiting >= 0, "Turns: more steps came in than waited"
        assert self.part_bytes >= _LEAST_PART, "Turns: parts of nothing"
