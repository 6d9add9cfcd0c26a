"""What ``ps`` and ``limit`` ask the broker, and how they show the answers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvcached.broker.admin import list_tenants, set_tenant_limit
from kvcached.cli.render import fits, format_age, shorten, table
from kvcached.config import Config, format_size, parse_size
from kvcached.errors import BrokerUnavailable, InvalidInput, KvcachedError, UnknownName
from kvcached.stats import LimitRecord

if TYPE_CHECKING:
    from kvcached.stats import DeviceSnapshot, TenantSnapshot

_MOST_SAID = 40  # columns
HEADERS = ("NAME", "DEVICE", "PID", "IN USE", "CACHED", "SPARE", "LEASE", "LIMIT", "SINCE")


def snapshots(device: str | None) -> list[DeviceSnapshot]:
    """All devices that have a broker; starts none."""
    return list_tenants(device, config=Config.from_env())


def completions() -> list[str]:
    """Names for a shell to complete; a shell wants no error in the middle of a line."""
    try:
        return sorted({tenant.name for device in snapshots(None) for tenant in device.tenants})
    except (KvcachedError, OSError):
        return []


def devices_to_dict(devices: Sequence[DeviceSnapshot]) -> dict[str, Any]:
    """The JSON form of ``ps``."""
    return {"devices": [device.to_dict() for device in devices]}


def ps_table(devices: Sequence[DeviceSnapshot], *, width: int | None) -> str:
    """One line a tenant, sorted by device and name; what engines say of themselves, if it fits."""
    pairs = [
        (device, tenant)
        for device in devices
        for tenant in sorted(device.tenants, key=lambda tenant: tenant.name)
    ]
    headers: tuple[str, ...] = HEADERS
    rows, left = [_row(*pair) for pair in pairs], [0, 1]
    for header, cells in said([tenant for _, tenant in pairs]):
        wider = [(*row, cell) for row, cell in zip(rows, cells, strict=True)]
        if fits((*headers, header), wider, width):
            left += [len(headers)] * (header != "PORT")
            headers, rows = (*headers, header), wider
    return table(headers, rows, width=width, left=left)


def said(tenants: Sequence[TenantSnapshot]) -> Iterator[tuple[str, list[str]]]:
    """Columns of what tenants say of themselves: a header and a cell each; none that is empty."""
    for key in ("port", "engine", "model"):
        cells = [_printable(tenant.meta.get(key)) for tenant in tenants]
        if any(cells):
            yield key.upper(), cells


def _printable(value: object) -> str:
    """A word of another process, fit for a terminal and a table."""
    text = "".join(c if c.isprintable() else "?" for c in str("" if value is None else value))
    return shorten(text, _MOST_SAID)


def lowered(devices: Sequence[DeviceSnapshot]) -> list[str]:
    """One line for each device of which others, outside, have a part."""
    lines = []
    for d in devices:
        if d.usable_bytes is not None and d.usable_bytes < d.capacity_bytes:
            usable = f"{format_size(d.usable_bytes)} of {format_size(d.capacity_bytes)}"
            where = short_device(d.device)
            lines.append(f"{where}: {usable} can be held now; others use the rest of the device")
    return lines


def count_tenants(device: DeviceSnapshot) -> str:
    """``"1 tenant"``, ``"3 tenants"``."""
    number = len(device.tenants)
    return f"{number} tenant{'s' * (number != 1)}"


def short_device(device: str) -> str:
    """A GPU's UUID cut to what tells the cards of one machine apart."""
    return device if len(device) <= 12 else device[:12]


def _row(device: DeviceSnapshot, tenant: TenantSnapshot) -> tuple[str, ...]:
    report = tenant.report
    size = compact_size
    return (
        tenant.name,
        short_device(device.device),
        str(tenant.pid),
        size(report.in_use_bytes),
        size(report.cached_bytes),
        size(report.spare_bytes),
        size(tenant.lease_bytes),
        size(tenant.limit.desired_bytes) + ("" if tenant.limit.applied else "*"),
        format_age(tenant.connected_s),
    )


