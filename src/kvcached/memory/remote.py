"""``RemoteBackend``: a ``MemoryBackend`` whose memory lies in other processes, one or several.

An engine's scheduler decides what is mapped, its workers hold the memory. With tensor parallelism
every worker backs the same pages, with pipeline parallelism each as many as its layers need
(``Share``). A call goes to all of them at once and is all or nothing: what some have done is undone
when another refuses. Addresses are those of the worker that holds most, as whole pages.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcached.errors import BackendUnavailable, ClosedError, InvalidInput, KvcachedError, PoolBroken
from kvcached.layout import cdiv
from kvcached.memory.base import Copy, Handle, Reservation
from kvcached.memory.wire import (
    MAX_COPIES,
    MAX_MESSAGE,
    Frame,
    Op,
    address_of,
    check_peer,
    decode,
    encode,
    error_of,
)

_HELLO_SECONDS = 30.0
"""Longest wait for a worker's first answer. Later ones are waited for until it ends: to give up on
one would leave the two sides with different ideas of what is mapped."""
_Values = Sequence[Sequence[tuple[int, ...]]]  # for each rank its calls, each some integers


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker has behind a page of all: ``pages`` pages in each of ``planes`` planes.

    A range of all is, in that worker, so many planes one after the other, of equal size.
    """

    planes: int = 1
    pages: int = 1

    @property
    def weight(self) -> int:
        """Pages in all planes."""
        return self.planes * self.pages


class Worker:
    """The connection to one worker's ``BackendServer``; waits ``patience`` seconds for it."""

    def __init__(self, owner_pid: int, rank: int, *, patience: float = 10.0) -> None:
        self.name = f"worker {rank} of engine {owner_pid}"
        self._request = 0
        self._said: dict[str, Any] | None = None
        self._socket = _connect(address_of(owner_pid, rank), self.name, patience)
        try:
            check_peer(self._socket)
        except BaseException:  # whoever listens there is not ours
            self._socket.close()
            raise
        self._socket.settimeout(_HELLO_SECONDS)

    def send(self, op: Op, values: tuple[int, ...] = ()) -> None:
        """Ask."""
        self._request += 1
        try:
            self._socket.send(encode(Frame(op, self._request, values=values)))
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> Frame:
        """The answer. Raises what the worker's backend raised."""
        try:
            data = self._socket.recv(MAX_MESSAGE + 1)
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost("it has ended")
        frame = decode(data)
        if frame.request != self._request:  # an answer that came after all: the pair is of no use
            raise self._lost(f"answer {frame.request} to request {self._request}")
        if frame.status:
            raise error_of(frame, self.name)
        return frame

    def call(self, op: Op, values: tuple[int, ...] = ()) -> Frame:
        """Ask, and wait for the answer."""
        self.send(op, values)
        return self.receive()

    def hello(self) -> dict[str, Any]:
        """What the worker says of itself: asked once, and then waited for as long as it lives."""
        if self._said is None:
            self._said = self.call(Op.HELLO).body or {}
            self._socket.settimeout(None)
        return self._said

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._socket.close()

    def _lost(self, why: object) -> BackendUnavailable:
        return BackendUnavailable(f"{self.name} does not answer: {why}")


