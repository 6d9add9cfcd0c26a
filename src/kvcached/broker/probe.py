"""What the device says of its memory (docs/broker.md, rules 3 and 8).

Whether a dead owner's bytes are really back, and what others left. The broker must not hold an
engine's memory to find out, since that keeps the memory alive. It asks the device how much is in
use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

TIMEOUT_S = 5.0
"""After this the lease is credited with a warning: 20 times the slowest return measured."""
POLL_S = 0.01
_TOLERANCE = 16 << 20
_MOST_RESERVED = 1 << 30
T = TypeVar("T")


class MemoryProbe(Protocol):
    """What the device says about the memory in use."""

    def observe(self, leased: int) -> None:
        """Look at the device while all owners live; ``leased`` is the sum of their leases."""
        ...

    def is_back(self, leased: int, pid: int) -> bool:
        """Whether a dead owner's bytes are back.

        ``leased``: of all other tenants. ``pid``: the dead owner's, 0 if it is not known.
        """
        ...

    def room(self) -> int | None:
        """Bytes that the device has beside all leases; ``None`` if that cannot be said."""
        ...


class NoProbe:
    """A device that cannot be asked: the end of the process is taken for the return of its bytes.

    On CUDA without forks and importers both were seen at the same moment.
    """

    def observe(self, leased: int) -> None:
        """Nothing to see."""

    def is_back(self, leased: int, pid: int) -> bool:  # noqa: ARG002 (the protocol's signature)
        """Taken for granted."""
        return True

    def room(self) -> int | None:
        """Not known."""
        return None


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

    def is_back(self, leased: int, pid: int) -> bool:  # noqa: ARG002 (memory is not per process)
        """See ``MemoryProbe``."""
        return self._used() - self.foreign <= leased + _TOLERANCE

    def room(self) -> int | None:
        """Not known: pages of the host are not taken away, they are swapped."""
        return None


def shmem_bytes() -> int:
    """Bytes of shared memory in use on this machine, memfds and tmpfs."""
    with open("/proc/meminfo", "rb", buffering=0) as file:
        for line in file.read(8192).splitlines():
            if line.startswith(b"Shmem:"):
                return int(line.split()[1]) * 1024
    return 0


# --- a GPU --------------------------------------------------------------------------------------


class CardMemory(NamedTuple):
    """Bytes of a GPU, without what the driver keeps for itself: ``total = free + used``."""

    free: int
    used: int

    @property
    def total(self) -> int:
        """All that can be had."""
        return self.free + self.used


class CardError(Exception):
    """A GPU, or the library that speaks for it, did not answer."""


class Card(Protocol):
    """A GPU that can be asked without a context on it; ``nvml.NvmlCard`` is one."""

    def memory(self) -> CardMemory:
        """What is free and in use now, by whomever. Raises ``CardError``."""
        ...

    def processes(self) -> dict[int, int | None]:
        """Bytes by pid, ``None`` where they are not known. Raises ``CardError``."""
        ...


class NvmlProbe:
    """A GPU. Errs towards "back", and says no for two reasons.

    The dead owner's pid is still in the device's list of processes; or more is in use than others
    used while all owners lived and the remaining leases may use, plus a tolerance. What others use
    has the engines' weights and contexts in it. A device that does not answer, or is not opened
    yet, counts as one that cannot be asked, see ``NoProbe``.

    Parameters
    ----------
    open_card:
        Opens the device. Called on a thread of its own: it may take longer than the start of an
        engine.
    capacity:
        Bytes for all tenants. Of what the device has beyond them, up to 1 GiB is kept free.
    foreign:
        What others used, as the last broker saw it.
    log:
        Told once why the device does not answer.
    """

    def __init__(
        self, open_card: Callable[[], Card], *, capacity: int, log: Callable[[str], None],
        foreign: int | None = None,
    ) -> None:  # fmt: skip
        self.foreign = foreign
        """Bytes that others use, as far as known."""
        self._capacity, self._log = capacity, log
        self._card: Card | None = None
        self._told = False
        import threading  # not for the broker of the host, which an engine waits for

        self._opening = threading.Thread(target=self._open, args=(open_card,), daemon=True)
        self._opening.start()

    def wait_until_open(self) -> None:
        """Return once the device has been opened, or has refused."""
        self._opening.join()

    def observe(self, leased: int) -> None:
        """See ``MemoryProbe``. More than all leases is others' for certain."""
        memory = self._ask(lambda card: card.memory())
        if memory is not None:
            most = 0 if self.foreign is None or leased == 0 else self.foreign
            self.foreign = max(most, memory.used - leased)

    def is_back(self, leased: int, pid: int) -> bool:
        """See ``MemoryProbe``."""
        processes = self._ask(lambda card: card.processes()) if pid else None
        if processes is not None and pid in processes:
            return False
        memory = self._ask(lambda card: card.memory()) if self.foreign is not None else None
        return memory is None or memory.used - (self.foreign or 0) <= leased + _TOLERANCE

    def room(self) -> int | None:
        """See ``MemoryProbe``. What is free, less a reserve for those outside: so maybe below 0."""
        memory = self._ask(lambda card: card.memory())
        if memory is None:
            return None
        reserve = min(_MOST_RESERVED, max(0, memory.total - self._capacity))
        return memory.free - reserve

    def _open(self, open_card: Callable[[], Card]) -> None:
        try:
            self._card = open_card()
        except CardError as error:
            self._tell(error)

    def _ask(self, question: Callable[[Card], T]) -> T | None:
        try:
            return None if self._card is None else question(self._card)
        except CardError as error:
            self._tell(error)
            return None

    def _tell(self, error: CardError) -> None:
        if not self._told:
            self._told = True
            self._log(f"warning: {error}; what others use of this device is not seen")


def make_probe(
    device: str, *, capacity: int, foreign: int | None, log: Callable[[str], None]
) -> MemoryProbe:
    """The probe for ``cpu`` or ``gpu-<uuid>``."""
    if device == "cpu":
        return ShmemProbe(foreign)

    def open_card() -> Card:
        from kvcached.broker.nvml import open_card  # ctypes: not for the broker of the host

        return open_card(device)

    return NvmlProbe(open_card, capacity=capacity, log=log, foreign=foreign)
