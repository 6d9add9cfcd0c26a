"""How much of a device all tenants together may hold, where nobody has said it."""

from __future__ import annotations

from kvcached.config import Config, format_size, parse_size
from kvcached.errors import InvalidConfig

_CGROUP_LIMIT = "/sys/fs/cgroup/memory.max"


def default_capacity(config: Config, device: str) -> int:
    """``config.budget`` of the device, else the memory available now less ``config.headroom``.

    Raises ``InvalidConfig`` for a GPU whose size the caller did not give.
    """
    if device != "cpu":
        if config.budget and not config.budget.rstrip().endswith("%"):
            return parse_size(config.budget)
        raise InvalidConfig(f"the capacity of {device} is not known", hint="Give capacity_bytes.")
    total, available = _memory()
    if config.budget:
        return parse_size(config.budget, total=total)
    headroom = parse_size(config.headroom, total=total)
    if available <= headroom:
        raise InvalidConfig(
            f"{format_size(available)} are available, no more than the headroom of "
            f"{format_size(headroom)}",
            hint="Set KVCACHED_BUDGET, or a smaller KVCACHED_HEADROOM.",
        )
    return available - headroom


def _memory() -> tuple[int, int]:
    """Bytes of memory in total and available now; a container's own limit counts."""
    sizes = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in {"MemTotal", "MemAvailable"}:
                sizes[name] = int(rest.split()[0]) * 1024
    try:
        with open(_CGROUP_LIMIT, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        text = "max"
    limit = int(text) if text.isdigit() else sizes["MemTotal"]
    return min(sizes["MemTotal"], limit), min(sizes["MemAvailable"], limit)
