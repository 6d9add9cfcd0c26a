"""A broker without a process: its ``Service`` and its peers over socket pairs, step by step.

What is on its way lies in the sockets until a test delivers it, so that messages can cross.
"""

from __future__ import annotations

import contextlib
import os
import socket
from functools import partial
from unittest import mock

from broker_tenant import CountingTenant

from kvcached.broker import client
from kvcached.broker import protocol as p
from kvcached.broker.files import RuntimeDir
from kvcached.broker.ledger import Ledger
from kvcached.broker.link import _SAID, Welcome
from kvcached.broker.members import Members
from kvcached.broker.mirror import MirrorWriter
from kvcached.broker.peer import Peer
from kvcached.broker.probe import NoProbe
from kvcached.broker.protocol import Message, Op
from kvcached.broker.service import Service
from kvcached.config import Config
from kvcached.errors import ProtocolError


class NobodyEnds:
    """A watcher of processes that all live."""

    def watch_exit(self, pidfd, ident):
        pass

    def unwatch_exit(self, pidfd):
        pass


class Wire:
    """Both ends of one connection. ``errors`` counts as the loop does."""

    def __init__(self, desk, uid):
        self.mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.mine.setblocking(False)
        self.desk, self.peer, self.errors = desk, Peer(theirs, desk.now, set()), 0
        self.peer.uid = self.peer.uid if uid is None else uid

    def send(self, message, fds=()):
        socket.send_fds(self.mine, [p.encode(message)], fds)

    def receive(self):
        """The next message from the broker, or ``None``."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            data, fds, _, _ = socket.recv_fds(self.mine, p.MAX_MESSAGE, 4)
            for fd in fds:
                os.close(fd)
            return p.decode(data) if data else None
        return None

    def ask(self, message, fds=()):
        """Send, have it handled, and return the first answer."""
        self.send(message, fds)
        while self.deliver():
            pass
        return self.receive()

    def deliver(self):
        """Have the broker handle the next message; returns it, or ``None``."""
        if self.peer.broken:
            return None
        try:
            message, fds = self.peer.receive()
        except BlockingIOError:
            return None
        try:
            if isinstance(message, Message):
                self.desk.service.handle(self.peer, message, fds, self.desk.now)
        except ProtocolError:
            self.errors += 1
            self.peer.send(Message(Op.ERROR, message.request, status=p.BAD_MESSAGE))
        finally:
            for fd in fds:
                os.close(fd)
        self.desk.service.settle(self.desk.now)
        return message

    def close(self):
        self.mine.close()
        self.peer.close()


class Desk:
    """One broker after the other over one runtime directory."""

    def __init__(self, path, capacity=1000):
        self.directory = RuntimeDir(str(path), "cpu")
        self.capacity, self.epoch, self.now = capacity, 0, 0.0
        self.log, self.wires = [], []
        self._mirror = None
        self.restart()

    def restart(self):
        """The broker dies, and the next one knows nothing."""
        self._end()
        self.epoch += 1
        self.ledger, self._mirror = Ledger(self.capacity, self.now), MirrorWriter()
        self.members = Members(
            self.ledger, NoProbe(), NobodyEnds(), self.directory, self.log.append, lasting={}
        )
        self.service = Service(
            self.ledger, self.members, self._mirror, epoch=self.epoch, device="cpu",
            log=self.log.append,
        )  # fmt: skip

    def connect(self, uid=None):
        self.wires.append(Wire(self, uid))
        return self.wires[-1]

    def published_limit(self, member):
        return self._mirror._fields[8 + member.slot]

    def tenant(self, name, **options):
        """A ``CountingTenant`` whose budget talks to this desk, and does what the test says."""
        with mock.patch.object(client, "Session", partial(DeskSession, self)):
            return CountingTenant(name, config=Config(), **options)

    def _end(self):
        if self._mirror is not None:
            for ident in list(self.members.by_ident):
                self.members.remove(ident)
            self._mirror.close()
        for wire in self.wires:
            wire.close()
        self.wires.clear()

    def close(self):
        self._end()
        self.directory.close()


class DeskSession:
    """``Session`` without its thread: the test delivers."""

    def __init__(self, desk, budget, name, config, device, capacity):
        self.desk, self._client, self.capacity = desk, budget, capacity
        self.wire, self.connected, self.forked, self.pressure = None, False, False, 0
        self._backlog = []
        self.say_hello()
        self.hear_welcome()

    def say_hello(self):
        self.wire = self.desk.connect()
        pidfd = os.pidfd_open(os.getpid())
        self.wire.send(Message(Op.HELLO, 1, body=self._client.hello()), (pidfd,))
        os.close(pidfd)
        self.wire.deliver()

    def hear_welcome(self):
        reply = self.wire.receive()
        assert reply is not None
        assert reply.op is Op.WELCOME, reply
        said = {key: reply.body[key] for key in _SAID}
        self.capacity = said["capacity"]
        self._client.welcomed(Welcome(None, None, epoch=reply.epoch, **said))
        self.connected = True

    def lose(self):
        """The engine's side of the connection has ended; what was on its way to it is lost."""
        self.connected = False
        self._backlog.clear()
        self._client.lost()

    def send(self, message):
        if self.connected:
            self.wire.send(message)
        return self.connected

    def deliver(self):
        """Hand the next message to the engine; returns it, or ``None``."""
        message = self._backlog.pop(0) if self._backlog else self.wire.receive()
        if message is not None:
            self._client.on_message(message)
        return message

    def mirrored(self):
        return None

    def is_current_thread(self):
        return True  # there is no other to receive for the caller

    def receive_answer(self, request, timeout_s):
        while self.wire.deliver():
            pass
        while (message := self.wire.receive()) is not None:
            if message.op is Op.GRANT and message.request == request:
                self._client.on_message(message)
                return
            self._backlog.append(message)

    def stop(self):
        pass

    def join(self, timeout_s):
        pass
