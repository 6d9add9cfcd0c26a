"""Fences: points in a device's work. A freed block waits for one before its memory may go."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from kvcached.memory.base import Fence
from kvcached.memory.driver import Calls

_SHORTEST_POLL, _LONGEST_POLL = 20e-6, 1e-3


class CudaFence:
    """A CUDA event; ``CudaBackend.fence`` makes and records it.

    Parameters
    ----------
    calls, event:
        The driver, and its event: owned, destroyed once it has passed, or by ``close``.
    require_usable:
        Raises if the backend cannot be asked any more.
    forget:
        Called with the fence when its event is gone.
    """

    def __init__(
        self,
        calls: Calls,
        event: Any,
        require_usable: Callable[[], None],
        forget: Callable[[CudaFence], None],
    ) -> None:
        self._call, self.event = calls, event
        self._require_usable, self._forget = require_usable, forget
        self._passed = self._closed = False

    def passed(self) -> bool:
        """Whether the device got past the event. Never blocks; once true, stays true.

        ``DriverError`` if the device failed before it got there.
        """
        if self._passed:
            return True
        self._require_usable()
        driver = self._call.driver
        result = driver.cuEventQuery(self.event)
        if result[0] == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._call.check(result, "cuEventQuery")
        self._passed = True
        self.close()
        return True

    def close(self) -> None:
        """Destroy the event, passed or not. Idempotent."""
        if not self._closed:
            self._call("cuEventDestroy", self.event)
            self._closed = True
            self._forget(self)


class PassedFence:
    """A fence behind nothing: where the device does its work before a call returns."""

    def passed(self) -> bool:
        """Always."""
        return True


def fence_on(backend: Any, stream: int | None) -> Fence:
    """A fence behind what is queued on ``stream``; ``None``: torch's current stream, if any."""
    make = getattr(backend, "fence", None)
    if make is None:
        return PassedFence()
    torch = sys.modules.get("torch")  # who queued work with it has imported it
    if stream is None and torch is not None:
        stream = torch.cuda.current_stream(backend.device).cuda_stream
    fence: Fence = make(stream or 0)
    return fence


def wait_for(fence: Fence | None, seconds: float = math.inf) -> None:
    """Poll until the fence has passed, or ``seconds`` have: no other work is waited for."""
    pause, until = _SHORTEST_POLL, time.monotonic() + seconds
    while fence is not None and not fence.passed() and time.monotonic() < until:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL)
