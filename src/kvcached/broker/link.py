"""Reaching the broker of a device: connect, or win the election and start it; say hello.

Every descriptor opened here is closed in a forked child, so that a child never keeps its parent's
connection (and with it the lease) or the election's lock.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

from kvcached.broker import protocol as p
from kvcached.broker.files import RuntimeDir, try_lock
from kvcached.broker.mirror import MirrorReader
from kvcached.broker.protocol import Message, Op, decode, encode
from kvcached.config import Config
from kvcached.errors import (
    BrokerUnavailable,
    InvalidInput,
    KvcachedError,
    NameTaken,
    NotAllowed,
    ProtocolError,
    UnknownName,
)

_START_S = 10.0
"""How long a broker may take to start on a busy machine."""
_ERRORS: dict[int, type[KvcachedError]] = {
    p.NAME_TAKEN: NameTaken, p.UNKNOWN_NAME: UnknownName, p.NOT_ALLOWED: NotAllowed,
    p.REFUSED: InvalidInput, p.BAD_MESSAGE: ProtocolError,
}  # fmt: skip
_HINTS = {
    p.NAME_TAKEN: "Give each engine of a device a name of its own (name=, KVCACHED_NAME).\n"
    "kvcached ps      shows those that run",
    p.REFUSED: "Lower the floors, or raise the budget (KVCACHED_BUDGET of who starts first).",
}
_SAID = ("capacity", "slot", "limit", "ceiling", "revision")
_open_fds: set[int] = set()


def _close_all() -> None:
    for fd in _open_fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    _open_fds.clear()


os.register_at_fork(after_in_child=_close_all)


class Connection:
    """One socket to a broker. Sends never wait; ``receive`` waits up to a timeout."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._fd = self._socket.fileno()
        _open_fds.add(self._fd)
        self._forget = weakref.finalize(self, _open_fds.discard, self._fd)
        try:
            # Not settimeout(): a queue of connections that is full would then be an error at once.
            limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._socket.connect(path)
        except OSError:
            self.close()
            raise

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send. ``BlockingIOError``: the broker does not read; other ``OSError``: it has gone."""
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        data = encode(message)
        if fds:
            socket.send_fds(self._socket, [data], fds, flags)
        else:
            self._socket.send(data, flags)

    def receive(self, timeout_s: float | None) -> tuple[Message, list[int]]:
        """The next message and its descriptors. ``None``: however long that takes.

        Raises ``TimeoutError``, ``ConnectionError`` at the end, ``ProtocolError``.
        """
        self._socket.settimeout(timeout_s)
        data, fds, flags, _ = socket.recv_fds(
            self._socket, p.MAX_MESSAGE + 1, 4, socket.MSG_CMSG_CLOEXEC
        )
        try:
            if not data:
                raise ConnectionResetError("the broker closed it")
            if flags & socket.MSG_TRUNC:
                raise ProtocolError("the message is too long")
            return decode(data), fds
        except BaseException:  # whatever it was, nobody else knows these descriptors
            for fd in fds:
                os.close(fd)
            raise

    def ask(self, message: Message, timeout_s: float) -> Message:
        """Send a request and wait for its answer, on a connection that does nothing else."""
        self.send(message)
        reply, fds = self.receive(timeout_s)
        for fd in fds:
            os.close(fd)
        raise_for(reply)
        return reply

    def wake(self) -> None:
        """End a ``receive`` that waits in another thread. What was sent still arrives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close. Idempotent; in a forked child the descriptor is closed already."""
        if not self._forget.alive:
            return
        forked = self._fd not in _open_fds
        self._forget()
        if forked:
            self._socket.detach()
        else:
            self._socket.close()


def raise_for(reply: Message) -> None:
    """Raise the error that an ERROR reply stands for."""
    if reply.op is Op.ERROR:
        kind = _ERRORS.get(reply.status, BrokerUnavailable)
        text = str(reply.body.get("error", "no reason given"))
        names = reply.body.get("names")
        if names is not None:
            text += f"; live: {', '.join(map(str, names)) or 'none'}"
        raise kind(text, hint=_HINTS.get(reply.status, ""))


class Welcome(NamedTuple):
    """A connection with a tenant, and what the broker said to it."""

    connection: Connection
    mirror: MirrorReader
    capacity: int
    slot: int
    limit: int
    ceiling: int
    revision: int
    epoch: int


def enter(
    config: Config, device: str, hello: Callable[[], dict[str, object]],
    capacity: Callable[[], int], deadline: float,
) -> Welcome:  # fmt: skip
    """Connect (starting the broker if there is none) and say hello.

    ``hello`` is called as late as possible, since a re-asserted lease must be true when it is
    sent. Raises ``BrokerUnavailable`` at the deadline, or what the broker refused.
    """
    pause, why = 0.001, "it does not answer"
    while time.monotonic() < deadline:
        try:
            return _enter_once(config, device, hello, capacity, deadline)
        except (ConnectionError, FileNotFoundError, TimeoutError, BlockingIOError) as error:
            why = str(error)  # it is leaving, or was killed: the next round elects another
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(pause * 2, 0.1)
    raise BrokerUnavailable(
        f"the broker of {device} cannot be reached: {why}",
        hint="`kvcached doctor` says more; KVCACHED_BROKER=0 runs with a budget of one's own.",
    )


def expect_tenant(config: Config, device: str, capacity: int) -> None:
    """Start the broker if there is none, and stay connected until it has had its tenants.

    That is what it waits for the first one by: should this process die, it leaves. For a thread of
    its own.
    """
    deadline = time.monotonic() + _START_S
    connection = _connect_or_start(config, device, lambda: capacity, deadline)
    try:
        with contextlib.suppress(ConnectionError):  # it has left
            connection.receive(None)
    finally:
        connection.close()


def _enter_once(
    config: Config, device: str, hello: Callable[[], dict[str, object]],
    capacity: Callable[[], int], deadline: float,
) -> Welcome:  # fmt: skip
    connection = _connect_or_start(config, device, capacity, deadline)
    pidfd = -1
    try:
        pidfd = os.pidfd_open(os.getpid())
        connection.send(Message(Op.HELLO, 1, body=hello()), (pidfd,))
        reply, fds = connection.receive(max(0.001, deadline - time.monotonic()))
        raise_for(reply)
        if reply.op is not Op.WELCOME or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise ProtocolError(f"{reply.op.name} is no answer to HELLO")
        said = {key: p.field(reply.body, key) for key in _SAID}
        return Welcome(connection, MirrorReader(fds[0]), epoch=reply.epoch, **said)
    except BaseException:  # whatever it was, the caller gets no connection to close
        connection.close()
        raise
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _connect_or_start(
    config: Config, device: str, capacity: Callable[[], int], deadline: float
) -> Connection:
    directory = RuntimeDir(p.runtime_dir(config), p.device_slug(device))
    try:
        timeout_s = max(0.001, deadline - time.monotonic())
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
            return Connection(directory.socket_path, timeout_s)
        lock = try_lock(directory)
        if lock is not None:
            _open_fds.add(lock)
            try:
                _start(directory, p.device_slug(device), capacity(), lock)
            finally:
                _open_fds.discard(lock)
                os.close(lock)
        return Connection(directory.socket_path, timeout_s)
    except (ConnectionError, FileNotFoundError, TimeoutError, BlockingIOError):
        raise
    except OSError as error:
        raise BrokerUnavailable(
            f"cannot use the runtime directory {directory.path!r}: {error}",
            hint="Set KVCACHED_RUNTIME_DIR to a directory with space and mode 0700.",
        ) from error
    finally:
        directory.close()


def _start(directory: RuntimeDir, slug: str, capacity: int, lock: int) -> None:
    """Start a broker that inherits the lock, and wait until it listens.

    ``-I -S``: neither the environment nor site-packages can put another module in its way, and
    it starts in half the time. The package is found by the path of the script.
    """
    if not sys.executable:
        raise BrokerUnavailable("cannot start a broker: this Python does not know its own path")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    ready, ready_child = os.pipe()
    try:
        arguments = [directory.path, slug, str(capacity), str(ready_child), str(lock)]
        process = subprocess.Popen(  # noqa: S603 (our own interpreter and script)
            [sys.executable, "-I", "-S", script, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(ready_child, lock),
        )  # fmt: skip
        os.close(ready_child)
        ready_child = -1
        process.wait(_START_S)  # it leaves at once, its child is the broker
        readable, _, _ = select.select([ready], [], [], _START_S)
        answer = os.read(ready, 2048).decode(errors="replace") if readable else "it is too slow"
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokerUnavailable(f"cannot start a broker: {error}") from error
    finally:
        os.close(ready)
        if ready_child >= 0:
            os.close(ready_child)
    if answer != "ok":
        raise BrokerUnavailable(
            f"the broker did not start in {directory.path!r}: {answer or 'it ended at once'}",
            hint="Is the runtime directory full, or on a file system without sockets?",
        )
