"""Whether a dead owner's bytes are really back with the device (docs/broker.md, rule 3).

The broker must not hold an engine's memory to find out, since that keeps the memory alive. It asks
the device how much is in use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

TIMEOUT_S = 5.0
"""After this the lease is credited with a warning: 20 times the slowest return measured."""
POLL_S = 0.01
_TOLERANCE = 16 << 20


class MemoryProbe(Protocol):
    """What the device says about the memory in use."""

    def observe(self, leased: int) -> None:
        """Look at the device while all owners live; ``leased`` is the sum of their leases."""
        ...

    def is_back(self, leased: int) -> bool:
        """Whether the device uses no more than tenants with ``leased`` bytes can account for."""
        ...


class NoProbe:
    """A device that cannot be asked: the end of the process is taken for the return of its bytes.

    On CUDA without forks and importers both were seen at the same moment.
    """

    def observe(self, leased: int) -> None:
        """Nothing to see."""

    def is_back(self, leased: int) -> bool:  # noqa: ARG002 (the protocol's signature)
        """Taken for granted."""
        return True


class ShmemProbe:
    """The CPU backend: what can outlive its owner there is ``Shmem`` in ``/proc/meminfo``.

    That is memfds, which a forked child may hold. Anonymous memory, the default, never does: it is
    not given to children, and the kernel frees it before the pidfd fires.

    ``Shmem`` counts pages of other programs too, and a lease counts pages that nobody has touched.
    So the test errs towards "back": it says no only if more is in use than the other programs used
    and all remaining leases may use, plus a tolerance. Without forks the kernel frees a process's
    memory before its pidfd fires, so the answer is yes at the first look.
    """

    def __init__(self, foreign: int | None = None, used: Callable[[], int] | None = None) -> None:
        self._used = used or shmem_bytes
        self.foreign = self._used() if foreign is None else foreign
        """Bytes that other programs use, as far as known."""

    def observe(self, leased: int) -> None:
        """See ``MemoryProbe``. More than all leases is other programs' for certain."""
        used = self._used()
        self.foreign = used if leased == 0 else max(self.foreign, used - leased)

    def is_back(self, leased: int) -> bool:
        """See ``MemoryProbe``."""
        return self._used() - self.foreign <= leased + _TOLERANCE


def shmem_bytes() -> int:
    """Bytes of shared memory in use on this machine, memfds and tmpfs."""
    with open("/proc/meminfo", "rb", buffering=0) as file:
        for line in file.read(8192).splitlines():
            if line.startswith(b"Shmem:"):
                return int(line.split()[1]) * 1024
    return 0
