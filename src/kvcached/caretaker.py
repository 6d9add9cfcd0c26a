"""The thread that lets spares decay and retires fences while the engine is busy elsewhere.

It sleeps until something is freed, then looks every 50 ms until nothing is spare or quarantined.
It holds the cache only weakly, so a forgotten cache can be collected.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING

from kvcached.errors import KvcachedError
from kvcached.stats import TenantReport

if TYPE_CHECKING:
    from kvcached.cache import KVCache

_PERIOD = 0.05
_log = logging.getLogger(__name__)


class WeakTenant:
    """The cache as its budget sees it (``Tenant``), held weakly, so that it can be collected."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = weakref.ref(cache)

    def reclaim(self, nbytes: int) -> int:
        """See ``Tenant.reclaim``."""
        cache = self._cache()
        return 0 if cache is None else cache.reclaim(nbytes)

    def report(self) -> TenantReport:
        """See ``Tenant.report``."""
        cache = self._cache()
        return TenantReport() if cache is None else cache.report()


class Caretaker:
    """A daemon thread for one cache."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = weakref.ref(cache, lambda _: self.stop())
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(
            target=self._run, name=f"kvcached-{cache.name}", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do. Cheap; called at every ``free``."""
        if not self._wake.is_set():
            self._wake.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._wake.set()

    def join(self) -> None:
        """Wait for the thread's end."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        pause = threading.Event()  # never set: an interruptible sleep is not needed for 50 ms
        while True:
            self._wake.wait()
            if self._stopping:
                return
            pause.wait(_PERIOD)
            if not self._stopping and not self._look():
                return

    def _look(self) -> bool:
        """One look; False when the cache is gone."""
        cache = self._cache()
        if cache is None:
            return False
        try:
            self._wake.clear()
            if cache.take_care():
                self._wake.set()
        except KvcachedError:  # the engine's next call meets the same trouble and reports it
            _log.exception("%s: giving back spare memory failed", cache.name)
        return True
