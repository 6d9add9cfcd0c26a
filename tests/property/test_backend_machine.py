"""Every backend against one plain model, contents included: random lives, valid and mistaken."""

import ctypes

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from kvcached.errors import DriverError, InvalidInput, OutOfPages
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.host import HostBackend
from kvcached.testing import FakeBackend, FakeCudaDriver

CAPACITY_PAGES = 24
RANGE_PAGES = st.integers(1, 12)
PAGE_INDEX = st.integers(-1, 12)


class BackendMachine(RuleBasedStateMachine):
    """The model: per range a dict page -> (handle, page in handle), per handle a tag per page."""

    ranges = Bundle("ranges")
    handles = Bundle("handles")

    def __init__(self):
        super().__init__()
        self.backend, self.read, self.write = self.make()
        self.page = self.backend.page_bytes
        self.open = {}  # reservation -> {page: (handle, page in handle)}
        self.maps = {}  # (reservation, first page) -> handle
        self.tags = {}  # handle -> [tag of each page]
        self.tag = 0

    def refused(self, call):
        """The real backend refuses what the model knows to be a mistake."""
        with pytest.raises(InvalidInput):
            call()

    def mapped(self, handle):
        return handle in self.maps.values()

    @rule(target=ranges, num_pages=RANGE_PAGES)
    def reserve(self, num_pages):
        reservation = self.backend.reserve(num_pages * self.page)
        assert reservation not in self.open
        self.open[reservation] = {}
        return reservation

    @rule(target=handles, num_pages=st.integers(1, 4))
    def create(self, num_pages):
        used = sum(map(len, self.tags.values()))
        if used + num_pages > CAPACITY_PAGES:
            with pytest.raises(OutOfPages):
                self.backend.create(num_pages)
            return multiple()
        handle = self.backend.create(num_pages)
        assert handle not in self.tags
        self.tags[handle] = [0] * num_pages
        return handle

    @rule(reservation=ranges, page_index=PAGE_INDEX, handle=handles)
    def map(self, reservation, page_index, handle):
        pages = range(page_index, page_index + handle.num_pages)
        table = self.open.get(reservation)
        total = reservation.nbytes // self.page
        bad = table is None or handle not in self.tags or page_index < 0 or pages.stop > total
        if bad or any(page in table for page in pages):
            self.refused(lambda: self.backend.map(reservation, page_index, handle))
            return
        if self.mapped(handle) and not self.backend.can_alias:
            with pytest.raises(DriverError, match="mapped"):
                self.backend.map(reservation, page_index, handle)
            return
        self.backend.map(reservation, page_index, handle)
        table.update({page: (handle, i) for i, page in enumerate(pages)})
        self.maps[reservation, page_index] = handle

    @rule(reservation=ranges, page_index=PAGE_INDEX, handle=handles)
    def unmap_anything(self, reservation, page_index, handle):
        if self.maps.get((reservation, page_index)) != handle:
            self.refused(lambda: self.backend.unmap(reservation, page_index, handle))
        else:
            self.unmap(reservation, page_index)

    @rule(data=st.data())
    def unmap_something_mapped(self, data):
        if self.maps:
            key = data.draw(st.sampled_from(sorted(self.maps, key=lambda k: (k[0].address, k[1]))))
            self.unmap(*key)

    def unmap(self, reservation, page_index):
        handle = self.maps.pop((reservation, page_index))
        self.backend.unmap(reservation, page_index, handle)
        for page in range(page_index, page_index + handle.num_pages):
            del self.open[reservation][page]

    @rule(handle=handles)
    def release(self, handle):
        if handle not in self.tags or self.mapped(handle):
            self.refused(lambda: self.backend.release(handle))
        else:
            self.backend.release(handle)
            del self.tags[handle]

    @rule(reservation=ranges)
    def close(self, reservation):
        if self.open.get(reservation) != {}:
            self.refused(lambda: self.backend.close(reservation))
        else:
            self.backend.close(reservation)
            del self.open[reservation]

    @rule(handle=consumes(handles))
    def forget(self, handle):
        """Keeps the bundle from filling up with dead handles."""
        if handle in self.tags and not self.mapped(handle):
            self.release(handle)

    def some_page(self, data):
        places = [(r, page) for r, table in self.open.items() for page in sorted(table)]
        return data.draw(st.sampled_from(places)) if places else None

    @rule(data=st.data())
    def store(self, data):
        place = self.some_page(data)
        if place:
            reservation, page = place
            self.tag = self.tag % 250 + 1
            self.write(reservation.address + page * self.page, bytes([self.tag]) * self.page)
            handle, i = self.open[reservation][page]
            self.tags[handle][i] = self.tag

    @rule(data=st.data())
    def copy(self, data):
        source, target = self.some_page(data), self.some_page(data)
        if source and target:
            (r0, p0), (r1, p1) = source, target
            self.backend.copy(r1.address + p1 * self.page, r0.address + p0 * self.page, self.page)
            h0, i0 = self.open[r0][p0]
            h1, i1 = self.open[r1][p1]
            self.tags[h1][i1] = self.tags[h0][i0]

    @invariant()
    def books_and_contents_agree(self):
        self.backend.check()
        for reservation, table in self.open.items():
            for page, (handle, i) in table.items():
                start = reservation.address + page * self.page
                ends = self.read(start, 1) + self.read(start + self.page - 1, 1)
                assert ends == bytes([self.tags[handle][i]]) * 2
        for reservation, page_index in self.maps:
            assert page_index in self.open[reservation]

    def teardown(self):
        for reservation, page_index in list(self.maps):
            self.unmap(reservation, page_index)
        for handle in self.tags:
            self.backend.release(handle)
        for reservation in self.open:
            self.backend.close(reservation)
        self.ended()
        self.backend.shutdown()

    def ended(self):
        """Nothing may be left behind."""
        assert self.backend.resident_bytes() == 0


class FakeMachine(BackendMachine):
    can_alias = True

    def make(self):
        backend = FakeBackend(16, capacity_pages=CAPACITY_PAGES, can_alias=self.can_alias)
        return backend, backend.read, backend.write


class SingleFakeMachine(FakeMachine):
    can_alias = False


class AnonymousMachine(BackendMachine):
    memory = "anonymous"

    def make(self):
        backend = HostBackend(4096, capacity_bytes=CAPACITY_PAGES * 4096, memory=self.memory)
        if self.memory == "anonymous":
            backend._memory._huge = 8192  # so that handles have a middle and ends

        def write(address, data):
            ctypes.memmove(address, data, len(data))

        return backend, ctypes.string_at, write


class MemfdMachine(AnonymousMachine):
    memory = "memfd"


class CudaMachine(BackendMachine):
    def make(self):
        self.driver = FakeCudaDriver(16, capacity=CAPACITY_PAGES * 16)
        return CudaBackend(driver=self.driver), self.driver.read, self.driver.write

    def ended(self):
        assert self.driver.used == 0
        assert not self.driver.reservations
        assert not self.driver.mappings


MACHINES = [FakeMachine, SingleFakeMachine, AnonymousMachine, MemfdMachine, CudaMachine]


@pytest.mark.parametrize("machine", MACHINES)
def test_backend_equals_model(machine):
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=50))
