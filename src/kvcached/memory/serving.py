"""``BackendServer``: lets one other process use the ``MemoryBackend`` of this one.

The memory belongs to a worker of an engine, where the kernels run; the scheduler, another process,
decides what is mapped (``remote.py``). A thread answers. When the other side has gone, what it
mapped stays until the process ends: kernels may still run on it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from kvcached.errors import BackendUnavailable, InvalidInput, KvcachedError
from kvcached.memory.base import Handle, MemoryBackend, Reservation
from kvcached.memory.wire import (
    MAX_MESSAGE,
    Frame,
    Op,
    address_of,
    check_peer,
    complain,
    decode,
    encode,
)

_log = logging.getLogger(__name__)


class BackendServer:
    """Answers the calls of one client at ``address_of(owner_pid, rank)``, until ``close``.

    Parameters
    ----------
    backend:
        The memory. Stays the caller's.
    owner_pid, rank:
        The engine's scheduler process, and which of its workers this is.
    describe:
        What ``HELLO`` is answered with: a JSON object.
    settle:
        Called for ``SETTLE``: returns once all kernels that were queued before have run.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        owner_pid: int,
        rank: int,
        describe: Callable[[], dict[str, Any]],
        settle: Callable[[], None],
    ) -> None:
        self._backend, self._describe, self._wait = backend, describe, settle
        self._handles: dict[int, Handle] = {}
        self._ranges: dict[int, Reservation] = {}
        self._closing = False
        self._peer: socket.socket | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.bind(address_of(owner_pid, rank))
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            raise BackendUnavailable(
                f"the socket of worker {rank} of engine {owner_pid} cannot be made: {error}",
                hint="Another process may have taken its name: see /proc/net/unix.",
            ) from error
        self._thread = threading.Thread(target=self._run, name="kvcached-memory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and the socket. Idempotent."""
        self._closing = True
        for sock in (self._socket, self._peer):
            if sock is not None:
                with contextlib.suppress(OSError):  # not connected, or gone
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._closing:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            with peer:
                self._peer = peer
                try:
                    check_peer(peer)
                    self._serve(peer)
                except (KvcachedError, OSError) as error:
                    _log.warning("the memory of this worker lost its scheduler: %s", error)
                finally:
                    self._peer = None

    def _serve(self, peer: socket.socket) -> None:
        while data := peer.recv(MAX_MESSAGE + 1):
            frame = decode(data)
            try:
                reply = self._answer(frame)
            except KvcachedError as error:
                reply = complain(frame.op, frame.request, error)
            peer.send(encode(reply))

    def _answer(self, frame: Frame) -> Frame:
        if frame.op is Op.HELLO:
            return Frame(frame.op, frame.request, body=self._describe())
        call: Callable[..., int | None] = getattr(self, f"_{frame.op.name.lower()}")
        try:
            value = call(*frame.values)
        except TypeError as error:  # the wrong number of integers
            raise InvalidInput(f"{frame.op.name} of {frame.values}: {error}") from error
        return Frame(frame.op, frame.request, values=(value or 0,))

    def _reserve(self, nbytes: int) -> int:
        reservation = self._backend.reserve(nbytes)
        self._ranges[reservation.address] = reservation
        return reservation.address

    def _create(self, num_pages: int) -> int:
        handle = self._backend.create(num_pages)
        self._handles[handle.key] = handle
        return handle.key

    def _map(self, address: int, page: int, key: int) -> None:
        self._backend.map(self._range(address), page, self._handle(key))

    def _unmap(self, address: int, page: int, key: int) -> None:
        self._backend.unmap(self._range(address), page, self._handle(key))

    def _release(self, key: int) -> None:
        self._backend.release(self._handle(key))
        del self._handles[key]

    def _close(self, address: int) -> None:
        self._backend.close(self._range(address))
        del self._ranges[address]

    def _available(self) -> int:
        return self._backend.available()

    def _settle(self) -> None:
        self._wait()

    def _copy(self, *values: int) -> None:
        if len(values) % 3:
            raise InvalidInput(f"COPY of {len(values)} integers: three make a copy")
        self._backend.copy_many(list(zip(values[::3], values[1::3], values[2::3], strict=True)))

    def _handle(self, key: int) -> Handle:
        handle = self._handles.get(key)
        if handle is None:
            raise InvalidInput(f"no handle {key} was created here")
        return handle

    def _range(self, address: int) -> Reservation:
        reservation = self._ranges.get(address)
        if reservation is None:
            raise InvalidInput(f"no range at {address:#x} was reserved here")
        return reservation
