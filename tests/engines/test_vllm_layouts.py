"""In which order layers and blocks lie, with stand-ins for what vLLM says."""

from __future__ import annotations

import contextlib
import sys
from itertools import permutations
from types import SimpleNamespace as Thing

import pytest

from kvcached.engines.vllm import layouts
from kvcached.engines.vllm.layouts import all_layers_together

NAMES = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC"]
"""As vLLM prefers them where kernels take any."""


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (NAMES, "BLNHC"),
        (["LBHNC", "BLHNC"], "BLHNC"),  # FlashInfer on Blackwell
        (["LBHNC"], "LBHNC"),  # vLLM's own attention on the CPU
        (["LBNHC", "BLHNC"], "LBNHC"),  # tokens and heads change places for nobody
        (["BLHNC", "BLNHC"], "BLHNC"),
        (["BHLNC"], "BHLNC"),
    ],
)
def test_blocks_come_first_where_kernels_take_that(names, first):
    assert all_layers_together(names)[0] == first


@pytest.mark.parametrize("count", range(1, 7))
def test_none_is_invented_and_none_is_lost(count):
    for names in permutations(NAMES, count):
        ours = all_layers_together(list(names))
        assert sorted(ours) == sorted(names)
        assert [n for n in ours if n != ours[0]] == [n for n in names if n != ours[0]]
        inside = {name.replace("L", "").replace("B", "") for name in (ours[0], names[0])}
        assert len(inside) == 1


@pytest.fixture
def worker(monkeypatch):
    """A worker whose vLLM has kernels of some block sizes; ``worker.sizes`` may be changed."""

    class WorkerBase:
        vllm_config = "its configuration"
        sizes = (16, 32, 64)

        def get_supported_kv_cache_layouts(self):
            return tuple(NAMES)

    one = WorkerBase()

    def select(kv_manager_block_size, backends):
        assert backends == ["kernels of its configuration"]
        fits = [size for size in one.sizes if kv_manager_block_size % size == 0]
        if not fits:
            raise ValueError("No common block size")
        return max(fits)

    base = Thing(WorkerBase=WorkerBase, get_current_attn_backends=lambda c: [f"kernels of {c}"])
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", base)
    utils = Thing(select_common_block_size=select)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.utils", utils)
    return one


@pytest.mark.parametrize(
    ("sizes", "why"),
    [([16], ""), ([16, 64], ""), ([128], "split"), ([64, 128], "split"), ([24], "common")],
)
def test_blocks_that_vllm_would_split_must_lie_close(worker, sizes, why):
    specs = {str(size): Thing(block_size=size) for size in sizes}
    assert why in layouts.split_blocks(specs, worker.vllm_config)
    assert bool(why) is bool(layouts.split_blocks(specs, worker.vllm_config))


def test_a_worker_asks_for_our_order_unless_there_is_a_reason(worker):
    reasons = {}
    layouts.wrap(lambda one: reasons.get(one, ""))
    assert worker.get_supported_kv_cache_layouts()[0] == "BLNHC"
    reasons[worker] = "blocks that are split"
    assert worker.get_supported_kv_cache_layouts() == NAMES


@pytest.mark.parametrize(
    ("kind", "layout", "by_layer"),
    [("packed", None, False), ("packed", "NHD", False), ("packed", "HND", True),
     ("layout", "HND", False)],
)  # fmt: skip
def test_an_order_that_vllm_cuts_wrongly_out_of_whole_blocks(kind, layout, by_layer, monkeypatch):
    current: list[str] = []

    @contextlib.contextmanager
    def set_current(given):
        current.append(given)
        yield
        current.pop()

    def ask():
        assert current == ["its configuration"], "as vLLM asserts when nobody asked before"
        return layout

    utils = Thing(get_kv_cache_layout=ask)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.utils", utils)
    monkeypatch.setitem(sys.modules, "vllm.config", Thing(set_current_vllm_config=set_current))
    assert layouts.cuts_by_layer(kind, "its configuration") is by_layer
    assert not current
