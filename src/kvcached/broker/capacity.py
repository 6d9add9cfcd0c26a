"""How much of a device all tenants together may hold, where nobody has said it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from kvcached.broker.nvml import NvmlCard, open_card
from kvcached.broker.probe import CardError
from kvcached.config import Config, format_size, parse_size
from kvcached.errors import InvalidConfig
from kvcached.hostinfo import available_bytes, total_bytes


def default_capacity(
    config: Config, device: str, find: Callable[[str], NvmlCard] = open_card
) -> int:
    """``config.budget`` of the device, else its memory less ``config.headroom``.

    Of the host's memory what is available now; of a GPU's (``device`` is its UUID) all of it, since
    the broker sees what others use. No context is made on a GPU, so a process that only schedules
    can ask. Raises ``InvalidConfig``.
    """
    if device != "cpu":
        if config.budget and not config.budget.rstrip().endswith("%"):
            return parse_size(config.budget)
        total = available = card_bytes(device, find)
    else:
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


def card_bytes(device: str, find: Callable[[str], NvmlCard] = open_card) -> int:
    """Bytes of a GPU's memory, by its UUID. Raises ``InvalidConfig`` if it does not say."""
    try:
        with contextlib.closing(find(device)) as card:
            return card.memory().total
    except CardError as error:
        raise InvalidConfig(
            f"the capacity of {device} is not known: {error}",
            hint="Give capacity_bytes, or set KVCACHED_BUDGET to a size.",
        ) from error
