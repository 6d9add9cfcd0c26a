"""What vLLM's FlashInfer asks of a cache, of the views that elastic memory gives: never run here.

Its wrappers take one view a layer, in which K and V of a page have the same strides and rows
follow each other; how pages lie to each other is told by their stride.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from kvcached.engines.vllm import allocation, seams
from kvcached.testing import FakeBackend

pytestmark = pytest.mark.vllm
LAYERS, BLOCKS, SIZE, HEADS, DIM = ["a", "b", "c"], 7, 16, 2, 64


def test_it_knows_the_layouts_with_heads_outside_on_every_gpu():
    source = seams.installed_source("vllm.v1.attention.backends.flashinfer")
    body = source.split("def supported_kv_cache_layouts")[1].split("def ")[0]
    assert set(re.findall(r"KVCacheLayout\.(\w+)", body)) == {"LBHNC", "BLHNC"}
    assert "super().supported_kv_cache_layouts()" in body, "and elsewhere, any"
    assert "kv_cache_layout.layer_view_order" in source


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_a_layers_view_is_one_that_its_wrappers_take(layout):
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=HEADS, head_size=DIM,
                             dtype=torch.bfloat16)  # fmt: skip
    page, order = spec.page_size_bytes, KVCacheLayout[layout]
    strides = (page * BLOCKS, page) if order.is_layer_compact else (page, page * len(LAYERS))
    config = KVCacheConfig(
        kv_cache_tensors=[KVCacheTensor(page * BLOCKS * len(LAYERS), list(LAYERS), *strides)],
        kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)], num_blocks=BLOCKS,
    )  # fmt: skip
    (_, geometry), tensors = allocation.place(config, lambda _: FakeBackend(4096))
    raw = torch.zeros(geometry.reserved_bytes, dtype=torch.int8)
    with allocation.in_place_of_zeros(raw, tensors[0].size):
        views = allocate_kv_cache(replace(config, kv_cache_tensors=tensors), "cpu", order)
    assert list(views) == LAYERS
    for view in views.values():
        physical = view.permute(*order.layer_view_order)
        keys, values = physical.split(DIM, dim=-1)
        assert keys.shape == values.shape == (BLOCKS, *physical.shape[1:3], DIM)
        assert keys.stride() == values.stride()
        assert keys.stride()[1:] == (physical.shape[2] * 2 * DIM, 2 * DIM, 1)
        assert keys.stride(0) * keys.element_size() == strides[1]
