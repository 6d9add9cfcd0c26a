"""AnonymousMemory: pages that rest, are parked and moved; huge pages; the kernel's mappings."""

import ctypes
import errno
import os
import random

import pytest
from cache_rig import page_pool
from host_maps import PAGE, lines_of, maps_of, rss_of

from kvcached.config import HOST_MEMORY
from kvcached.errors import BackendUnavailable, DriverError, OutOfPages, PoolBroken
from kvcached.memory.host import HostBackend
from kvcached.memory.os_calls import MADV_HUGEPAGE, OsCalls

HUGE = 2 << 20


class Calls(OsCalls):
    """Counts calls by name; raises ``number`` at the calls that ``refuse`` picks."""

    def __init__(self):
        self.made, self.number, self.refuse = [], errno.ENOMEM, lambda name, args: False

    def _step(self, name, args):
        self.made.append(name)
        if self.refuse(name, args):
            raise OSError(self.number, os.strerror(self.number))


for _name in ("mmap", "munmap", "madvise", "mprotect", "move"):

    def _counted(self, *args, _name=_name):
        self._step(_name, args)
        return getattr(OsCalls, _name)(self, *args)

    setattr(Calls, _name, _counted)


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def backend(calls):
    backend = HostBackend(PAGE, calls=calls)
    yield backend
    calls.refuse = lambda name, args: False
    for state in list(backend._books.ranges.values()):
        for page_index, handle_state in list(state.handles.items()):
            backend.unmap(state.reservation, page_index, handle_state.handle)
        backend.close(state.reservation)
    for handle_state in list(backend._books.handles.values()):
        backend.release(handle_state.handle)
    backend.shutdown()
    assert not backend._memory._empty


def fill(reservation, page_index, value, pages=1):
    ctypes.memset(reservation.address + page_index * PAGE, value, pages * PAGE)


def holds(reservation, page_index, value, pages=1):
    found = ctypes.string_at(reservation.address + page_index * PAGE, pages * PAGE)
    return found == bytes([value]) * pages * PAGE


def test_giving_back_is_two_calls(backend, calls):
    reservation, handle = backend.reserve(8 * PAGE), backend.create(4)
    backend.map(reservation, 2, handle)
    fill(reservation, 2, 1, 4)
    calls.made.clear()
    backend.unmap(reservation, 2, handle)
    backend.release(handle)
    assert calls.made == ["mprotect", "mmap"]
    assert rss_of(reservation) == 0
    assert lines_of(reservation) == 1


def test_mapping_where_it_rests_moves_nothing(backend, calls):
    reservation, handle = backend.reserve(8 * PAGE), backend.create(2)
    backend.map(reservation, 2, handle)
    fill(reservation, 2, 9, 2)
    backend.unmap(reservation, 2, handle)
    calls.made.clear()
    backend.map(reservation, 2, handle)
    assert calls.made == ["mprotect"]
    assert holds(reservation, 2, 9, 2)


def test_a_handle_keeps_its_contents_wherever_it_goes(backend):
    """Over its own place, out of the way of others, out of a closed reservation."""
    reservation, handle = backend.reserve(8 * PAGE), backend.create(3)
    for page_index in (0, 1, 5, 3):
        backend.map(reservation, page_index, handle)
        assert page_index == 0 or holds(reservation, page_index, 7, 3)
        fill(reservation, page_index, 7, 3)
        backend.unmap(reservation, page_index, handle)
        assert maps_of(reservation) == [(8, "---p")]
        assert backend.resident_bytes() == rss_of_all(backend) == 3 * PAGE
    other = backend.create(8)
    backend.map(reservation, 0, other)
    fill(reservation, 0, 8, 8)
    assert backend.resident_bytes() == 11 * PAGE
    backend.unmap(reservation, 0, other)
    backend.close(reservation)
    backend.check()
    second = backend.reserve(16 * PAGE)
    backend.map(second, 0, handle)
    backend.map(second, 4, other)
    assert holds(second, 0, 7, 3)
    assert holds(second, 4, 8, 8)
    assert not backend._memory._empty


