"""``CudaBackend.back``: create and map in one go, all or nothing, whatever call fails."""

import itertools

import pytest
from cache_rig import stop_caretaker, without_counters

from kvcached import CacheSpec, Config, KVCache
from kvcached.broker.budget import LocalBudget
from kvcached.errors import DriverError, InvalidInput, KvcachedError, OutOfPages, PoolBroken
from kvcached.memory.base import Backing
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.mappings import joined
from kvcached.testing import FailingBackend, FakeBackend, FakeCudaDriver

NOTHING = dict.fromkeys(FakeCudaDriver().open_resources(), 0)
PLACES = [(4, 2), (1, 1), (2, 2), (7, 1)]
SPEC = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=2, dtype="int8", block_size=8)


@pytest.fixture(params=["machine code", "call by call"], autouse=True)
def way(request, monkeypatch):
    """Both ways to the driver: by its functions' addresses, and where it has none to give."""
    monkeypatch.setattr(FakeCudaDriver, "has_addresses", request.param == "machine code")
    return request.param


def made(**options):
    driver = FakeCudaDriver(**options)
    backend = CudaBackend(driver=driver, zero="always" if options.get("dirt") else "never")
    return driver, backend, backend.reserve(8 * backend.page_bytes)


def drop(backend, reservation, places, handles):
    for (page, _), handle in zip(places, handles, strict=True):
        backend.unmap(reservation, page, handle)
        backend.release(handle)
    backend.close(reservation)
    backend.shutdown()


@pytest.mark.parametrize("dirt", [0, 0xAB])
def test_what_is_adjacent_gets_its_access_in_one_call(dirt):
    driver, backend, reservation = made(dirt=dirt)
    handles = backend.back(reservation, PLACES)
    assert [handle.num_pages for handle in handles] == [count for _, count in PLACES]
    assert driver.calls["cuMemCreate"] == driver.calls["cuMemMap"] == 4
    assert driver.calls["cuMemSetAccess"] == len(joined(PLACES)) == 2
    for page, count in joined(PLACES):
        start, nbytes = reservation.address + page * backend.page_bytes, count * backend.page_bytes
        assert driver.read(start, nbytes) == bytes(nbytes), "cleared, if that is the policy"
    backend.check()
    drop(backend, reservation, PLACES, handles)
    assert driver.open_resources() == NOTHING


def test_mistakes_never_reach_the_driver():
    driver, backend, reservation = made()
    handles = backend.back(reservation, [(2, 2)])
    before = driver.calls.copy()
    for places in ([(3, 1)], [(1, 2)], [(7, 2)], [(-1, 1)], [(0, 0)], [(0, 1), (8, 1)]):
        with pytest.raises(InvalidInput):
            backend.back(reservation, places)
    backend.check()
    assert driver.calls == before
    drop(backend, reservation, [(2, 2)], handles)


@pytest.mark.parametrize("dirt", [0, 0xAB])
def test_the_nth_call_fails_and_nothing_has_happened(dirt):
    failed_in = set()
    for fail_at in itertools.count(1):
        driver, backend, reservation = made(dirt=dirt)
        before = driver.open_resources()
        driver.fail("*", fail_at)
        try:
            handles = backend.back(reservation, PLACES)
        except KvcachedError:
            failed_in.add(driver.last_failed)
            backend.check()
            # A pop that fails leaves the context on the thread's stack: nobody can mend that.
            assert driver.last_failed == "cuCtxPopCurrent" or driver.open_resources() == before
            handles = backend.back(reservation, PLACES)
            drop(backend, reservation, PLACES, handles)
            continue
        break
    assert {"cuMemCreate", "cuMemMap", "cuMemSetAccess"} <= failed_in
    assert ("cuMemsetD8Async" in failed_in) == bool(dirt)


def test_without_memory_it_says_so_and_gives_back_what_it_had():
    driver, backend, reservation = made(capacity=4 * 64)
    with pytest.raises(OutOfPages, match="cuMemCreate"):
        backend.back(reservation, PLACES)
    assert driver.used == 0
    drop(backend, reservation, [(0, 4)], backend.back(reservation, [(0, 4)]))


