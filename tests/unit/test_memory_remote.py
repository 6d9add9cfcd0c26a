"""Memory in other processes: the contract of a backend, over one connection and over several."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import socket
import struct

import pytest

from kvcached.errors import (
    BackendUnavailable,
    DriverError,
    InvalidInput,
    OutOfPages,
    PoolBroken,
    ProtocolError,
)
from kvcached.memory.adopted import Adopted
from kvcached.memory.host import HostBackend
from kvcached.memory.remote import RemoteBackend, Share, Worker
from kvcached.memory.serving import BackendServer
from kvcached.memory.wire import HEADER, MAGIC, Frame, Op, address_of, decode, encode
from kvcached.testing import CLAUSES, FailingBackend, check_memory_backend

PAGE = 64 << 10
_owners = itertools.count(1 << 30)  # as if they were process ids: none that is one


class Rig:
    """Servers in this process, one a rank, and the client's view of them."""

    def __init__(self, ranks=1, wrap=lambda backend: backend, memory="anonymous", shares=None):
        self.owner = next(_owners)
        self.settled = 0
        self.hosts = [HostBackend(PAGE, memory=memory) for _ in range(ranks)]
        self.backends = [wrap(host) for host in self.hosts]
        self.servers = [
            BackendServer(backend, self.owner, rank, self.describe, self.settle)
            for rank, backend in enumerate(self.backends)
        ]
        self.workers = [Worker(self.owner, rank) for rank in range(ranks)]
        self.backend = RemoteBackend(self.workers, shares)

    def describe(self):
        return {"page_bytes": PAGE, "device": "cpu", "can_alias": self.hosts[0].can_alias}

    def settle(self):
        self.settled += 1

    def close(self):
        for worker in self.workers:
            worker.close()
        for server in self.servers:
            server.close()
        for host in self.hosts:
            with contextlib.suppress(InvalidInput):  # a test may leave it in any state
                host.shutdown()


@pytest.fixture
def rig(request):
    rigs = []

    def make(*args, **kwargs):
        rigs.append(Rig(*args, **kwargs))
        return rigs[-1]

    yield make
    for made in rigs:
        made.close()


@pytest.mark.parametrize(
    ("ranks", "memory", "shares"),
    [
        (1, "anonymous", None),
        (3, "anonymous", None),
        (2, "memfd", None),
        (2, "anonymous", [Share(1, 2), Share(1, 3)]),
        (2, "anonymous", [Share(3, 1), Share(1, 4)]),
    ],
)
def test_the_contract_of_a_backend(rig, monkeypatch, ranks, memory, shares):
    if shares:  # then only parts of blocks can be copied: bytes that all workers have
        monkeypatch.delitem(CLAUSES, "copy copies")

    def place(backend, address):  # in the worker that holds most
        (base,) = (b for b, size in backend._sizes.items() if b <= address < b + size)
        return backend._ranges[base][backend._lead] + address - base

    ran = check_memory_backend(
        lambda: rig(ranks, memory=memory, shares=shares).backend,
        read=lambda backend, address, n: ctypes.string_at(place(backend, address), n),
        write=lambda backend, address, data: ctypes.memmove(
            place(backend, address), data, len(data)
        ),
    )
    assert ran == tuple(CLAUSES)