def rss_of_all(backend):
    return sum(rss_of(state.reservation) for state in backend._books.ranges.values()) + sum(
        backend._calls.resident(place.address, place.nbytes)
        for place in backend._memory._places.values()
        if place.parking
    )


def test_a_second_mapping_is_refused_before_anything_is_done(backend, calls):
    reservation, handle = backend.reserve(8 * PAGE), backend.create(1)
    backend.map(reservation, 0, handle)
    calls.made.clear()
    with pytest.raises(DriverError, match="KVCACHED_HOST_MEMORY=memfd") as caught:
        backend.map(reservation, 4, handle)
    assert caught.value.status == "ENOTSUP"
    assert calls.made == []


# --- huge pages -----------------------------------------------------------------------------------


def flags_of(address):
    """Flags of the mapping at an address, as ``smaps`` writes them."""
    inside = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            words = line.split()
            if not words[0].endswith(":"):
                start, end = (int(text, 16) for text in words[0].split("-"))
                inside = start <= address < end
            elif inside and words[0] == "VmFlags:":
                return set(words[1:])
    raise AssertionError(hex(address))


def test_only_the_aligned_middle_asks_for_huge_pages(backend):
    reservation, handle = backend.reserve(4 * HUGE), backend.create(2 * HUGE // PAGE + 4)
    first = (PAGE - reservation.address) % HUGE // PAGE  # one page past a border
    small = backend.create(4)
    backend.map(reservation, first, handle)
    start = reservation.address + first * PAGE
    backend.map(reservation, first + handle.num_pages, small)
    middle = flags_of(start + HUGE - PAGE)
    if "hg" not in middle:
        pytest.skip("a kernel without huge pages")
    assert flags_of(start + 2 * HUGE - 2 * PAGE) == middle
    for end in (start, start + HUGE - 2 * PAGE, start + handle.num_pages * PAGE - PAGE,
                start + handle.num_pages * PAGE):  # fmt: skip
        assert {"nh", "dc"} <= flags_of(end)
        assert "hg" not in flags_of(end)
    assert {"hg", "dc"} <= middle
    fill(reservation, first, 3, handle.num_pages)
    assert backend.resident_bytes() == handle.num_pages * PAGE
    backend.unmap(reservation, first, handle)
    backend.release(handle)
    assert backend.resident_bytes() == rss_of(reservation) == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM])
