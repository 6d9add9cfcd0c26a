"""``CudaBackend.unback``: unmap and release in one go, each handle all or nothing, in order."""

import itertools
from contextlib import suppress

import pytest
from cache_rig import page_pool

from kvcached.errors import DriverError, InvalidInput, KvcachedError, PoolBroken
from kvcached.memory.cuda import CudaBackend
from kvcached.testing import FakeCudaDriver

NOTHING = dict.fromkeys(FakeCudaDriver().open_resources(), 0)
PLACES = [(4, 2), (1, 1), (2, 2), (7, 1)]


class Recorder(FakeCudaDriver):
    """Also writes down in which order it was called."""

    def __init__(self):
        super().__init__()
        self.order = []

    def enter(self, name, *, needs_context):
        self.order.append(name)
        super().enter(name, needs_context=needs_context)


@pytest.fixture(params=["machine code", "call by call"], autouse=True)
def way(request, monkeypatch):
    """Both ways to the driver: by its functions' addresses, and where it has none to give."""
    monkeypatch.setattr(FakeCudaDriver, "has_addresses", request.param == "machine code")
    return request.param


class Scene:
    """Four handles, mapped, each with contents of its own."""

    def __init__(self):
        self.driver = Recorder()
        self.backend = CudaBackend(driver=self.driver, zero="never")
        self.reservation = self.backend.reserve(8 * self.backend.page_bytes)
        handles = self.backend.back(self.reservation, PLACES)
        self.mapped = [(page, handle) for (page, _), handle in zip(PLACES, handles, strict=True)]
        for number, place in enumerate(self.places()):
            self.driver.write(place[0], bytes([number + 1]) * place[1])

    def places(self):
        page_bytes = self.backend.page_bytes
        for page, handle in self.mapped:
            yield self.reservation.address + page * page_bytes, handle.num_pages * page_bytes

    def is_whole(self, first=0):
        """Whether the handles from ``first`` on are mapped, readable, and hold what they did."""
        for number, (address, nbytes) in list(enumerate(self.places()))[first:]:
            assert self.driver.read(address, nbytes) == bytes([number + 1]) * nbytes
        self.backend.check()
        assert len(self.driver.memories) == len(self.driver.mappings) == len(PLACES) - first

    def finish(self, first=0):
        self.driver.heal()
        assert self.backend.unback(self.reservation, self.mapped[first:]).error is None
        self.backend.close(self.reservation)
        self.backend.shutdown()
        assert self.driver.open_resources() == NOTHING


def test_all_are_unmapped_before_the_first_is_released():
    scene = Scene()
    scene.driver.order.clear()
    assert scene.backend.unback(scene.reservation, scene.mapped) == (4, 0, None)
    assert scene.driver.order == ["cuMemUnmap"] * 3 + ["cuMemRelease"] * 4, "two are neighbours"
    assert scene.driver.used == 0
    scene.backend.check()
    with pytest.raises(InvalidInput, match="does not exist"):
        scene.backend.unback(scene.reservation, scene.mapped[:1])
    scene.finish(first=4)


def test_mistakes_never_reach_the_driver():
    scene = Scene()
    (page, handle), other = scene.mapped[0], scene.mapped[1]
    twice = scene.backend.reserve(2 * scene.backend.page_bytes)
    scene.backend.map(twice, 0, handle)
    before = scene.driver.calls.copy()
    for mapped in ([(page + 1, handle)], [other, (page, handle)], [other, other],
                   [other, (page, handle._replace(num_pages=1))]):  # fmt: skip
        with pytest.raises(InvalidInput):
            scene.backend.unback(scene.reservation, mapped)
    assert scene.driver.calls == before
    scene.backend.unmap(twice, 0, handle)
    scene.backend.close(twice)
    scene.is_whole()
    scene.finish()


