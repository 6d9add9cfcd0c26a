"""The thread that lets spares decay, retires fences and grows ahead, beside the engine's steps.

It sleeps until something is freed, then looks every 50 ms until nothing is spare or quarantined;
and at once when the ready blocks run low. It holds the cache only weakly, so a forgotten cache can
be collected.
"""

from __future__ import annotations

import logging
import threading
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
        """Ready blocks run low. Cheap; called by the engine's ``alloc``."""
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
        while True:
            self._bell.acquire()
            if not self._urgent:
                self._bell.acquire(timeout=_PERIOD)
            if self._stopping or not self._look():
                return

    def _look(self) -> bool:
        """One look; False when the cache is gone."""
        cache = self._cache()
        if cache is None:
            return False
        urgent, self._urgent, self._pending = self._urgent, False, False
        if self._stopping:  # it was told between the two
            return False
        try:
            if cache.take_care(urgent=urgent):
                self.wake()
        except KvcachedError:  # the engine's next call meets the same trouble and reports it
            _log.exception("%s: looking after spare memory failed", cache.name)
        return True
