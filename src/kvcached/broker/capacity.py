"""How much of a device all tenants together may hold, where nobody has said it."""

from __future__ import annotations

from kvcached.config import Config, format_size, parse_size
from kvcached.errors import InvalidConfig
from kvcached.hostinfo import available_bytes, total_bytes


def default_capacity(config: Config, device: str) -> int:
    """``config.budget`` of the device, else the memory available now less ``config.headroom``.

    Raises ``InvalidConfig`` for a GPU whose size the caller did not give.
    """
    if device != "cpu":
        if config.budget and not config.budget.rstrip().endswith("%"):
            return parse_size(config.budget)
        raise InvalidConfig(f"the capacity of {device} is not known", hint="Give capacity_bytes.")
    total, available = total_bytes(), available_bytes()  # a container's own limit counts
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
