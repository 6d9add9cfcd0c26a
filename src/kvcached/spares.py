"""How many bytes of empty extents stay mapped: a target that follows growth and decays in idleness.

Pure arithmetic: the time is passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class SparePolicy:
    """Keep as spare what the recent growth rate would use within ``horizon`` seconds.

    The rate is an exponentially weighted mean with time constant ``decay / 4``, so that a target
    is below 2 % of itself ``decay`` seconds after the last growth, and is then called zero.

    Parameters
    ----------
    decay:
        Seconds after which an idle pool keeps no spare.
    horizon:
        Seconds of growth to keep ready.
    """

    decay: float = 1.0
    horizon: float = 0.25
    _rate: float = 0.0  # bytes per second
    _last_growth: float = -math.inf
    _updated: float = -math.inf
    _time_constant: float = field(init=False)
    _burst: float = field(init=False)  # growth this close together decays as one: 1.6 % at most

    def grew(self, nbytes: int, now: float) -> None:
        """Extents of ``nbytes`` went from empty, or unbacked, into use at time ``now``."""
        if now - self._updated > self._burst:
            self._advance(now)
        self._rate += nbytes / self._time_constant
        self._last_growth = now

    @property
    def rate(self) -> float:
        """Bytes a second, as of the last growth: since then it may have decayed."""
        return self._rate

    def forget(self) -> None:
        """What was measured holds no more: the memory is wanted elsewhere."""
        self._rate, self._last_growth = 0.0, -math.inf

    def target(self, now: float) -> int:
        """Bytes that may stay spare at time ``now``."""
        if now - self._last_growth >= self.decay:
            return 0
        self._advance(now)
        return int(self._rate * self.horizon)

    def __post_init__(self) -> None:
        self._time_constant = max(self.decay / 4, 1e-3)
        self._burst = self._time_constant / 64

    def _advance(self, now: float) -> None:
        elapsed = now - self._updated
        if elapsed > 0:
            self._rate *= math.exp(-elapsed / self._time_constant)
            self._updated = now
