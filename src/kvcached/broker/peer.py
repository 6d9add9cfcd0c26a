"""One connection of the broker: framing, bounded writes, rate, identity of the other side."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque

from kvcached.broker.protocol import MAX_MESSAGE, Message, decode, encode
from kvcached.errors import ProtocolError

MAX_UNSENT = 64 << 10
"""A peer that lets more than this pile up is cut."""
MAX_ERRORS = 3
RATE, BURST = 20_000.0, 4_000.0
"""Messages per second that one connection may send for long, and at once."""
_SO_PEERPIDFD = 77  # Linux >= 6.5; not yet named in the socket module
_MAX_FDS = 8


class Peer:
    """A client's connection. ``ident`` is its tenant, or 0 if it only looks or administers.

    It puts itself into ``dirty`` when the loop has to cut it, or to wait until it reads.
    """

    def __init__(self, connection: socket.socket, now: float, dirty: set[Peer]) -> None:
        connection.setblocking(False)
        self._dirty = dirty
        self.socket = connection
        cred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, self.uid, self.gid = struct.unpack("3i", cred)
        self.ident = 0
        self.since = now
        self.errors = 0
        self.broken = False
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._tokens, self._filled = BURST, now

    def fileno(self) -> int:
        """For the selector."""
        return self.socket.fileno()

    def receive(self) -> tuple[Message | ProtocolError | None, list[int]]:
        """The next message, or what is wrong with it, or ``None`` at the end; and its fds.

        Raises ``BlockingIOError`` if nothing is there.
        """
        try:
            data, ancillary, flags, _ = self._recvmsg()
        except ConnectionError:
            # The kernel says this once if the peer left something unread, before what it sent last.
            try:
                data, ancillary, flags, _ = self._recvmsg()
            except ConnectionError:
                return None, []
        fds = list(_fds(ancillary))
        if not data and not fds:
            return None, []
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            return ProtocolError("the message, or the list of its descriptors, is too long"), fds
        try:
            return decode(data), fds
        except ProtocolError as error:
            return error, fds

    def _recvmsg(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        room = socket.CMSG_SPACE(_MAX_FDS * 4)
        return self.socket.recvmsg(MAX_MESSAGE + 1, room, socket.MSG_CMSG_CLOEXEC)

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send now, or as soon as the peer reads. Sets ``broken`` instead of waiting."""
        data = encode(message)
        if self.broken:
            return
        if not self._unsent:
            try:
                if fds:
                    socket.send_fds(self.socket, [data], fds, socket.MSG_NOSIGNAL)
                else:
                    self.socket.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass
            except OSError:
                self.cut()
                return
            else:
                return
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        self._dirty.add(self)
        if self._unsent_bytes > MAX_UNSENT or fds:
            self.broken = True

    @property
    def wants_to_write(self) -> bool:
        """Whether something is waiting to be sent."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Send what is waiting, as far as the peer reads."""
        while self._unsent:
            try:
                self.socket.send(self._unsent[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self.cut()
                return
            self._unsent_bytes -= len(self._unsent.popleft())

    def cut(self) -> None:
        """Have the loop end this connection."""
        self.broken = True
        self._dirty.add(self)

    def take_token(self, now: float) -> bool:
        """Whether the peer may send one more message now (token bucket)."""
        self._tokens = min(BURST, self._tokens + (now - self._filled) * RATE)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def pidfd(self, offered: list[int]) -> int | None:
        """A pidfd of the process that connected: from the kernel, else the one that it sent.

        Takes the fd out of ``offered`` if it is used; the caller closes the rest.
        """
        with contextlib.suppress(OSError):
            fd = self.socket.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
            os.set_inheritable(fd, False)
            return fd
        for fd in offered:
            if _is_pidfd(fd):
                offered.remove(fd)
                return fd
        return None

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


def _fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(data) // 4
            found += struct.unpack(f"{count}i", data[: count * 4])
    return found


def _is_pidfd(fd: int) -> bool:
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
            return b"\nPid:" in file.read(4096)
    except OSError:
        return False
