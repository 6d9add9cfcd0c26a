"""Messages between an engine and the broker, and where the two meet.

One message is one ``SOCK_SEQPACKET`` datagram: a header of 32 bytes, little-endian, then a body.
Hot operations have a fixed body of 64-bit integers, slow ones a JSON object of at most 4 KiB.
Nothing here is ever unpickled, and no name from a peer becomes part of a path.

Standard library only, and no dataclasses: the broker is a process that an engine waits for.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from kvcached.errors import InvalidInput, ProtocolError, UnsafeRuntimeDir

if TYPE_CHECKING:
    from kvcached.config import Config

MAGIC = b"KVCB"
VERSION = 1
HEADER = struct.Struct("<4sHHIIQQ")
"""magic, version, op, body length, status, request id, epoch: 32 bytes."""
MAX_BODY = 4096
MAX_MESSAGE = HEADER.size + MAX_BODY
MAX_BYTES = (1 << 62) - 1
"""Largest byte count that a message may carry."""
MAX_WEIGHT = 1e9
"""A tenant's weight lies above 0 and below this."""
MAX_SOCKET_PATH = 107


class Op(IntEnum):
    """What a message asks or answers. The class of an operation is its value divided by 16."""

    # observe: anybody whom the socket lets in
    LIST = 1
    PING = 2
    # lease: an engine, about itself
    HELLO = 16
    CLAIM = 17
    GIVE_BACK = 18
    REPORT = 19
    OWN_LIMIT = 20
    ANSWER = 21
    """"I have done what you asked (RECLAIM or LIMIT) as far as I could": bytes given back."""
    OUT_OF_MEMORY = 22
    BYE = 23
    # admin: about another tenant
    SET_LIMIT = 32
    ASK_RECLAIM = 33
    # from the broker
    WELCOME = 64
    GRANT = 65
    RECLAIM = 66
    LIMIT = 67
    TENANTS = 68
    DONE = 69
    ERROR = 70


OBSERVE, LEASE, ADMIN = 0, 1, 2
_FIXED = {
    Op.CLAIM: struct.Struct("<qq"),  # bytes needed, bytes wanted (at least the former)
    Op.GIVE_BACK: struct.Struct("<q"),  # bytes
    Op.ANSWER: struct.Struct("<q"),  # bytes given back for the request
    Op.OUT_OF_MEMORY: struct.Struct("<q"),  # bytes that the device refused
    Op.GRANT: struct.Struct("<q"),  # bytes granted
    Op.RECLAIM: struct.Struct("<qq"),  # bytes, milliseconds to answer in; 0: at once
    Op.LIMIT: struct.Struct("<qq"),  # bytes, revision
}
_EMPTY = frozenset({Op.PING, Op.BYE})

# Status of a reply. 0 is success; a GRANT with another status grants nothing.
OK, REFUSED, LATE, NAME_TAKEN, UNKNOWN_NAME, NOT_ALLOWED, BAD_MESSAGE, BUSY, CLOSED, MORE = range(
    10
)
TRANSIENT = 1
"""Status of a CLAIM: for a moment only, so the limit does not count and nobody is asked."""
STAYS = 2
"""Status of a CLAIM: its owner goes on without it, so it may wait until what others use ends."""


class Message(NamedTuple):
    """One message. ``values`` are a hot operation's integers, ``body`` a slow one's object."""

    op: Op
    request: int = 0
    epoch: int = 0
    status: int = OK
    values: tuple[int, ...] = ()
    body: dict[str, Any] = {}  # noqa: RUF012 (never written to; a NamedTuple wants a default)


def encode(message: Message) -> bytes:
    """Write a message. Raises ``ProtocolError`` if it does not fit."""
    op, values = message.op, message.values
    form = _FIXED.get(op)
    if form is not None:
        try:
            body = form.pack(*values)
        except struct.error as error:
            raise ProtocolError(f"{op.name} cannot carry {values}: {error}") from error
    elif op in _EMPTY:
        body = b""
    else:
        body = json.dumps(message.body, separators=(",", ":")).encode()
    if len(body) > MAX_BODY:
        raise ProtocolError(f"{op.name} has a body of {len(body)} bytes, at most {MAX_BODY} fit")
    head = HEADER.pack(
        MAGIC, VERSION, op, len(body), message.status, message.request, message.epoch
    )
    return head + body


def decode(data: bytes) -> Message:
    """Read a message. Raises ``ProtocolError`` for anything that ``encode`` cannot have written."""
    if len(data) < HEADER.size or len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes; {HEADER.size} to {MAX_MESSAGE} fit")
    magic, version, number, length, status, request, epoch = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(f"the message starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(
            f"the message has protocol version {version}, this side speaks {VERSION}",
            hint="Engines and broker of one runtime directory need the same kvcached version.",
        )
    if number not in Op._value2member_map_:
        raise ProtocolError(f"operation {number} is unknown")
    op = Op(number)
    if length != len(data) - HEADER.size:
        raise ProtocolError(
            f"{op.name} promises {length} body bytes, {len(data) - HEADER.size} came"
        )
    values, body = _decode_body(op, data[HEADER.size :])
    return Message(op, request, epoch, status, values, body)


