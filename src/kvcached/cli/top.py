"""``kvtop``: who holds how much, redrawn until q or Ctrl-C."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvcached.cli import tenants
from kvcached.cli.render import note, print_json, terminal_width
from kvcached.config import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvcached.stats import DeviceSnapshot, TenantSnapshot

MARKS = "█▓▒░ "
"""In use, cached, spare (and waiting for a fence), leased but not backed, free up to the limit.
The shades differ without colour, and so does their order."""
PLAIN_MARKS = "#=-. "
STYLES = ("bold cyan", "blue", "yellow", "dim", "")
_LEAST_BAR = 24  # columns; what engines say of themselves is shown beside it if there are more
LEGEND = ("in use", "cached", "spare", "leased")


def run(device: str | None, *, seconds: float, once: bool, plain: bool, json: bool) -> None:
    """Look every ``seconds`` until told to stop, or ``once``."""
    redraws = sys.stdout.isatty() and os.environ.get("TERM", "") not in {"dumb", "unknown"}
    live = redraws and not (once or plain or json)
    with contextlib.suppress(KeyboardInterrupt):
        if live:
            _run_live(device, seconds)
            return
        while True:
            devices = tenants.snapshots(device)
            if json:
                print_json(tenants.devices_to_dict(devices), indent=None)
            else:
                print(plain_view(devices, width=terminal_width()), flush=True)
            if once:
                return
            time.sleep(seconds)
            if not json:
                print()


# --- bars -------------------------------------------------------------------------------------


def segments(tenant: TenantSnapshot, width: int, scale_bytes: int) -> list[int]:
    """Columns of a bar: in use, cached, spare, leased only, up to the limit.

    Cumulative bytes are rounded, so the parts never add up to more than the whole. What is there
    at all gets a column if there is one left.
    """
    report = tenant.report
    spare = report.spare_bytes + report.quarantined_bytes
    steps = [report.in_use_bytes, report.cached_bytes, spare,
             max(0, tenant.lease_bytes - report.backed_bytes)]  # fmt: skip
    steps.append(max(0, tenant.limit.desired_bytes - sum(steps)))
    edges, total = [0], 0
    for nbytes in steps:
        total += nbytes
        edge = round(width * min(total, scale_bytes) / max(scale_bytes, 1))
        edges.append(min(width, max(edge, edges[-1] + (nbytes > 0))))
    return [b - a for a, b in itertools.pairwise(edges)]


def bar(tenant: TenantSnapshot, width: int, scale_bytes: int) -> str:
    """A bar in ASCII for ``--plain``, as wide as the part of the device that the limit is."""
    parts = segments(tenant, width, scale_bytes)
    return "".join(mark * n for mark, n in zip(PLAIN_MARKS, parts, strict=True))


def device_line(device: DeviceSnapshot) -> str:
    """One line above the tenants of a device."""
    return (
        f"{device.device}: {format_size(device.leased_bytes)} of "
        f"{format_size(device.capacity_bytes)} leased, {tenants.count_tenants(device)}, "
        f"broker {device.broker_pid}"
    )


def plain_view(devices: Sequence[DeviceSnapshot], *, width: int | None) -> str:
    """Text without control sequences: one table, and a bar a tenant."""
    if not devices:
        return "nothing is running"
    columns = min(width or 80, 200)
    lines = []
    for device in devices:
        lines += [device_line(device), tenants.ps_table([device], width=width)]
        room = columns - 20
        lines += [
            f"{tenant.name[:16]:<16} [{bar(tenant, room, device.capacity_bytes):<{room}}]"
            for tenant in device.tenants
        ]
    legend = ", ".join(f"{m} {word}" for m, word in zip(PLAIN_MARKS, LEGEND, strict=False))
    return "\n".join([*lines, legend])


# --- live -------------------------------------------------------------------------------------


def _run_live(device: str | None, seconds: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()  # obeys NO_COLOR and TERM
    with _keys() as pressed, Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(live_view(tenants.snapshots(device), console.width), refresh=True)
            if pressed(seconds) in {"q", "Q", "\x1b"}:
                break
    note("kvtop: bye")


def live_view(devices: Sequence[DeviceSnapshot], width: int) -> RenderableType:
    """A table with a bar a tenant, for one refresh."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for device in devices:
        parts += [Text(device_line(device), style="bold"), _live_table(device, width), Text()]
    if not devices:
        parts.append(Text("Nothing is running. The first engine starts the broker.\n"))
    legend = Text()
    for mark, word, style in zip(MARKS, LEGEND, STYLES, strict=False):
        legend.append(mark, style).append(f" {word}  ")
    return Group(*parts, legend.append("* above its limit  q quit"))


def _live_table(device: DeviceSnapshot, width: int) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    grid = Table(box=None, padding=(0, 1), expand=False)
    for name in ("NAME", "PID", "BACKED", "LIMIT", ""):
        grid.add_column(name, justify="left" if name in {"NAME", ""} else "right", no_wrap=True)
    listed = sorted(device.tenants, key=lambda tenant: tenant.name)
    room, extra = max(10, width - 50), list[list[str]]()
    for name, cells in tenants.said(listed):
        needs = 2 + max(len(name), *map(len, cells))
        if room - needs >= _LEAST_BAR:
            grid.add_column(name, no_wrap=True)
            extra.append(cells)
            room -= needs
    for i, tenant in enumerate(listed):
        star = "" if tenant.limit.applied else "*"
        grid.add_row(
            tenant.name[:18],
            str(tenant.pid),
            tenants.compact_size(tenant.report.backed_bytes),
            tenants.compact_size(tenant.limit.desired_bytes) + star,
            _rich_bar(tenant, room, device.capacity_bytes),
            *(escape(cells[i]) for cells in extra),
        )
    return grid


def _rich_bar(tenant: TenantSnapshot, width: int, scale_bytes: int) -> RenderableType:
    from rich.text import Text

    text = Text()
    parts = segments(tenant, width, scale_bytes)
    for mark, columns, style in zip(MARKS, parts, STYLES, strict=True):
        text.append(mark * columns, style)
    return text.append("|", "dim")


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Single key presses: a function that waits so many seconds for one; ``""`` if none came."""
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda seconds: _read_key(fd, seconds)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _no_keys(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def _read_key(fd: int, seconds: float) -> str:
    ready, _, _ = select.select([fd], [], [], seconds)
    return os.read(fd, 1).decode(errors="replace") if ready else ""