@pytest.mark.parametrize(
    ("call", "fail_at", "at"),
    [("cuMemUnmap", 1, 0), ("cuMemUnmap", 2, 1), ("cuMemUnmap", 3, 3),
     *[("cuMemRelease", i + 1, i) for i in range(4)]],
)  # fmt: skip
def test_the_first_that_fails_and_those_after_it_are_as_they_were(call, fail_at, at):
    scene = Scene()
    scene.driver.fail(call, fail_at)
    gone, adrift, error = scene.backend.unback(scene.reservation, scene.mapped)
    assert (gone, adrift) == (at, 0)
    assert isinstance(error, DriverError)
    assert (error.call, error.status) == (call, "CUDA_ERROR_UNKNOWN")
    scene.is_whole(first=at)
    scene.finish(first=at)


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("again", range(3))
def test_what_cannot_be_mapped_again_is_adrift_and_released_at_the_end(call, again):
    scene = Scene()
    scene.driver.fail("cuMemRelease", 2)
    scene.driver.fail(call, again + 1)
    gone, adrift, error = scene.backend.unback(scene.reservation, scene.mapped)
    assert (gone, adrift) == (1, 3 - again), "the last is mapped first"
    assert isinstance(error, PoolBroken)
    scene.backend.check()
    for _, handle in scene.mapped[1 : 1 + adrift]:
        scene.backend.release(handle)
    scene.finish(first=1 + adrift)


@pytest.mark.parametrize("places", [[(0, 1)], [(2, 2), (0, 1)]])
@pytest.mark.parametrize("after", ["back", "unback"])
def test_an_interrupt_that_comes_when_the_calls_are_done_hides_none_of_them(
    places, after, way, monkeypatch
):
    driver = FakeCudaDriver()
    backend = CudaBackend(driver=driver, zero="never")
    reservation = backend.reserve(4 * backend.page_bytes)

    def interrupted(function):
        def call(*args):
            function(*args)
            raise KeyboardInterrupt

        return call

    owner = backend._find_native() or backend
    by_calls = way == "call by call"
    names = {"back": ["_back_by_calls"] if by_calls else ["_one", "_many"],
             "unback": ["_unback_by_calls"] if by_calls else ["_unback"]}  # fmt: skip
    handles = backend.back(reservation, places) if after == "unback" else []
    with monkeypatch.context() as patch:
        for name in names[after]:
            patch.setattr(owner, name, interrupted(getattr(owner, name)))
        if after == "back":
            with pytest.raises(KeyboardInterrupt):
                backend.back(reservation, places)
        else:
            mapped = [(page, handle) for (page, _), handle in zip(places, handles, strict=True)]
            gone, adrift, error = backend.unback(reservation, mapped)
            assert (gone, adrift, type(error)) == (len(places), 0, KeyboardInterrupt)
    backend.check()
    assert not driver.memories
    assert not driver.mappings
    backend.close(reservation)
    backend.shutdown()


@pytest.mark.parametrize("planes", [1, 2])
def test_a_shrink_that_fails_anywhere_keeps_the_rest(planes):
    """The N-th driver call fails: what is gone is given back, the others are as they were."""
    for fail_at in itertools.count(1):
        driver = FakeCudaDriver()
        pool = page_pool(CudaBackend(driver=driver, zero="never"), planes=planes, num_blocks=12)
        pool.budget.claim(12 * pool.geometry.page_group_bytes)
        extents = pool.grow([(0, 12)])
        assert len(extents) == 3
        driver.fail("*", fail_at)
        with suppress(KvcachedError):
            pool.shrink(extents)
        driver.heal()
        pool.check()
        pool.shrink([])
        left = list(pool.extents.values())
        assert left == [e for e in extents if e.handles]
        assert pool.backed_bytes == sum(e.pages for e in left) * pool.geometry.page_group_bytes
        assert pool.budget.claimed_bytes == pool.backed_bytes == driver.used
        assert pool.shrink(left) == pool.geometry.page_group_bytes * sum(e.pages for e in left)
        pool.check()
        pool.close()
        assert driver.used == 0
        if not driver.last_failed:
            assert fail_at == (3 + 1 if planes == 1 else 3 * 2 * planes) + 1, "each call has failed"
            return


def test_a_pool_that_could_not_undo_a_shrink_is_broken_until_it_is_closed():
    driver = FakeCudaDriver()
    pool = page_pool(CudaBackend(driver=driver, zero="never"), num_blocks=12)
    pool.budget.claim(12 * pool.geometry.page_group_bytes)
    extents = pool.grow([(0, 12)])
    driver.fail("cuMemRelease", 2)
    driver.fail("cuMemMap", sticky=True)
    with pytest.raises(PoolBroken):
        pool.shrink(extents)
    with pytest.raises(PoolBroken, match="broken"):
        pool.grow([(0, 1)])
    assert pool.budget.claimed_bytes == 8 * pool.geometry.page_group_bytes == driver.used
    driver.heal()
    pool.close()
    assert pool.budget.claimed_bytes == driver.used == 0
