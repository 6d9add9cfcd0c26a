"""Messages of a ``MemoryBackend`` that lives in another process, and who may send them.

One message is one ``SOCK_SEQPACKET`` datagram: a header of 24 bytes and a body, little-endian. The
body of a request is 64-bit integers; that of a reply integers, or a JSON object where it describes
or complains. Nothing is ever unpickled. The address is an abstract socket, which leaves no file and
ends with the process; the two sides check each other's user.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from kvcached.errors import (
    BackendUnavailable,
    DriverError,
    InvalidInput,
    KvcachedError,
    NotAllowed,
    OutOfPages,
    ProtocolError,
)

MAGIC, VERSION = b"KVCM", 1
HEADER = struct.Struct("<4sHHIIQ")
"""magic, version, op, status, number of integers, request."""
MAX_COPIES = 256
"""Copies in one message: three integers each."""
MAX_MESSAGE = HEADER.size + 8 * 3 * MAX_COPIES
_CREDENTIALS = struct.Struct("iII")


class Op(IntEnum):
    """What a request asks: the calls of ``MemoryBackend``, and ``HELLO``."""

    HELLO = 1
    RESERVE = 2
    CREATE = 3
    MAP = 4
    UNMAP = 5
    RELEASE = 6
    CLOSE = 7
    AVAILABLE = 8
    COPY = 9
    SETTLE = 10


OK, OUT_OF_PAGES, DRIVER_ERROR, INVALID, OTHER = range(5)
_STATUS: tuple[tuple[type[KvcachedError], int], ...] = (
    (OutOfPages, OUT_OF_PAGES), (DriverError, DRIVER_ERROR), (InvalidInput, INVALID),
)  # fmt: skip


class Frame(NamedTuple):
    """One message: ``values`` of a request or a plain reply, ``body`` of one that says more."""

    op: Op
    request: int
    status: int = OK
    values: tuple[int, ...] = ()
    body: dict[str, Any] | None = None


def encode(frame: Frame) -> bytes:
    """Write a message. Raises ``ProtocolError`` if it does not fit."""
    if frame.body is not None:
        body = json.dumps(frame.body, separators=(",", ":")).encode()
    else:
        body = struct.pack(f"<{len(frame.values)}q", *frame.values)
    if HEADER.size + len(body) > MAX_MESSAGE:
        raise ProtocolError(f"{frame.op.name} has a body of {len(body)} bytes: too long")
    head = HEADER.pack(MAGIC, VERSION, frame.op, frame.status, len(frame.values), frame.request)
    return head + body


def decode(data: bytes) -> Frame:
    """Read a message. Raises ``ProtocolError`` for what ``encode`` cannot have written."""
    if not HEADER.size <= len(data) <= MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes cannot be")
    magic, version, number, status, count, request = HEADER.unpack_from(data)
    if magic != MAGIC or number not in Op._value2member_map_:
        raise ProtocolError(f"not a memory message: {data[:8]!r}")
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks version {version} of the memory protocol, this one {VERSION}",
            hint="All processes of an engine need the same kvcached version.",
        )
    body = data[HEADER.size :]
    if count or not body:
        if len(body) != 8 * count:
            raise ProtocolError(f"{Op(number).name} promises {count} integers, {len(body)} B came")
        return Frame(Op(number), request, status, struct.unpack(f"<{count}q", body))
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body of {Op(number).name} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise ProtocolError(f"the body of {Op(number).name} is not a JSON object")
    return Frame(Op(number), request, status, (), said)


def complain(op: Op, request: int, error: KvcachedError) -> Frame:
    """The reply that carries an error."""
    status = next((number for kind, number in _STATUS if isinstance(error, kind)), OTHER)
    body = {"message": error.message[:1000], "hint": error.hint[:500]}
    if isinstance(error, DriverError):
        body |= {"status": error.status, "call": error.call}
    return Frame(op, request, status, (), body)


def error_of(frame: Frame, who: str) -> KvcachedError:
    """The error that a reply carries."""
    body = frame.body or {}
    message, hint = f"{who}: {body.get('message', 'no reason given')}", str(body.get("hint", ""))
    if frame.status == OUT_OF_PAGES:
        return OutOfPages(message, hint=hint)
    if frame.status == DRIVER_ERROR:
        return DriverError(message, status=str(body.get("status")), call=str(body.get("call")),
                           hint=hint)  # fmt: skip
    if frame.status == INVALID:
        return InvalidInput(message, hint=hint)
    return BackendUnavailable(message, hint=hint)


def address_of(owner_pid: int, rank: int) -> str:
    """The abstract socket address of rank ``rank`` of the engine of process ``owner_pid``.

    Containers may share the network but count processes each for itself: hence the namespace.
    """
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no /proc
        space = 0
    return f"\0kvcached-memory-{os.getuid()}-{space}-{owner_pid}-{rank}"


def check_peer(sock: socket.socket) -> None:
    """Raise ``NotAllowed`` unless the other side is a process of our own user, or root's."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    if uid not in {os.getuid(), 0}:
        raise NotAllowed(f"process {pid} of user {uid} may not use this process's memory")
