"""What the machine says about its memory: ``/proc/meminfo``, control groups, huge pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

from kvcached.errors import BackendUnavailable

MEMINFO = "/proc/meminfo"
OWN_CGROUPS = "/proc/self/cgroup"
CGROUP_ROOT = "/sys/fs/cgroup"
HUGE_PAGE = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"

_USUAL_HUGE_PAGE = 2 << 20
# Of version 2 and of version 1: limit, use, and the line of memory.stat for files not in use.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def meminfo_bytes(field: str) -> int:
    """A field of ``/proc/meminfo`` in bytes, such as ``MemAvailable``."""
    with open(MEMINFO, "rb") as file:
        for line in file:
            if line.startswith(field.encode() + b":"):
                return int(line.split()[1]) * 1024
    raise BackendUnavailable(f"{MEMINFO} has no {field}")


def total_bytes() -> int:
    """Memory that this process may use at most: the machine's, or less in a control group."""
    return min([meminfo_bytes("MemTotal"), *(limit for limit, _ in _cgroup_limits())])


def available_bytes() -> int:
    """Memory that this process could still take: the machine's, or less in a control group."""
    rooms = (max(0, limit - used) for limit, used in _cgroup_limits())
    return min([meminfo_bytes("MemAvailable"), *rooms])


def cgroup_limit() -> int | None:
    """The tightest limit of our control groups in bytes; ``None`` if there is none."""
    return min((limit for limit, _ in _cgroup_limits()), default=None)


def huge_page_bytes() -> int:
    """Size of a transparent huge page; 2 MiB where the kernel does not say."""
    return int(_read(HUGE_PAGE) or _USUAL_HUGE_PAGE)


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """``(limit, in use)`` of each control group above us that has a limit, in bytes.

    Cached files that nobody uses do not count as in use: the kernel drops them for us.
    """
    for folder, (limit_file, use_file, idle) in _cgroup_folders(OWN_CGROUPS, CGROUP_ROOT):
        limit = _read(f"{folder}/{limit_file}")
        # Version 1 writes "no limit" as a number that no machine has.
        if limit.isdigit() and int(limit) < 1 << 60:
            used = int(_read(f"{folder}/{use_file}") or 0)
            stat = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines())
            yield int(limit), max(0, used - int(stat.get(idle, 0)))


@cache  # where a process lives hardly ever changes; what it may use there is read each time
def _cgroup_folders(own: str, mounted: str) -> tuple[tuple[str, tuple[str, str, str]], ...]:
    """The control groups above us that can have a limit, and the names of their files."""
    found = []
    for line in _read(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, files = mounted, _V2
        elif "memory" in controllers.split(","):
            root, files = f"{mounted}/memory", _V1
        else:
            continue
        # A container often sees its own group as the root, under the host's name for it.
        names = [name for name in path.split("/") if name]
        for depth in range(len(names), -1, -1):
            folder = "/".join([root, *names[:depth]])
            if os.path.exists(f"{folder}/{files[0]}"):
                found.append((folder, files))
    return tuple(found)


def _read(path: str) -> str:
    """A small file's text; empty if there is none, as where a file system is not mounted."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
