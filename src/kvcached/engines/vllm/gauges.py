"""Gauges of the shared budget beside vLLM's own, at its ``/metrics``.

The figures are the broker's, asked when they are scraped: so any process can show them, though the
memory is in others. With several API servers vLLM collects from files, and these are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

from kvcached.broker.admin import list_tenants
from kvcached.config import engine_config
from kvcached.errors import KvcachedError

_GAUGES = {
    "lease_bytes": "Bytes that the engine may back now",
    "limit_bytes": "Most bytes that the engine may hold",
    "in_use_bytes": "Bytes under blocks of running requests",
    "cached_bytes": "Bytes that hold cached prefixes and nothing in use",
    "spare_bytes": "Bytes that are mapped and hold nothing",
}
_LABELS = ("name", "device", "pid", "model")


class TenantCollector:
    """A collector of ``prometheus_client``: all engines that share a device with this one."""

    def describe(self) -> list[Any]:
        """Nothing, so that registering asks nobody yet."""
        return []

    def collect(self) -> Iterator[Any]:
        """One gauge a figure, one sample an engine; none where no broker answers."""
        family = import_module("prometheus_client.core").GaugeMetricFamily
        made = {key: family(f"kvcached_{key}", text, labels=_LABELS)
                for key, text in _GAUGES.items()}  # fmt: skip
        with suppress(KvcachedError):  # a scrape must not fail for want of a broker
            for device in list_tenants(config=engine_config()):
                made_of(device, made)
        yield from made.values()


def made_of(device: Any, made: dict[str, Any]) -> None:
    """Add the samples of one device."""
    for tenant in device.tenants:
        labels = (tenant.name, device.device, str(tenant.pid), str(tenant.meta.get("model", "")))
        report = tenant.report
        values = {"lease_bytes": tenant.lease_bytes, "limit_bytes": tenant.limit.desired_bytes}
        for key, gauge in made.items():
            gauge.add_metric(labels, values.get(key, getattr(report, key, 0)))


def register() -> bool:
    """Show the gauges in this process; whether ``prometheus_client`` is there, as it is in vLLM."""
    try:
        client = import_module("prometheus_client")
    except ImportError:
        return False
    client.REGISTRY.register(TenantCollector())
    return True
