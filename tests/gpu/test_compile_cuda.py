"""``torch.compile`` (inductor) over the views of a cache on a GPU."""

from __future__ import annotations

import pytest
import torch
from compiled import check_compiled_views

from kvcached import CacheSpec, Config, KVCache
from kvcached.broker.budget import LocalBudget

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compile_here(monkeypatch):
    """In this process: inductor's own workers would outlive the test."""
    from torch._inductor import config

    monkeypatch.setattr(config, "compile_threads", 1)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("layout", ["cross_layer", "per_layer"])
def test_compiled_code_sees_the_blocks_wherever_extents_come_and_go(backend, layout):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    spec = CacheSpec(num_layers=4, num_kv_heads=2, head_dim=64, dtype="float16", layout=layout)
    with KVCache(spec, device="cuda", max_tokens=1 << 18, budget=LocalBudget(2 << 30),
                 config=Config(broker=False)) as cache:  # fmt: skip
        check_compiled_views(cache, backend)