def test_a_kernel_without_huge_pages_will_do(backend, calls, number):
    reservation, handle = backend.reserve(2 * HUGE), backend.create(2 * HUGE // PAGE)
    calls.number = number
    calls.refuse = lambda name, args: name == "madvise" and args[2] >= MADV_HUGEPAGE
    if number == errno.EINVAL:
        backend.map(reservation, 0, handle)
        fill(reservation, 0, 1)
    else:
        with pytest.raises(OutOfPages):
            backend.map(reservation, 0, handle)
        assert lines_of(reservation) == 1


@pytest.fixture
def parted(backend):
    """A handle of three parts, and contents in each: ends of a page, a middle of four."""
    backend._memory._huge = 2 * PAGE
    reservation, handle = backend.reserve(16 * PAGE), backend.create(6)
    first = 1 + (reservation.address // PAGE) % 2
    backend.map(reservation, first, handle)
    assert len(backend._memory._places[handle.key].parts) == 3
    fill(reservation, first, 5, 6)
    return reservation, first, handle


def test_a_protect_that_fails_halfway_is_undone(backend, calls, parted):
    reservation, first, handle = parted

    def halfway(name, args):
        if name != "mprotect" or args[2]:
            return False
        OsCalls.mprotect(calls, args[0], PAGE, 0)
        return True

    calls.refuse = halfway
    with pytest.raises(OutOfPages, match="cannot unmap pages"):
        backend.unmap(reservation, first, handle)
    assert holds(reservation, first, 5, 6)
    calls.refuse = lambda name, args: name == "mprotect"
    with pytest.raises(PoolBroken, match="half changed"):
        backend.unmap(reservation, first, handle)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("hole", [False, True])
def test_a_move_that_fails_halfway_is_undone(backend, calls, parted, fail_at, hole):
    reservation, first, handle = parted
    backend.unmap(reservation, first, handle)
    count = [0]

    def nth(name, args):
        if name == "move":
            count[0] += 1
            if hole and count[0] == fail_at:  # the kernel unmaps the target first
                OsCalls.munmap(calls, args[2], args[1])
            return count[0] == fail_at
        return False

    calls.refuse = nth
    with pytest.raises(OutOfPages, match="cannot move pages"):
        backend.map(reservation, 9, handle)
    assert maps_of(reservation) == [(16, "---p")]
    backend.check()
    backend.map(reservation, first, handle)
    assert holds(reservation, first, 5, 6)
    assert rss_of(reservation) == 6 * PAGE


def test_a_move_that_cannot_be_undone_says_so(backend, calls, parted):
    reservation, first, handle = parted
    backend.unmap(reservation, first, handle)
    moves = []
    calls.refuse = lambda name, args: name == "move" and (moves.append(1) or len(moves) > 1)
    with pytest.raises(PoolBroken, match="moving back fails"):
        backend.map(reservation, 9, handle)


def test_addresses_of_a_parking_that_stay_are_given_back_later(backend, calls, parted):
    reservation, first, handle = parted
    backend.unmap(reservation, first, handle)
    other = backend.create(1)
    backend.map(reservation, first, other)  # parks
    calls.refuse = lambda name, args: name == "munmap"
    backend.map(reservation, 9, handle)
    assert len(backend._memory._empty) == 1
    assert holds(reservation, 9, 5, 6)


def test_a_kernel_that_cannot_move_memory_is_named(calls):
    calls.number = errno.EINVAL
    calls.refuse = lambda name, args: name == "move"
    with pytest.raises(BackendUnavailable, match=r"Linux 5\.7"):
        HostBackend(PAGE, calls=calls)


# --- many small extents, and the pool over it -----------------------------------------------------


def test_mappings_of_small_extents_are_bounded(backend):
    """Neighbours that were touched apart need not merge, but each costs one mapping at most."""
    reservation = backend.reserve(2000 * PAGE)
    order = list(range(2000))
    random.Random(1).shuffle(order)
    handles = {}
    for page_index in order:
        handles[page_index] = backend.create(1)
        backend.map(reservation, page_index, handles[page_index])
        ctypes.memset(reservation.address + page_index * PAGE, 1, 1)
    assert lines_of(reservation) < 1000
    assert maps_of(reservation) == [(2000, "rw-p")]
    for page_index in order:
        backend.unmap(reservation, page_index, handles[page_index])
        backend.release(handles[page_index])
    assert lines_of(reservation) == 1


@pytest.mark.parametrize("memory", HOST_MEMORY)
@pytest.mark.parametrize("planes", [1, 2])
def test_a_pool_splits_and_shrinks_in_place(memory, planes):
    """Through ``PagePool``: the blocks that stay keep every byte, the rest goes back."""
    backend = HostBackend(PAGE, memory=memory)
    pool = page_pool(backend, block_bytes=PAGE, planes=planes, num_blocks=64, longest=48)
    for _ in range(2):  # the second time over addresses that were used before
        pool.budget.claim(40 * planes * PAGE)
        (extent,) = pool.grow([(3, 40)])
        places = [(plane, page) for plane in range(planes) for page in range(3, 43)]
        for plane, page in places:
            ctypes.memset(pool.address_of(page, plane), page + plane * 50, PAGE)
        keep = [(5, 2), (20, 9), (42, 1)]
        pool.budget.claim(pool.bytes_of(keep), transient=True)
        pieces = pool.split([(extent, keep)])
        kept = [page for first, count in keep for page in range(first, first + count)]
        for plane, page in places:
            if page in kept:
                found = ctypes.string_at(pool.address_of(page, plane), PAGE)
                assert found == bytes([page + plane * 50]) * PAGE
        assert backend.resident_bytes() == len(kept) * planes * PAGE
        backend.check()
        pool.check()
        pool.shrink(pieces)
        assert backend.resident_bytes() == 0
        backend.check()
    pool.close()
    backend.shutdown()
