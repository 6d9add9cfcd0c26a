"""Looking at brokers and steering their tenants, from any process of the same user."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from kvcached.broker import protocol as p
from kvcached.broker.link import Connection
from kvcached.broker.protocol import Message, Op
from kvcached.config import Config, check_name
from kvcached.errors import BrokerUnavailable, InvalidInput
from kvcached.stats import (
    SCHEMA_VERSION,
    DeviceSnapshot,
    LimitRecord,
    TenantReport,
    TenantSnapshot,
)

_TIMEOUT_S = 3.0
_REPORT_FIELDS = frozenset(TenantReport.__dataclass_fields__)


def list_tenants(
    device: str | None = None, *, config: Config | None = None
) -> list[DeviceSnapshot]:
    """Devices that have a broker, with their tenants. Never starts a broker.

    ``device`` is ``"cpu"``, a GPU's UUID or the start of one (as ``kvcached ps`` shows it), or
    ``None`` for all. Raises ``UnsafeRuntimeDir``.
    """
    found = []
    for path in _sockets(device, config):
        with contextlib.suppress(OSError):  # it has just left, or was killed
            found.append(_snapshot(path))
    return found


def set_tenant_limit(
    name: str, nbytes: int, *, device: str | None = None, config: Config | None = None
) -> LimitRecord:
    """Set a tenant's limit, and wait up to a second until the tenant obeys.

    Raises ``UnknownName`` (with the names that exist), ``BrokerUnavailable``, ``InvalidInput``.
    """
    reply = _steer(Op.SET_LIMIT, name, {"limit": nbytes}, device, config)
    return _limit_record(reply)


def request_reclaim(
    name: str, nbytes: int, *, device: str | None = None, config: Config | None = None
) -> int:
    """Ask a tenant to give back ``nbytes``; returns what it gave within a second.

    Raises as ``set_tenant_limit``.
    """
    return p.field(_steer(Op.ASK_RECLAIM, name, {"bytes": nbytes}, device, config), "freed")


def _sockets(device: str | None, config: Config | None) -> list[str]:
    directory = p.runtime_dir(config or Config.from_env(), create=False)
    start = "" if device is None else p.device_slug(device)
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    return [f"{directory}/{name}" for name in names
            if name.endswith(".sock") and name.startswith(start)]  # fmt: skip


def _steer(
    op: Op, name: str, body: dict[str, Any], device: str | None, config: Config | None
) -> dict[str, Any]:
    check_name(name)
    for key, value in body.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= p.MAX_BYTES:
            raise InvalidInput(f"{key} is {value!r}, but must be a number of bytes >= 0")
    last: BaseException | None = None
    for path in _owners(name, device, config):
        try:
            with contextlib.closing(Connection(path, _TIMEOUT_S)) as connection:
                return connection.ask(Message(op, 1, body={"name": name, **body}), _TIMEOUT_S).body
        except OSError as error:
            last = error
    raise BrokerUnavailable(
        f"no broker of {device or 'any device'} answers" + (f": {last}" if last else ""),
        hint="`kvcached ps` shows what runs; the first engine starts the broker.",
    ) from last


def _owners(name: str, device: str | None, config: Config | None) -> list[str]:
    """The socket to ask: the device's, or that of the device where the name lives."""
    paths = _sockets(device, config)
    for path in paths if len(paths) > 1 else []:
        with contextlib.suppress(OSError):
            if any(tenant.name == name for tenant in _snapshot(path).tenants):
                return [path]
    return paths


def _snapshot(path: str) -> DeviceSnapshot:
    rows: list[dict[str, Any]] = []
    with contextlib.closing(Connection(path, _TIMEOUT_S)) as connection:
        reply = connection.ask(Message(Op.LIST, 1), _TIMEOUT_S)
        rows += reply.body["tenants"]
        while reply.status == p.MORE:
            reply, _ = connection.receive(_TIMEOUT_S)
            rows += reply.body["tenants"]
    head = reply.body
    return DeviceSnapshot(
        SCHEMA_VERSION, head["device"], head["capacity"], head["leased"], head["pid"],
        head["epoch"], tuple(_tenant(row) for row in rows), head.get("usable"),
    )  # fmt: skip


def _tenant(row: dict[str, Any]) -> TenantSnapshot:
    report = {key: value for key, value in row["report"].items() if key in _REPORT_FIELDS}
    return TenantSnapshot(
        row["name"], row["pid"], row["uid"], row["state"], row["lease"], _limit_record(row),
        TenantReport(**report), row["connected_s"], row["meta"],
    )  # fmt: skip


def _limit_record(row: dict[str, Any]) -> LimitRecord:
    return LimitRecord(row["limit"], row["revision"], row["lease"], row["floor"], row["weight"])