def compact_size(nbytes: int) -> str:
    """A size in at most five columns: ``"0"``, ``"3.0M"``, ``"512M"``, ``"24G"``."""
    value, unit = float(nbytes), ""
    for larger in "KMGT":
        if value < 1023.5:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f}{unit}" if not unit or value >= 99.5 else f"{value:.1f}{unit}"


def change_limit(name: str, size: str, *, device: str | None, dry_run: bool) -> dict[str, Any]:
    """Set the limit of tenant ``name``; ``size`` may be a share of its device (``"40%"``).

    Raises ``BrokerUnavailable``, ``UnknownName`` (with the names that exist), ``InvalidSize``.
    """
    parse_size(size, total=1)  # what cannot be a size needs no broker to be refused
    owner, tenant = find(snapshots(device), name)
    nbytes = parse_size(size, total=owner.capacity_bytes)
    if nbytes > owner.capacity_bytes:
        raise InvalidInput(
            f"{size} is more than {owner.device} has for all: {format_size(owner.capacity_bytes)}",
            hint=f"kvcached limit {name} 100%",
        )
    before = tenant.limit
    if dry_run:
        record = LimitRecord(
            nbytes, before.revision + 1, before.held_bytes, before.floor_bytes, before.weight
        )
    else:
        record = set_tenant_limit(name, nbytes, device=owner.device, config=Config.from_env())
    return {
        "name": name,
        "device": owner.device,
        "dry_run": dry_run,
        "before_bytes": before.desired_bytes,
        "desired_bytes": record.desired_bytes,
        "held_bytes": record.held_bytes,
        "revision": record.revision,
        "applied": record.applied,
        "floor_bytes": record.floor_bytes,
        "usable_bytes": owner.capacity_bytes if owner.usable_bytes is None else owner.usable_bytes,
    }


def find(devices: Sequence[DeviceSnapshot], name: str) -> tuple[DeviceSnapshot, TenantSnapshot]:
    """The one tenant of this name, with its device."""
    if not devices:
        raise BrokerUnavailable(
            "no broker is running, so there is nothing to limit",
            hint="kvcached ps      shows what runs; the first engine starts the broker",
        )
    found = [(d, t) for d in devices for t in d.tenants if t.name == name]
    if not found:
        raise _unknown(name, sorted({t.name for d in devices for t in d.tenants}))
    if len(found) > 1:
        places = ", ".join(device.device for device, _ in found)
        raise InvalidInput(
            f"{name!r} runs on several devices: {places}",
            hint=f"kvcached limit {name} SIZE --device {found[0][0].device}",
        )
    return found[0]


def _unknown(name: str, running: list[str]) -> UnknownName:
    close = difflib.get_close_matches(name, running, n=1, cutoff=0.5)
    prefixed = [other for other in running if other.startswith(name)]
    guess = (prefixed or close)[:1]
    meant = f"  Did you mean {guess[0]}?" if guess else ""
    return UnknownName(
        f"no tenant named {name!r}.  Running: {', '.join(running) or 'none'}.{meant}",
        hint="kvcached ps      shows what runs",
    )


def describe_limit(change: dict[str, Any]) -> str:
    """One line for a person."""
    verb = "would go" if change["dry_run"] else "went"
    line = (
        f"{change['name']}: limit {verb} from {format_size(change['before_bytes'])} to "
        f"{format_size(change['desired_bytes'])}, holds {format_size(change['held_bytes'])}"
    )
    if change["desired_bytes"] < change["floor_bytes"]:  # a limit counts, a floor is a promise
        line += f", below its floor of {format_size(change['floor_bytes'])}"
    if not change["applied"]:
        return f"{line}, giving back"
    usable = change["usable_bytes"]
    if usable < change["desired_bytes"]:  # a limit is no promise
        return f"{line}; {change['device']} has {format_size(usable)} for all now"
    return line
