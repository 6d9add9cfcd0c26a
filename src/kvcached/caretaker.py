"""The thread that lets spares decay, retires fences and grows ahead, beside the engine's steps.

It sleeps until something is freed, then looks every 50 ms until nothing is spare or quarantined.
While blocks are kept ready it also looks, without the lock, whether they run low, as often as the
growth asks for. A step that takes ready blocks does not ring: to wake a thread takes longer than
the step. It holds the cache only weakly, so a forgotten cache can be collected.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from typing import TYPE_CHECKING

from kvcached.errors import KvcachedError
from kvcached.stats import TenantReport

if TYPE_CHECKING:
    from kvcached.elastic import ElasticBlocks

_PERIOD = 0.05
_log = logging.getLogger(__name__)


class WeakTenant:
    """The cache as its budget sees it (``Tenant``), held weakly, so that it can be collected."""

    def __init__(self, cache: ElasticBlocks) -> None:
        self._cache = weakref.ref(cache)

    def reclaim(self, nbytes: int, *, patient: bool) -> int:
        """See ``Tenant.reclaim``."""
        cache = self._cache()
        return 0 if cache is None else cache.reclaim(nbytes, patient=patient)

    def report(self) -> TenantReport:
        """See ``Tenant.report``."""
        cache = self._cache()
        return TenantReport() if cache is None else cache.report()


class Caretaker:
    """A daemon thread for one cache."""

    def __init__(self, cache: ElasticBlocks) -> None:
        self._cache = weakref.ref(cache, lambda _: self.stop())
        self._bell = threading.Lock()  # locked: nothing has been rung; far cheaper than an Event
        self._bell.acquire()
        self._pending = self._urgent = self._stopping = False
        self._thread = threading.Thread(
            target=self._run, name=f"kvcached-{cache.name}", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do. Cheap; called at every ``free``."""
        if not self._pending:
            self._pending = True
            self._ring()

    def hurry(self) -> None:
        """Something was grown on demand, so growth ahead may be due."""
        if not self._urgent:
            self._urgent = True
            self._ring()

    def stop(self) -> None:
        """End the thread."""
        self._stopping = self._urgent = True
        self._ring()

    def _ring(self) -> None:
        try:  # noqa: SIM105 - suppress() takes longer, and the engine's step rings
            self._bell.release()
        except RuntimeError:  # somebody else has rung, and is not heard yet
            pass

    def end(self) -> None:
        """End the thread, and wait for that."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        due = watch = math.inf  # when to look at everything, and how soon at the ready blocks
        while True:
            wait = min(due - time.monotonic(), watch)
            self._bell.acquire(timeout=-1 if wait == math.inf else max(wait, 0.0))
            cache = None if self._stopping else self._cache()
            if cache is None:
                return
            now = time.monotonic()
            if now >= due or self._urgent or cache.seconds_ready() == 0.0:
                self._look(cache, urgent=now < due)
                due = math.inf if now >= due else due
            if self._pending:
                due = min(due, now + _PERIOD)
            watch = cache.seconds_ready()
            del cache  # not held while asleep

    def _look(self, cache: ElasticBlocks, *, urgent: bool) -> None:
        self._urgent = False
        self._pending = self._pending and urgent
        try:
            if cache.take_care(urgent=urgent):
                self._pending = True
        except KvcachedError:  # the engine's next call meets the same trouble and reports it
            _log.exception("%s: looking after spare memory failed", cache.name)