class RemoteBackend:
    """The memory of the workers of one engine; see the module's docstring.

    Parameters
    ----------
    workers:
        Connections, at least one. Owned: closed by ``shutdown``.
    shares:
        What each worker has behind a page; default: a page of its own, in all of them.

    Raises ``BackendUnavailable`` when a worker has gone, and ``InvalidInput`` if the workers'
    pages differ in size.
    """

    def __init__(self, workers: Sequence[Worker], shares: Sequence[Share] | None = None) -> None:
        self._workers = tuple(workers)
        self.shares = tuple(shares or [Share()] * len(self._workers))
        """What each worker has behind a page."""
        self._most = max(share.weight for share in self.shares)
        self._lead = [share.weight for share in self.shares].index(self._most)
        self._lock = threading.Lock()
        self._ranges: dict[int, tuple[int, ...]] = {}  # as given out: each rank's
        self._sizes: dict[int, int] = {}
        self._keys: dict[Handle, list[list[int | None]]] = {}  # everybody's; None: released there
        self._last_key = 0
        self._closed = False
        said = [worker.hello() for worker in self._workers]
        self.descriptions: list[dict[str, Any]] = said
        """What each worker says of itself."""
        sizes = {int(body.get("page_bytes", 0)) for body in said}
        if len(sizes) != 1 or not min(sizes):
            raise InvalidInput(f"the workers have pages of different sizes: {sorted(sizes)}")
        self.page_bytes = min(sizes) * self._most
        """Bytes behind a page in the worker that holds most; see ``shares`` for the others."""
        self.device = str(said[0].get("device", "cpu"))
        self.can_alias = all(bool(body.get("can_alias")) for body in said)
        self.uuid = str(said[0].get("uuid", ""))
        self.total_bytes = min(int(body.get("total_bytes", 0)) for body in said)

    # --- the contract of MemoryBackend -----------------------------------------------------------

    def reserve(self, nbytes: int) -> Reservation:
        """See ``MemoryBackend.reserve``."""
        with self._lock:
            values = [[(nbytes * share.weight // self._most,)] for share in self.shares]
            replies = self._all(Op.RESERVE, values, undo=Op.CLOSE, keep_reply=True)
            addresses = tuple(frame.values[0] for (frame,) in replies)
            address = cdiv(addresses[self._lead], self.page_bytes) * self.page_bytes
            self._ranges[address], self._sizes[address] = addresses, nbytes
            return Reservation(address, nbytes)

    def create(self, num_pages: int) -> Handle:
        """See ``MemoryBackend.create``."""
        with self._lock:
            values = [[(num_pages * share.pages,)] * share.planes for share in self.shares]
            replies = self._all(Op.CREATE, values, undo=Op.RELEASE, keep_reply=True)
            self._last_key += 1
            handle = Handle(self._last_key, num_pages)
            self._keys[handle] = [[frame.values[0] for frame in frames] for frames in replies]
            return handle

    def map(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.map``."""
        with self._lock:
            self._all(Op.MAP, self._places(reservation, page_index, handle), undo=Op.UNMAP)

    def unmap(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.unmap``."""
        with self._lock:
            self._all(Op.UNMAP, self._places(reservation, page_index, handle), undo=Op.MAP)

    def release(self, handle: Handle) -> None:
        """See ``MemoryBackend.release``. Where a worker refuses, calling again asks it again."""
        with self._lock:
            for worker, keys in zip(self._workers, self._keys_of(handle), strict=True):
                for plane, key in enumerate(keys):
                    if key is not None:
                        worker.call(Op.RELEASE, (key,))
                        keys[plane] = None
            del self._keys[handle]

    def close(self, reservation: Reservation) -> None:
        """See ``MemoryBackend.close``."""
        with self._lock:
            addresses = self._addresses(reservation)
            self._all(Op.CLOSE, [[(address,)] for address in addresses])
            del self._ranges[reservation.address], self._sizes[reservation.address]

    def available(self) -> int:
        """See ``MemoryBackend.available``: of the worker that has least for its share."""
        with self._lock:
            replies = self._all(Op.AVAILABLE, self._same())
            return min(frame.values[0] * self._most // share.weight
                       for (frame,), share in zip(replies, self.shares, strict=True))  # fmt: skip

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """See ``MemoryBackend.copy``."""
        self.copy_many([(dst, src, nbytes)])

    def copy_many(self, copies: Sequence[Copy]) -> None:
        """See ``MemoryBackend.copy_many``: in each worker, the same parts of its blocks."""
        step = max(1, MAX_COPIES // max(share.planes for share in self.shares))
        with self._lock:
            for start in range(0, len(copies), step):
                part = copies[start : start + step]
                self._all(Op.COPY, [self._translated(part, rank)
                                    for rank in range(len(self._workers))])  # fmt: skip

    def settle(self) -> None:
        """Wait until the kernels that the workers have queued so far have run."""
        with self._lock:
            self._all(Op.SETTLE, self._same())

    def shutdown(self) -> None:
        """See ``MemoryBackend.shutdown``: ends the connections."""
        with self._lock:
            if not self._closed:
                if self._keys or self._ranges:
                    raise InvalidInput(
                        f"cannot shut the backend down: {len(self._keys)} handles and "
                        f"{len(self._ranges)} reservations are open"
                    )
                self._closed = True
                for worker in self._workers:
                    worker.close()

    def check(self) -> None:
        """Assert that what is recorded of each worker has one entry a plane of it (I4, I5)."""
        planes = [share.planes for share in self.shares]
        with self._lock:
            assert all([len(keys) for keys in everybody] == planes
                       for everybody in self._keys.values()), "I4: a plane is missing"  # fmt: skip
            assert all(len(a) == len(planes) for a in self._ranges.values()), (
                "I5: a rank is missing"
            )
            assert self._ranges.keys() == self._sizes.keys(), "I5: a range without a size"

    # --- one call to all -------------------------------------------------------------------------

    def _all(
        self, op: Op, values: _Values, *, undo: Op | None = None, keep_reply: bool = False
    ) -> list[list[Frame]]:
        """Ask all workers at once, each as often as it has planes. The replies, by worker.

        If one refuses, ``undo`` what was done, the last first, and raise. What is undone is named
        by the reply (``keep_reply``) or by the request.
        """
        if self._closed:
            raise ClosedError("the connection to the workers is closed")
        replies: list[list[Frame]] = [[] for _ in self._workers]
        done: list[tuple[Worker, tuple[int, ...]]] = []
        failure: KvcachedError | None = None
        for plane in range(max(map(len, values))):
            asked = []
            for rank, calls in enumerate(values):
                if plane < len(calls):
                    try:
                        self._workers[rank].send(op, calls[plane])
                    except KvcachedError as error:  # it has ended; the others will answer
                        failure = failure or error
                    else:
                        asked.append(rank)
            for rank in asked:
                try:
                    frame = self._workers[rank].receive()
                except KvcachedError as error:
                    failure = failure or error
                    continue
                replies[rank].append(frame)
                named = frame.values if keep_reply else values[rank][plane]
                done.append((self._workers[rank], named))
            if failure is not None:
                if undo is not None:
                    _undo(undo, done[::-1], failure)
                raise failure
        return replies

    def _same(self, *values: int) -> _Values:
        return [[values]] * len(self._workers)

    def _places(self, reservation: Reservation, page: int, handle: Handle) -> _Values:
        """Address, page and key of each plane of each worker."""
        pages = reservation.nbytes // self.page_bytes
        everybody = zip(
            self._addresses(reservation), self._keys_of(handle), self.shares, strict=True
        )
        return [
            [(address, (plane * pages + page) * share.pages, 0 if key is None else key)
             for plane, key in enumerate(keys)]
            for address, keys, share in everybody
        ]  # fmt: skip

    def _addresses(self, reservation: Reservation) -> tuple[int, ...]:
        addresses = self._ranges.get(reservation.address)
        if addresses is None or self._sizes[reservation.address] != reservation.nbytes:
            raise InvalidInput(f"no range of {reservation.nbytes} bytes is reserved at "
                               f"{reservation.address:#x}")  # fmt: skip
        return addresses

    def _keys_of(self, handle: Handle) -> list[list[int | None]]:
        keys = self._keys.get(handle)
        if keys is None:
            raise InvalidInput(f"handle {handle.key} was not created here, or is released")
        return keys

    def _translated(self, copies: Sequence[Copy], rank: int) -> list[tuple[int, ...]]:
        flat: list[int] = []
        for dst, src, nbytes in copies:
            (size,) = self._scaled(rank, nbytes)
            for to, source in zip(self._at(dst, rank), self._at(src, rank), strict=True):
                flat += (to, source, size)
        return [tuple(flat)]

    def _at(self, address: int, rank: int) -> list[int]:
        """An address, in each plane of ``rank``."""
        for base, addresses in self._ranges.items():
            if base <= address < base + self._sizes[base]:
                offset, plane_bytes = self._scaled(rank, address - base, self._sizes[base])
                return [addresses[rank] + plane * plane_bytes + offset
                        for plane in range(self.shares[rank].planes)]  # fmt: skip
        raise InvalidInput(f"{address:#x} lies in no range that was reserved here")

    def _scaled(self, rank: int, *sizes: int) -> list[int]:
        """Bytes of the leading rank's blocks, in those of a plane of ``rank``."""
        if any(size % self._most for size in sizes):
            raise InvalidInput(f"{sizes} bytes are not the same part of a block in all workers")
        return [size // self._most * self.shares[rank].pages for size in sizes]


def _undo(op: Op, done: Sequence[tuple[Worker, tuple[int, ...]]], cause: KvcachedError) -> None:
    try:
        for worker, values in done:
            worker.call(op, values)
    except KvcachedError as error:
        raise PoolBroken(
            f"the workers disagree about what is mapped: {error.message}; it was undone because "
            f"{cause.message}",
            hint="Restart the engine.",
        ) from cause


def _connect(address: str, name: str, patience: float) -> socket.socket:
    """A connection, as soon as somebody listens there."""
    until = time.monotonic() + patience
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            if time.monotonic() >= until:
                raise BackendUnavailable(f"{name} does not listen: {error}") from error
            time.sleep(0.02)
        else:
            return sock