def test_every_rank_has_its_share_behind_a_page(rig):
    shares = [Share(2), Share(1, 3), Share()]
    made = rig(3, shares=shares)
    backend = made.backend
    assert backend.page_bytes == 3 * PAGE
    r = backend.reserve(8 * backend.page_bytes)
    bases = [server_range(made, rank) for rank in range(3)]
    assert 0 <= r.address - bases[1] < backend.page_bytes
    assert r.address % backend.page_bytes == 0
    a, b = backend.create(2), backend.create(1)
    backend.map(r, 1, a)
    backend.map(r, 5, b)
    backend.check()
    places = [[1, 9], [3], [1]]  # pages behind page 1: in two planes, three in one place, one
    for base, pages, share in zip(bases, places, shares, strict=True):
        for number, page in enumerate(pages):
            ctypes.memset(base + page * PAGE, 65 + number, share.pages * PAGE)
    half = backend.page_bytes // 2
    backend.copy(r.address + 5 * backend.page_bytes, r.address + backend.page_bytes + half, half)
    for base, pages, share in zip(bases, places, shares, strict=True):
        for number, page in enumerate(pages):
            got = ctypes.string_at(base + (page + 4 * share.pages) * PAGE, share.pages * PAGE // 2)
            assert got == bytes([65 + number]) * len(got)
    with pytest.raises(InvalidInput, match="not the same part"):
        backend.copy(r.address + 1, r.address + 3 * PAGE, 3)
    for page, handle in ((1, a), (5, b)):
        backend.unmap(r, page, handle)
        backend.release(handle)
    backend.close(r)
    backend.shutdown()


def test_what_is_there_is_counted_in_pages_of_all(rig, monkeypatch):
    made = rig(2, shares=[Share(2), Share(1)])
    for host, pages in zip(made.hosts, (10, 7), strict=True):
        monkeypatch.setattr(host, "available", lambda pages=pages: pages * PAGE)
    assert made.backend.available() == 5 * made.backend.page_bytes


def test_every_rank_backs_the_same_pages_and_copies_at_its_own_addresses(rig):
    made = rig(2)
    backend = made.backend
    r = backend.reserve(8 * PAGE)
    a, b = backend.create(2), backend.create(1)
    backend.map(r, 1, a)
    backend.map(r, 5, b)
    bases = [server_range(made, rank) for rank in range(2)]
    for rank, base in enumerate(bases):
        ctypes.memset(base + PAGE, 65 + rank, PAGE)
    backend.copy(r.address + 5 * PAGE, r.address + PAGE, PAGE)
    for rank, base in enumerate(bases):
        assert ctypes.string_at(base + 5 * PAGE, 4) == bytes([65 + rank]) * 4
    with pytest.raises(InvalidInput, match="lies in no range"):
        backend.copy(16, r.address, 8)
    backend.settle()
    assert made.settled == 2
    backend.check()
    for page, handle in ((1, a), (5, b)):
        backend.unmap(r, page, handle)
        backend.release(handle)
    backend.close(r)
    assert all(host.available() > 0 for host in made.hosts)
    backend.shutdown()


def fail_next(backend, call):
    backend.only, backend.fail_at = frozenset({call}), backend.seen + 1


def server_range(made, rank):
    (reservation,) = made.servers[rank]._ranges.values()
    return reservation.address


@pytest.mark.parametrize("shares", [None, [Share(2), Share(3), Share(3)]])
@pytest.mark.parametrize("call", ["reserve", "create", "map", "unmap"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_when_one_rank_refuses_nothing_has_happened_on_any(rig, call, bad, shares):
    made = rig(3, wrap=FailingBackend, shares=shares)
    backend = made.backend
    r = backend.reserve(4 * backend.page_bytes)
    handle = backend.create(1)
    if call == "unmap":
        backend.map(r, 0, handle)
    fail_next(made.backends[bad], call)
    made.backends[bad].fail_at += bad if shares and call != "reserve" else 0  # in a later plane
    with pytest.raises((OutOfPages, DriverError)):
        {
            "reserve": lambda: backend.reserve(8 * backend.page_bytes),
            "create": lambda: backend.create(1),
            "map": lambda: backend.map(r, 0, handle),
            "unmap": lambda: backend.unmap(r, 0, handle),
        }[call]()
    backend.check()
    for host in made.hosts:
        host.check()
    if call != "unmap":
        backend.map(r, 0, handle)
    backend.unmap(r, 0, handle)
    backend.release(handle)
    backend.close(r)
    backend.shutdown()
    for host in made.hosts:
        host.shutdown()  # raises if anything is left


def test_a_release_that_one_rank_refuses_can_be_tried_again(rig):
    made = rig(2, wrap=FailingBackend)
    handle = made.backend.create(1)
    fail_next(made.backends[1], "release")
    with pytest.raises(DriverError):
        made.backend.release(handle)
    made.backend.release(handle)
    for host in made.hosts:
        host.shutdown()


def test_a_failure_that_cannot_be_undone_says_that_the_ranks_disagree(rig):
    made = rig(2, wrap=FailingBackend)
    fail_next(made.backends[1], "create")
    fail_next(made.backends[0], "release")
    with pytest.raises(PoolBroken, match="disagree"):
        made.backend.create(1)


def test_a_worker_that_ends_is_an_error_with_its_name(rig):
    made = rig()
    made.servers[0].close()
    with pytest.raises(BackendUnavailable, match=f"worker 0 of engine {made.owner}"):
        made.backend.create(1)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_worker_that_ends_leaves_nothing_with_the_others(rig, bad):
    made = rig(3)
    handle = made.backend.create(1)
    made.workers[bad].close()
    for _ in range(2):  # the others still answer what they are asked
        with pytest.raises(BackendUnavailable, match=f"worker {bad} of engine"):
            made.backend.create(2)
    for rank, server in enumerate(made.servers):
        assert len(server._handles) == 1, rank
    made.backend.check()
    assert handle in made.backend._keys


def test_the_server_outlives_its_client_and_takes_the_next_one(rig):
    made = rig()
    made.workers[0].close()
    again = Worker(made.owner, 0)
    assert again.call(Op.HELLO).body["page_bytes"] == PAGE
    again.close()


def test_nobody_listens():
    with pytest.raises(BackendUnavailable, match="does not listen"):
        Worker(next(_owners), 0, patience=0.05)


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 10, b"x" * HEADER.size, HEADER.pack(MAGIC, 9, Op.MAP, 0, 0, 0),
     HEADER.pack(MAGIC, 1, 99, 0, 0, 0), HEADER.pack(MAGIC, 1, Op.MAP, 0, 3, 0) + b"12",
     HEADER.pack(MAGIC, 1, Op.HELLO, 0, 0, 0) + b"[1]",
     HEADER.pack(MAGIC, 1, Op.HELLO, 0, 0, 0) + b"{"],
)  # fmt: skip
def test_what_is_no_message_is_refused(data):
    with pytest.raises(ProtocolError):
        decode(data)


def test_a_hostile_client_ends_its_own_connection_only(rig):
    made = rig()
    made.workers[0].close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address_of(made.owner, 0))
        sock.send(struct.pack("<QQ", 1, 2))
        assert not sock.recv(100)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address_of(made.owner, 0))
        for op, values in ((Op.MAP, (1,)), (Op.MAP, (1, 2, 3)), (Op.RELEASE, (7,)),
                           (Op.COPY, (1, 2)), (Op.UNMAP, (1, 2, 3)), (Op.CLOSE, (5,))):  # fmt: skip
            sock.send(encode(Frame(op, 1, values=values)))
            assert decode(sock.recv(8192)).status
    made.hosts[0].check()


def test_an_adopted_range_is_handed_out_once_and_stays():
    host = HostBackend(PAGE)
    r = host.reserve(4 * PAGE)
    backend = Adopted(host, r)
    assert backend.reserve(4 * PAGE) == r
    other = backend.reserve(4 * PAGE)
    assert other != r
    backend.close(other)
    backend.close(r)
    with pytest.raises(InvalidInput):
        backend.close(r)
    assert backend.reserve(4 * PAGE) == r  # it was not closed
    backend.close(r)
    host.close(r)
    host.shutdown()


def test_no_socket_is_left():
    made = Rig(2)
    made.close()
    with open("/proc/net/unix", encoding="utf-8") as file:
        assert address_of(made.owner, 0).removeprefix("\0") not in file.read()
