"""The backend and the budget that a ``KVCache`` makes when it is not given any."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from typing import Any

from kvcached.arguments import DEVICES, read_terms
from kvcached.blocks import BlockPool
from kvcached.broker.budget import Budget, LocalBudget
from kvcached.config import Config, format_size, parse_size
from kvcached.errors import BackendUnavailable, InvalidInput, KvcachedError
from kvcached.layout import CacheSpec, Geometry
from kvcached.memory.base import MemoryBackend
from kvcached.memory.fences import fence_on, wait_for
from kvcached.pages import PagePool

_log = logging.getLogger(__name__)
_LARGEST_HOST_PAGE = 2 << 20
_LEAST_EXTENTS = 8
"""A full cache has at least so many: what little is in use must not hold on to all of it."""
_DRAIN_SECONDS = 5.0
_BOUNCE_BYTES = 64 << 20
"""Buffer of a split on a GPU (``splits.py``); memory of the host is remapped cheaply."""


def make_backend(device: str, spec: CacheSpec, config: Config) -> MemoryBackend:
    """A backend for ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or the UUID of a GPU."""
    return backend_for(device, _plane_block_bytes(spec), config)


def backend_for(device: str, block_bytes: int, config: Config) -> MemoryBackend:
    """As ``make_backend``, for blocks of ``block_bytes`` in a plane, whatever they hold."""
    if device == "cpu":
        from kvcached.memory.host import HostBackend

        return HostBackend(_dividing_page(block_bytes, config), memory=config.host_memory)
    if device == "cuda" or device.startswith(("cuda:", "GPU-", "MIG-")):
        from kvcached.memory.cuda import CudaBackend

        return CudaBackend("cuda:0" if device == "cuda" else device, zero=config.zero)
    raise InvalidInput(f"device {device!r} is not known", hint=DEVICES)


def host_page_bytes(spec: CacheSpec, config: Config) -> int:
    """Page size of the host backend (docs/adr/0005).

    The largest power of two, from the system's page to 2 MiB, that divides a block, so that a
    block is whole pages and a split can get down to the packed floor.
    """
    return _dividing_page(_plane_block_bytes(spec), config)


def _plane_block_bytes(spec: CacheSpec) -> int:
    return spec.block_bytes if spec.layout == "cross_layer" else spec.key_bytes


def _dividing_page(block_bytes: int, config: Config) -> int:
    if config.host_page:
        return parse_size(config.host_page)
    divisor = block_bytes & -block_bytes
    return max(os.sysconf("SC_PAGE_SIZE"), min(divisor, _LARGEST_HOST_PAGE))


def make_budget(
    name: str,
    backend: MemoryBackend,
    config: Config,
    *,
    limit: Any,
    floor: Any,
    weight: float,
    meta: dict[str, Any] | None = None,
) -> Budget:
    """The device's shared budget; without a broker (``config.broker``), one of our own.

    ``meta`` is what ``kvcached ps`` shows of the tenant beside its bytes.
    """
    capacity = device_capacity(backend, config)
    if not config.broker:  # nobody shares: all there is, and the floor is met by itself
        most, _ = read_terms(capacity if limit is None else limit, floor, capacity)
        return LocalBudget(capacity if most is None else most, capacity)
    most, least = read_terms(limit, floor, capacity)
    from kvcached.broker.client import BrokerBudget

    budget = BrokerBudget(
        name,
        device=device_slug(backend),
        limit_bytes=most,
        floor_bytes=least,
        weight=weight,
        capacity_bytes=capacity,
        config=config,
        meta=meta,
    )
    if config.budget and budget.capacity_bytes != capacity:  # or one would wait for its effect
        _log.warning(
            "the budget of %s (KVCACHED_BUDGET) has no effect: the broker of %s runs, with %s, "
            "and ends with its last engine",
            format_size(capacity), backend.device, format_size(budget.capacity_bytes),
        )  # fmt: skip
    return budget


def begin_budget(backend: MemoryBackend, config: Config) -> None:
    """Have the device's broker started beside what else has to be done before ``make_budget``.

    It waits for the tenant as long as this process lives. What goes wrong here is met, and said,
    there.
    """
    if config.broker:
        threading.Thread(target=_start_broker, args=(backend, config), daemon=True).start()


def _start_broker(backend: MemoryBackend, config: Config) -> None:
    from kvcached.broker.link import expect_tenant

    with suppress(KvcachedError, OSError):
        expect_tenant(config, device_slug(backend), device_capacity(backend, config))


def make_pages(
    backend: MemoryBackend, geometry: Geometry, budget: Budget, config: Config
) -> PagePool:
    """The page pool of a cache."""
    most = min(parse_size(config.max_handle), budget.limit_bytes // _LEAST_EXTENTS)
    longest = max(1, most // geometry.page_bytes)
    bounce = 0 if backend.device == "cpu" else _BOUNCE_BYTES // geometry.page_bytes
    return PagePool(backend, geometry, budget, longest, bounce)


def device_slug(backend: MemoryBackend) -> str:
    """How the broker calls the backend's device: ``cpu``, or a GPU's UUID."""
    uuid = getattr(backend, "uuid", "")
    return f"GPU-{uuid}" if uuid else backend.device


def device_capacity(backend: MemoryBackend, config: Config) -> int:
    """What all tenants of the device may hold together, should we be the first."""
    from kvcached.broker.capacity import default_capacity

    if backend.device == "cpu":
        return default_capacity(config, "cpu")
    total = int(getattr(backend, "total_bytes", 0)) or backend.available()
    if config.budget:
        return parse_size(config.budget, total=total)
    return max(0, total - parse_size(config.headroom, total=total))


def release(pid: int, blocks: BlockPool, budget: Budget, owns_backend: bool) -> None:  # noqa: FBT001
    """Give everything back, also when the cache was dropped without ``close()``.

    Work that is queued on the default stream may still use the memory, so that comes first.
    """
    if os.getpid() != pid:
        return  # a forked child ends: the memory is the parent's
    backend = blocks.pages.backend
    with suppress(KvcachedError):  # a device that has failed runs nothing any more
        wait_for(fence_on(backend, 0), _DRAIN_SECONDS)
    try:
        blocks.close()
    except BackendUnavailable as error:  # memory in other processes, which ended before this one
        _log.debug("memory that is gone with its process: %s", error)
        return  # the broker sees our end too, and credits what is back
    budget.close()
    if owns_backend:
        backend.shutdown()
