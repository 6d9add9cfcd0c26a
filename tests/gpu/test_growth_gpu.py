"""Growth by the journal on a real driver: no byte is lost, no handle, and its errors are named."""

import random

import pytest
import torch

from kvcached.blocks import BlockPool
from kvcached.broker.budget import LocalBudget
from kvcached.errors import OutOfPages
from kvcached.layout import Geometry
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.views import tensor_from_address
from kvcached.pages import PagePool

pytestmark = pytest.mark.gpu
BLOCK, BLOCKS = 2 << 20, 4096


@pytest.fixture
def backend():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.zeros(1, device="cuda")
    backend = CudaBackend("cuda:0")
    yield backend
    backend.shutdown()


def make_pool(backend, budget=None):
    geometry = Geometry(BLOCK, 1, BLOCKS, backend.page_bytes)
    budget = budget or LocalBudget(BLOCK * BLOCKS)
    pool = BlockPool(PagePool(backend, geometry, budget, (64 << 20) // backend.page_bytes, 32))
    assert pool._grow.__name__ == "grow", "the driver's functions have addresses"
    return pool


@pytest.mark.timeout(120)
def test_blocks_keep_their_bytes_while_others_come_and_go(backend):
    pool, rng, held = make_pool(backend), random.Random(1), {}
    whole = tensor_from_address(pool.pages.address_of(0), BLOCK * BLOCKS, "cuda:0")
    for step in range(600):
        what = rng.random()
        if what < 0.6 and len(held) < 400:
            for block in pool.alloc(rng.choice([1, 1, 1, 1, 2, 40])).tolist():
                assert block not in held
                held[block] = rng.randrange(1, 255)
                whole[block * BLOCK : (block + 1) * BLOCK].fill_(held[block])
        elif what < 0.9 and held:
            gone = rng.sample(sorted(held), min(len(held), rng.randint(1, 30)))
            pool.free(pool.validate(gone))
            for block in gone:
                del held[block]
        else:
            torch.cuda.synchronize()
            pool.trim(may_split=rng.random() < 0.5)
        if step % 20 == 0:
            pool.check()
            backend.check()
            equal = [(whole[b * BLOCK : (b + 1) * BLOCK] == v).all() for b, v in held.items()]
            assert all(torch.stack(equal).tolist()) if equal else True
    assert pool.pages.splits.count > 0
    torch.cuda.synchronize()
    pool.close()


def test_a_full_device_is_out_of_pages_and_nothing_has_changed(backend):
    free, _ = torch.cuda.mem_get_info()
    geometry = Geometry(BLOCK, 1, free // BLOCK + 4096, backend.page_bytes)
    pool = BlockPool(PagePool(backend, geometry, LocalBudget(1 << 50), (4 << 30) // BLOCK))
    while True:
        try:
            pool.alloc(2048)
        except OutOfPages:
            break
    before = pool.pages.backed_bytes, pool.num_used, pool.pages.budget.claimed_bytes
    with pytest.raises(OutOfPages, match="cuMemCreate says CUDA_ERROR_OUT_OF_MEMORY"):
        pool.alloc(2048)
    assert (pool.pages.backed_bytes, pool.num_used, pool.pages.budget.claimed_bytes) == before
    pool.check()
    backend.check()
    pool.close()
    assert torch.cuda.mem_get_info()[0] > free - (64 << 20)
