"""Tables, bars, sizes and ages: what the commands make of numbers."""

from __future__ import annotations

import io

import pytest

from kvcached.cli import render, tenants, top
from kvcached.errors import UnknownName
from kvcached.stats import DeviceSnapshot, LimitRecord, TenantReport, TenantSnapshot

MIB = 1 << 20


def _tenant(name="a", lease=100, limit=200, report=None, **meta):
    report = report or TenantReport(90, 40, 30, 15, 5)
    record = LimitRecord(limit, 1, lease)
    return TenantSnapshot(name, 1, 0, "live", lease, record, report, 1.0, meta)


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


SAID = {"port": 8001, "engine": "vLLM 0.32.0", "model": "some-org/some-model-8b"}


def _device(*listed):
    return DeviceSnapshot(1, "cpu", 1000, 100, 7, 1, listed)


def test_what_engines_say_of_themselves_is_shown_where_there_is_room():
    device = _device(_tenant("a", **SAID), _tenant("b"))
    plain = tenants.ps_table([_device(_tenant("a"), _tenant("b"))], width=None)
    wide = tenants.ps_table([device], width=None).splitlines()
    assert wide[0].split()[-3:] == ["PORT", "ENGINE", "MODEL"]
    assert wide[1].endswith("8001  vLLM 0.32.0  some-org/some-model-8b")
    assert wide[2].rstrip() == plain.splitlines()[2]
    least = max(map(len, plain.splitlines()))
    for width in range(least, max(map(len, wide)) + 1):
        lines = tenants.ps_table([device], width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert ("PORT" in lines[0]) is (width >= least + 6)
        assert ("MODEL" in lines[0]) >= (width >= max(map(len, wide)))
    assert tenants.ps_table([device], width=least) == plain
    assert device.to_dict()["tenants"][0]["meta"] == SAID


def test_what_they_say_cannot_draw_on_the_terminal():
    told = [_tenant("a", model="\x1b[2J" + "x" * 99, port=None, engine=["[bold]"])]
    (engine, model) = (cells[0] for _, cells in tenants.said(told))
    assert model.startswith("?[2Jxx")
    assert len(model) == 40
    assert engine == "['[bold]']"


@pytest.mark.parametrize(("width", "shown"), [(80, ["PORT"]), (200, ["PORT", "ENGINE", "MODEL"])])
def test_the_live_view_says_it_too(width, shown):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(top.live_view([_device(_tenant("a", **SAID), _tenant("b"))], width))
    text = console.export_text()
    assert [name for name in ("PORT", "ENGINE", "MODEL") if name in text] == shown
    assert "8001" in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_the_live_view_is_as_it_was_where_nothing_is_said():
    assert list(tenants.said([_tenant("a")])) == []


def test_the_same_name_on_two_devices_needs_a_device():
    devices = [DeviceSnapshot(1, d, 1000, 100, 7, 1, (_tenant("a"),)) for d in ("cpu", "gpu-1")]
    with pytest.raises(ValueError, match="several devices: cpu, gpu-1"):
        tenants.find(devices, "a")
    with pytest.raises(UnknownName, match=r"no tenant named 'zz'\.  Running: a\."):
        tenants.find(devices, "zz")