@pytest.mark.parametrize("call", ["cuMemUnmap", "cuMemRelease"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_cannot_be_undone_goes_when_the_reservation_is_closed(call, at):
    driver, backend, reservation = made()
    driver.fail("cuMemSetAccess")
    driver.fail(call, at, sticky=True)
    with pytest.raises(PoolBroken, match="could not be given back") as caught:
        backend.back(reservation, PLACES)
    assert caught.value.hint
    backend.check()
    with pytest.raises(KvcachedError, match=call):
        backend.close(reservation)
    driver.heal()
    backend.close(reservation)
    backend.shutdown()
    assert driver.open_resources() == NOTHING


def test_a_cache_whose_growth_cannot_be_undone_is_broken_until_it_is_closed():
    driver, budget = FakeCudaDriver(), LocalBudget(1 << 16)
    backend = CudaBackend(driver=driver, zero="never")
    cache = KVCache(SPEC, backend=backend, budget=budget, max_tokens=512,
                    config=Config(broker=False, ahead="0"))  # fmt: skip
    sequence = cache.new_sequence()
    driver.fail("cuMemSetAccess")
    driver.fail("cuMemUnmap", sticky=True)
    with pytest.raises(PoolBroken):
        cache.extend(sequence, 8 * 4)
    with pytest.raises(PoolBroken, match="broken"):
        cache.extend(sequence, 8)
    assert budget.claimed_bytes == 5 * SPEC.block_bytes, "I8: the memory is not back"
    driver.heal()
    cache.close()
    assert budget.claimed_bytes == 0
    backend.shutdown()
    assert driver.open_resources() == NOTHING


@pytest.mark.parametrize("layout", ["cross_layer", "per_layer"])
def test_growth_that_fails_anywhere_leaves_the_cache_as_it_was(layout):
    spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, dtype="int8", block_size=8,
                     layout=layout)  # fmt: skip
    for fail_at in itertools.count(1):
        driver = FakeCudaDriver()
        backend = CudaBackend(driver=driver, zero="never")
        config = Config(broker=False, ahead="0", max_handle="512")
        with KVCache(spec, backend=backend, budget=LocalBudget(1 << 16), max_tokens=1024,
                     config=config) as cache:  # fmt: skip
            stop_caretaker(cache)
            cache._blocks.clock = lambda: 0.0
            sequence = cache.new_sequence()
            before = without_counters(cache.stats())
            driver.fail("*", fail_at)
            try:
                cache.extend(sequence, 8 * 20)
            except KvcachedError:
                assert without_counters(cache.stats()) == before, f"I6: call {fail_at}"
                cache.check()
                cache.extend(sequence, 8 * 20)
                failed = True
            else:
                failed = False
            cache.check()
        backend.shutdown()
        assert driver.open_resources() == NOTHING
        if not failed:
            assert fail_at > 6
            return


def test_a_wrapper_sees_each_call():
    assert isinstance(CudaBackend(driver=FakeCudaDriver()), Backing)
    assert not isinstance(FakeBackend(), Backing)
    assert not isinstance(FailingBackend(CudaBackend(driver=FakeCudaDriver())), Backing)


def test_machine_code_makes_the_calls_where_the_driver_has_addresses(way):
    driver, backend, reservation = made()
    for places in ([(0, 1)], [(2, 2), (4, 1), (7, 1)]):
        handles = backend.back(reservation, places)
        assert (backend._native is not None) == (way == "machine code")
        assert bool(driver.entries) == (way == "machine code")
        natives = [backend._books.handles[handle.key].native for handle in handles]
        assert natives == list(driver.memories)[-len(places) :], "the handles are the driver's own"
    assert driver.calls["cuMemCreate"] == driver.calls["cuMemMap"] == 4
    assert driver.calls["cuMemSetAccess"] == 3


@pytest.mark.parametrize("places", [[(3, 2)], PLACES])
@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_an_error_names_the_call_and_what_it_was_for(call, places):
    driver, backend, reservation = made()
    driver.fail(call, len(joined(places)) if call == "cuMemSetAccess" else len(places))
    with pytest.raises(DriverError) as caught:
        backend.back(reservation, places)
    page, count = joined(places)[-1] if call == "cuMemSetAccess" else places[-1]
    nbytes = count * backend.page_bytes
    where = f"({hex(reservation.address + page * backend.page_bytes)}, {hex(nbytes)}"
    assert (caught.value.call, caught.value.status) == (call, "CUDA_ERROR_UNKNOWN")
    assert caught.value.message.startswith(f"{call}({hex(nbytes)}" if call == "cuMemCreate"
                                           else call + where)  # fmt: skip


def test_handles_that_others_may_import_are_made_call_by_call(way):
    driver = FakeCudaDriver()
    backend = CudaBackend(driver=driver, exportable=True, zero="never")
    reservation = backend.reserve(8 * backend.page_bytes)
    driver.fail("cuMemCreate", status="CUDA_ERROR_NOT_PERMITTED")
    backend.back(reservation, PLACES)
    assert not backend.exportable, "the driver did not allow it"
    assert driver.calls["cuMemCreate"] == len(PLACES) + 1
    backend.back(reservation, [(0, 1)])
    assert (backend._native is not None) == (way == "machine code"), "and now it may"
