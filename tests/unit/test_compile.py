"""``torch.compile`` over the views of a host cache, with the backends that need no C++ compiler."""

import pytest

pytest.importorskip("torch")
from cache_rig import NO_ENV
from compiled import check_compiled_views

from kvcached import CacheSpec, KVCache
from kvcached.broker.budget import LocalBudget

SPEC = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=64, dtype="float32")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_sees_the_blocks_wherever_extents_come_and_go(backend):
    with KVCache(SPEC, max_tokens=1 << 14, budget=LocalBudget(1 << 28), config=NO_ENV) as cache:
        check_compiled_views(cache, backend)
