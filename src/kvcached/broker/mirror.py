"""A read-only page of numbers from the broker: capacity, leases, pressure, limits.

A memfd that is sealed before it is handed out, so that no peer can shrink it (a SIGBUS for the
others) or write to it. A reader needs 1 us and no system call where a request needs a round trip.

Layout: 8-byte fields. Field 0 is a sequence number, odd while the writer is at work; field 1 is the
sum of the header fields, so that a reader notices a mixed state even on processors that reorder
stores. A tenant's limit is one field, which is read whole or not at all.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import NamedTuple

NBYTES = 8192
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10  # FUTURE_WRITE
_SEQUENCE, _SUM, _CAPACITY, _LEASED, _PRESSURE, _EPOCH = range(6)
_FIRST_SLOT = 8
SLOTS = NBYTES // 8 - _FIRST_SLOT
_MASK = (1 << 64) - 1


class MirrorState(NamedTuple):
    """The header: bytes, and the broker's epoch."""

    capacity: int
    leased: int
    pressure: int
    """Bytes that waiting claims need."""
    epoch: int


class MirrorWriter:
    """The broker's side."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("kvcached-mirror", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, NBYTES)
        self._map = mmap.mmap(self.fd, NBYTES)
        self._fields = memoryview(self._map).cast("Q")
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def write(self, state: MirrorState) -> None:
        """Publish the header."""
        fields = self._fields
        sequence = fields[_SEQUENCE]
        fields[_SEQUENCE] = sequence + 1
        fields[_CAPACITY], fields[_LEASED], fields[_PRESSURE], fields[_EPOCH] = state
        fields[_SUM] = (sum(state) + sequence + 2) & _MASK
        fields[_SEQUENCE] = sequence + 2

    def write_limit(self, slot: int, nbytes: int) -> None:
        """Publish one tenant's limit."""
        self._fields[_FIRST_SLOT + slot] = nbytes

    def close(self) -> None:
        """Unmap and close."""
        self._fields.release()
        self._map.close()
        os.close(self.fd)


class MirrorReader:
    """An engine's side. Takes over ``fd`` and closes it."""

    def __init__(self, fd: int) -> None:
        try:
            self._map = mmap.mmap(fd, NBYTES, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._fields = memoryview(self._map).cast("Q")

    def read(self) -> MirrorState | None:
        """The header, or ``None`` if the writer died in the middle of it (its socket tells)."""
        fields = self._fields
        for _ in range(1000):
            before = fields[_SEQUENCE]
            state = fields[_CAPACITY], fields[_LEASED], fields[_PRESSURE], fields[_EPOCH]
            total = fields[_SUM]
            if before == fields[_SEQUENCE] and total == (sum(state) + before) & _MASK:
                return MirrorState(*state)
        return None

    @property
    def pressure(self) -> int:
        """Bytes that waiting claims need: one field, so it needs no sequence number."""
        return self._fields[_PRESSURE]

    def limit(self, slot: int) -> int:
        """One tenant's limit."""
        return self._fields[_FIRST_SLOT + slot]

    def close(self) -> None:
        """Unmap."""
        self._fields.release()
        self._map.close()
