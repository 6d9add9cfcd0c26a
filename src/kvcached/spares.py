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
    rate: float = 0.0
    """Bytes a second, as of the last growth: since then it may have decayed."""
    last_growth: float = -math.inf
    updated: float = -math.inf
    time_constant: float = field(init=False)
    burst: float = field(init=False)
    """Seconds: growth this close together decays as one, 1.6 % at most."""

    def grew(self, nbytes: int, now: float) -> None:
        """Extents of ``nbytes`` went from empty, or unbacked, into use at time ``now``.

        ``Bump`` has this written out.
        """
        if now - self.updated > self.burst:
            self.advance(now)
        self.rate += nbytes / self.time_constant
        self.last_growth = now

    def forget(self) -> None:
        """What was measured holds no more: the memory is wanted elsewhere."""
        self.rate, self.last_growth = 0.0, -math.inf

    def target(self, now: float) -> int:
        """Bytes that may stay spare at time ``now``."""
        if now - self.last_growth >= self.decay:
            return 0
        self.advance(now)
        return int(self.rate * self.horizon)

    def __post_init__(self) -> None:
        self.time_constant = max(self.decay / 4, 1e-3)
        self.burst = self.time_constant / 64

    def advance(self, now: float) -> None:
        """Let the rate decay until ``now``."""
        elapsed = now - self.updated
        if elapsed > 0:
            self.rate *= math.exp(-elapsed / self.time_constant)
            self.updated = now
