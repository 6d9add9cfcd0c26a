"""The operating-system calls of the host backend, by ctypes: where tests inject faults.

Not ``mmap.mmap``: it keeps a duplicate of the file descriptor, so a forked child would hold the
memory whatever we close.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable

from kvcached.errors import DriverError, OutOfPages

PROT_NONE, PROT_READ_WRITE = 0, 3
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
MADV_NORMAL, MADV_DONTFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 0, 10, 14, 15
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_MAYMOVE_FIXED_DONTUNMAP = 1 | 2 | 4
# From fcntl.h; Python names them only where its C library did.
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4

_SYSTEM_PAGE = os.sysconf("SC_PAGE_SIZE")
_NO_MEMORY = {errno.ENOMEM, errno.ENOSPC}
_EINTR_TRIES = 16
MAX_MAP_COUNT = "/proc/sys/vm/max_map_count"
_MAPPINGS_SHARE = 0.9

_LIBC = ctypes.CDLL(None, use_errno=True)


def _function(name: str, *argtypes: type, restype: type = ctypes.c_int) -> ctypes._NamedFuncPointer:
    function = getattr(_LIBC, name)
    function.argtypes, function.restype = argtypes, restype
    return function  # type: ignore[no-any-return]


_ADDRESS, _SIZE, _INT, _OFFSET = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
_MMAP = _function("mmap", _ADDRESS, _SIZE, _INT, _INT, _INT, _OFFSET, restype=ctypes.c_ssize_t)
_MUNMAP = _function("munmap", _ADDRESS, _SIZE)
_MADVISE = _function("madvise", _ADDRESS, _SIZE, _INT)
_MPROTECT = _function("mprotect", _ADDRESS, _SIZE, _INT)
_MREMAP = _function("mremap", _ADDRESS, _SIZE, _SIZE, _INT, _ADDRESS, restype=ctypes.c_ssize_t)
_MINCORE = _function("mincore", _ADDRESS, _SIZE, ctypes.c_char_p)
_FALLOCATE = _function("fallocate", _INT, _INT, _OFFSET, _OFFSET)


def _failed() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


class OsCalls:
    """Each method is one system call and raises ``OSError`` when it fails."""

    def memfd(self, name: str, nbytes: int) -> int:
        """Make a sparse memfd of ``nbytes`` whose size can never change again."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            # A file that shrank under a mapping is SIGBUS. F_SEAL_WRITE and F_SEAL_FUTURE_WRITE
            # stay off: they forbid punching holes and mapping writable.
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
        except BaseException:  # whatever it was, nobody else knows the descriptor
            os.close(fd)
            raise
        return fd

    def mmap(self, address: int, nbytes: int, prot: int, flags: int, fd: int, offset: int) -> int:
        """``mmap(2)``; returns the address."""
        result: int = _MMAP(address, nbytes, prot, flags, fd, offset)
        if result == -1:
            raise _failed()
        return result

    def munmap(self, address: int, nbytes: int) -> None:
        """``munmap(2)``."""
        if _MUNMAP(address, nbytes):
            raise _failed()

    def madvise(self, address: int, nbytes: int, advice: int) -> None:
        """``madvise(2)``."""
        if _MADVISE(address, nbytes, advice):
            raise _failed()

    def mprotect(self, address: int, nbytes: int, prot: int) -> None:
        """``mprotect(2)``."""
        if _MPROTECT(address, nbytes, prot):
            raise _failed()

    def move(self, address: int, nbytes: int, target: int) -> None:
        """``mremap(2)``: move pages to ``target``; the old mapping stays, with nothing in it.

        Since it stays, no other thread's ``mmap`` can take the addresses.
        """
        if _MREMAP(address, nbytes, nbytes, _MAYMOVE_FIXED_DONTUNMAP, target) == -1:
            raise _failed()

    def resident(self, address: int, nbytes: int) -> int:
        """``mincore(2)``: bytes of a mapped range that are in memory."""
        flags = ctypes.create_string_buffer(nbytes // _SYSTEM_PAGE)
        if _MINCORE(address, nbytes, flags):
            raise _failed()
        return flags.raw.count(1) * _SYSTEM_PAGE

    def punch_hole(self, fd: int, offset: int, nbytes: int) -> None:
        """``fallocate(2)``: free the pages of a file range; it reads as zero afterwards."""
        if _FALLOCATE(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, nbytes):
            raise _failed()


def retry(call: Callable[[], None]) -> None:
    """Call again when a signal interrupts, a bounded number of times."""
    for _ in range(_EINTR_TRIES):
        try:
            return call()
        except InterruptedError:
            continue
    return call()


def errno_name(error: OSError) -> str:
    """``"ENOMEM"`` and the like."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def translate(error: OSError, call: str, what: str) -> OutOfPages | DriverError:
    """The error of ours for a failed system call; ``what`` says what it was for."""
    name = errno_name(error)
    message = f"{what}: {call} says {name} ({error.strerror})"
    if error.errno in _NO_MEMORY:
        return OutOfPages(message, hint=_no_memory_hint())
    return DriverError(message, status=name, call=call)


def _no_memory_hint() -> str:
    """Say whether the number of mappings is the likely cause."""
    count, most = mapping_counts()
    return out_of_mappings_hint(count) if count > most else "Free memory, or reserve less."


def out_of_mappings_hint(count: int) -> str:
    """What to do about too many mappings."""
    return f"{count} memory mappings are in use: raise sysctl vm.max_map_count, or page_bytes."


def mapping_counts() -> tuple[int, int]:
    """The mappings of this process, and how many of them we may bring it to."""
    with open("/proc/self/maps", "rb") as maps, open(MAX_MAP_COUNT) as limit:
        return sum(1 for _ in maps), int(int(limit.read()) * _MAPPINGS_SHARE)


class MappingCredit:
    """Keeps the process clear of ``vm.max_map_count``, where malloc fails too, everywhere.

    Counting mappings takes milliseconds when they are many, so a count is good for as many changes
    as it leaves room for.
    """

    def __init__(self) -> None:
        self._left = 0

    def spend(self, mappings: int, *, refusable: bool) -> None:
        """Account for a change that may add ``mappings``. ``OutOfPages`` without room for them.

        What gives memory back must not fail for this: ``refusable=False``.
        """
        if self._left < mappings:
            count, most = mapping_counts()
            self._left = most - count
            if self._left < mappings and refusable:
                raise OutOfPages("no more mappings", hint=out_of_mappings_hint(count))
        self._left -= mappings
