"""``Session``: a tenant's standing connection to its broker, and the thread that serves it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from typing import Any, Protocol

from kvcached.broker.capacity import default_capacity
from kvcached.broker.link import Welcome, enter
from kvcached.broker.mirror import MirrorState
from kvcached.broker.protocol import Message, Op
from kvcached.config import Config
from kvcached.errors import KvcachedError, ProtocolError

_LOG = logging.getLogger("kvcached.broker")
_TICK_S = 0.1
_JOIN_S = 10.0
_REJOIN_S = 1.0
_MAX_BACKOFF_S = 1.0


class Client(Protocol):
    """Whom a session serves. All methods are called without any lock."""

    def hello(self) -> dict[str, Any]:
        """The body of HELLO, true at this moment: a lease that is asserted here is ours."""
        ...

    def welcomed(self, welcome: Welcome) -> None:
        """The broker has answered HELLO."""
        ...

    def lost(self) -> None:
        """The connection has ended; the session is looking for a new one."""
        ...

    def on_message(self, message: Message) -> None:
        """A message came."""
        ...

    def tick(self) -> None:
        """Called after each message, and at least ten times a second."""
        ...


class Session:
    """Keeps ``client`` connected until ``close``. Construction raises as ``link.enter`` does.

    ``capacity`` is what a broker gets that this process has to start; ``None``: from ``config``.
    """

    def __init__(
        self, client: Client, name: str, config: Config, device: str, capacity: int | None
    ) -> None:
        self._client, self._name = client, name
        self._config, self._device = config, device
        self.capacity = capacity
        self._backlog: deque[Message] = deque()
        self._closing = self.forked = False
        self.welcome: Welcome | None = self._enter(_JOIN_S)
        self._thread = threading.Thread(
            target=_serve, args=(weakref.ref(self),), name=f"kvcached-{name}", daemon=True
        )
        self._thread.start()

    @property
    def pressure(self) -> int:
        """Bytes that claims at the broker wait for; no system call."""
        welcome = self.welcome
        return 0 if welcome is None else welcome.mirror.pressure

    def mirrored(self) -> MirrorState | None:
        """What the broker last published; no system call. ``None`` without a broker."""
        welcome = self.welcome
        return None if welcome is None else welcome.mirror.read()

    def send(self, message: Message) -> bool:
        """Send if there is a broker that reads. A broken connection is the thread's to notice."""
        welcome = self.welcome
        if welcome is not None and not self.forked:
            with contextlib.suppress(OSError):
                welcome.connection.send(message)
                return True
        return False

    def stop(self) -> None:
        """End the thread; the connection ends with it. Does not wait."""
        self._closing = True
        welcome = self.welcome
        if welcome is not None:
            welcome.connection.wake()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def is_current_thread(self) -> bool:
        """Whether the caller runs on the session's thread, which nobody else receives for."""
        return threading.current_thread() is self._thread

    def receive_answer(self, request: int, timeout_s: float) -> None:
        """On the session's thread: hand the GRANT of ``request`` to the client, the rest later."""
        deadline, welcome = time.monotonic() + timeout_s, self.welcome
        while welcome is not None and (left := deadline - time.monotonic()) > 0:
            try:
                message = self._receive_one(welcome, left)
            except (OSError, ProtocolError):
                return  # the next round notices too
            if message.op is Op.GRANT and message.request == request:
                self._client.on_message(message)
                return
            self._backlog.append(message)

    def step(self) -> bool:
        """One round of the thread: a message, or a tick. Returns whether to go on."""
        if self.forked:
            return False
        if self._closing:
            self._drop()
            return False
        welcome = self.welcome
        if welcome is None:
            self._rejoin()
            return True
        try:
            self._receive(welcome)
        except (OSError, ProtocolError) as error:
            return self._lose(error)
        self._client.tick()
        return True

    def _receive(self, welcome: Welcome) -> None:
        if self._backlog:
            self._client.on_message(self._backlog.popleft())
            return
        with contextlib.suppress(TimeoutError):
            self._client.on_message(self._receive_one(welcome, _TICK_S))

    @staticmethod
    def _receive_one(welcome: Welcome, timeout_s: float) -> Message:
        message, fds = welcome.connection.receive(timeout_s)
        for fd in fds:
            os.close(fd)
        return message

    def _enter(self, patience_s: float) -> Welcome:
        deadline = time.monotonic() + patience_s
        welcome = enter(
            self._config, self._device, self._client.hello, self._start_capacity, deadline
        )
        self.capacity = welcome.capacity
        self._client.welcomed(welcome)
        return welcome

    def _start_capacity(self) -> int:
        if self.capacity is None:
            self.capacity = default_capacity(self._config, self._device)
        return self.capacity

    def _rejoin(self) -> None:
        """Try until it works: the client goes on with what it holds meanwhile."""
        pause = 0.001
        while not self._closing and not self.forked:
            try:
                self.welcome = self._enter(_REJOIN_S)
            except (KvcachedError, OSError) as error:
                _LOG.warning("%s: no broker: %s", self._name, error)
                time.sleep(pause)
                pause = min(2 * pause, _MAX_BACKOFF_S)
            else:
                return

    def _lose(self, error: Exception) -> bool:
        self._drop()
        if self._closing:  # whoever closes may hold the client's lock, and waits for us
            return False
        _LOG.info("%s: lost the broker: %s", self._name, error)
        self._client.lost()
        return True

    def _drop(self) -> None:
        welcome, self.welcome = self.welcome, None
        self._backlog.clear()
        if welcome is not None:
            welcome.connection.close()


def _serve(reference: weakref.ref[Session]) -> None:
    """The thread's loop. A session that was dropped without ``stop`` ends it."""
    while True:
        session = reference()
        if session is None or not session.step():
            return
        del session
