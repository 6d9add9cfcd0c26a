"""Tables, bars, sizes and ages: what the commands make of numbers."""

from __future__ import annotations

import pytest

from kvcached.cli import render, tenants, top
from kvcached.errors import UnknownName
from kvcached.stats import DeviceSnapshot, LimitRecord, TenantReport, TenantSnapshot

MIB = 1 << 20


def _tenant(name="a", lease=100, limit=200, report=None):
    report = report or TenantReport(90, 40, 30, 15, 5)
    record = LimitRecord(limit, 1, lease)
    return TenantSnapshot(name, 1, 0, "live", lease, record, report, 1.0, {})


@pytest.mark.parametrize("width", [1, 7, 40, 100])
@pytest.mark.parametrize(
    "tenant",
    [
        _tenant(),
        _tenant(lease=0, limit=0, report=TenantReport()),
        _tenant(limit=50),
        _tenant(report=TenantReport(1, 1), lease=1, limit=1000),
        _tenant(lease=5000, limit=5000, report=TenantReport(5000, 5000)),
    ],
)
def test_bars_never_overflow_and_show_what_is_there(tenant, width):
    parts = top.segments(tenant, width, 1000)
    assert sum(parts) <= width
    assert min(parts) >= 0
    if tenant.report.in_use_bytes:
        assert parts[0] >= 1
    assert len(top.bar(tenant, width, 1000)) == sum(parts)


# --- tables and sizes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0"), (1, "1"), (1023, "1023"), (1024, "1.0K"), (3 * MIB, "3.0M"), (512 * MIB, "512M"),
        (1023.6 * MIB, "1.0G"), (24 << 30, "24.0G"), (2 << 40, "2.0T"), (5000 << 40, "5000T"),
    ],
)  # fmt: skip
def test_compact_sizes(nbytes, text):
    assert tenants.compact_size(int(nbytes)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (7300, "2 h"), (86400 * 3, "3 d")],
)
def test_ages(seconds, text):
    assert render.format_age(seconds) == text


def test_a_long_name_is_shortened_in_a_terminal_only():
    long = _tenant("a-model-with-a-very-long-name-indeed-and-a-version-number-1.5")
    gpu = DeviceSnapshot(1, "GPU-8a56a4c4-1111-2222-3333-444444444444", 1000, 100, 7, 1, (long,))
    narrow = tenants.ps_table([gpu], width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "~" in narrow
    assert long.name in tenants.ps_table([gpu], width=None)


def test_the_same_name_on_two_devices_needs_a_device():
    devices = [DeviceSnapshot(1, d, 1000, 100, 7, 1, (_tenant("a"),)) for d in ("cpu", "gpu-1")]
    with pytest.raises(ValueError, match="several devices: cpu, gpu-1"):
        tenants.find(devices, "a")
    with pytest.raises(UnknownName, match=r"no tenant named 'zz'\.  Running: a\."):
        tenants.find(devices, "zz")