def _decode_body(op: Op, data: bytes) -> tuple[tuple[int, ...], dict[str, Any]]:
    form = _FIXED.get(op)
    size = 0 if form is None else form.size
    if form is not None or op in _EMPTY:
        if len(data) != size:
            raise ProtocolError(f"{op.name} needs {size} body bytes, {len(data)} came")
        values = form.unpack(data) if form else ()
        if any(not 0 <= value <= MAX_BYTES for value in values):
            raise ProtocolError(f"{op.name} carries {values}, out of 0..{MAX_BYTES}")
        return values, {}
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:  # a peer may nest 4 KiB of brackets
        raise ProtocolError(f"the body of {op.name} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"the body of {op.name} is not a JSON object")
    return (), body


def split_rows(rows: Sequence[dict[str, Any]], *, room: int = MAX_BODY - 64) -> list[list[Any]]:
    """Cut a list of JSON objects into runs that each fit one message. At least one run."""
    runs: list[list[Any]] = [[]]
    used = 0
    for row in rows:
        size = len(json.dumps(row, separators=(",", ":")).encode()) + 1
        if runs[-1] and used + size > room:
            runs.append([])
            used = 0
        runs[-1].append(row)
        used += size
    return runs


def field(body: dict[str, Any], name: str, default: int | None = None) -> int:
    """A byte count (or other whole number) of a JSON body. Raises ``ProtocolError``."""
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BYTES:
        raise ProtocolError(f"{name} is {value!r}, but must be a whole number of 0..{MAX_BYTES}")
    return value


# --- where the two meet ---------------------------------------------------------------------


def device_slug(device: str) -> str:
    """The file name part of a device: ``cpu`` -> ``cpu``, a GPU's UUID ``GPU-...`` -> ``gpu-...``.

    Raises ``InvalidInput`` for what cannot be part of a file name.
    """
    slug = device.lower()
    rest = slug.removeprefix("gpu-")
    if slug != "cpu" and (rest == slug or not rest or set(rest) - set("0123456789abcdef-")):
        raise InvalidInput(
            f"a broker knows no device {device!r}",
            hint="Use 'cpu', or a GPU's UUID ('GPU-...'), as `kvcached ps` shows it.",
        )
    return slug


def runtime_dir(config: Config, *, create: bool = True) -> str:
    """The directory of the broker's files: ours alone, made with mode 0700 if it is missing.

    ``config.runtime_dir`` (from ``$KVCACHED_RUNTIME_DIR`` or ``$XDG_RUNTIME_DIR``), else
    ``/run/kvcached`` for root, else ``/tmp/kvcached-<uid>``. Raises ``UnsafeRuntimeDir`` if the
    directory is a link, is not a directory, belongs to somebody else, or can be written by group
    or others.
    """
    path = config.runtime_dir or _default_dir()
    if not os.path.isabs(path):
        raise UnsafeRuntimeDir(
            f"the runtime directory {path!r} is not an absolute path",
            hint="Set KVCACHED_RUNTIME_DIR to an absolute path.",
        )
    longest = f"{path}/gpu-{'0' * 36}.sock"
    if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
        raise UnsafeRuntimeDir(
            f"the runtime directory {path!r} is too long for a socket path of {MAX_SOCKET_PATH} "
            "bytes",
            hint="Set KVCACHED_RUNTIME_DIR to a shorter path.",
        )
    if create:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise UnsafeRuntimeDir(
                f"the runtime directory {path!r} cannot be made: {error.strerror}",
                hint=f"Make {os.path.dirname(path)}, or set KVCACHED_RUNTIME_DIR to a directory of "
                "your own with mode 0700; without it $XDG_RUNTIME_DIR/kvcached is taken.",
            ) from error
    _check_dir(path)
    return path


def _default_dir() -> str:
    uid = os.geteuid()
    return "/run/kvcached" if uid == 0 else f"/tmp/kvcached-{uid}"  # noqa: S108 (checked below)


def _check_dir(path: str) -> None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return  # nothing there, so nobody to talk to
    if not stat.S_ISDIR(info.st_mode):
        raise _unsafe(path, "is not a directory (or is a link)")
    if info.st_uid != os.geteuid():
        raise _unsafe(path, f"belongs to user {info.st_uid}, not to {os.geteuid()}")
    if info.st_mode & 0o022:
        raise _unsafe(path, f"has mode {info.st_mode & 0o7777:04o}: others can write there")


def _unsafe(path: str, why: str) -> UnsafeRuntimeDir:
    return UnsafeRuntimeDir(
        f"the runtime directory {path!r} {why}",
        hint="Remove it, or set KVCACHED_RUNTIME_DIR to a directory of your own with mode 0700.",
    )
