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
def current(monkeypatch):
    """The configurations that are vLLM's current one, innermost last."""
    stack: list[str] = []

    @contextlib.contextmanager
    def set_current(given):
        stack.append(given)
        try:
            yield
        finally:
            stack.pop()

    monkeypatch.setitem(sys.modules, "vllm.config", Thing(set_current_vllm_config=set_current))
    yield stack
    assert not stack


class Kernels:
    """An attention backend: the block sizes that it reads, and the layouts that it declares."""

    def __init__(self, name="FLASH_ATTN", sizes=(16, 32, 64), *, mla=False, layouts=None):
        self.name, self.sizes, self.mla, self.layouts = name, sizes, mla, layouts

    def get_name(self):
        return self.name

    def is_mla(self):
        return self.mla

    def supported_kv_cache_layouts(self):
        return self.layouts


@pytest.fixture
def vllm(monkeypatch, current):
    """Stand-in for vLLM: ``kernels`` and ``Worker`` may be changed, ``asked`` is what it was."""
    made = Thing(kernels=[Kernels()], asked=[])

    class WorkerBase:
        def get_supported_kv_cache_layouts(self):
            made.asked.append("supported")
            return tuple(NAMES)

    def attention_of(config):
        assert current == [config], "some kernels answer otherwise without, some not at all"
        return made.kernels

    def select(kv_manager_block_size, backends, kv_cache_specs=None):
        assert current
        made.asked.append(kv_cache_specs)
        fits = [size for size in set.intersection(*(set(b.sizes) for b in backends))
                if kv_manager_block_size % size == 0]  # fmt: skip
        if not fits:
            raise ValueError("No common block size")
        return max(fits)

    made.Worker = WorkerBase
    made.base = Thing(WorkerBase=WorkerBase, get_current_attn_backends=attention_of)
    made.utils = Thing(select_common_block_size=select)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", made.base)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.utils", made.utils)
    return made


@pytest.mark.parametrize(
    ("sizes", "why"),
    [([16], ""), ([16, 64], ""), ([128], "kernels read blocks in parts"),
     ([64, 128], "kernels read blocks in parts"), ([24], "ValueError: No common block size")],
)  # fmt: skip
def test_blocks_that_kernels_split_must_follow_each_other(vllm, sizes, why):
    specs = {str(size): Thing(block_size=size) for size in sizes}
    assert layouts.why_kept(specs, "its configuration") == why


@pytest.mark.parametrize("knows_specs", [False, True])
def test_kernels_are_asked_for_the_layer_from_where_on_they_want_to_know(vllm, knows_specs):
    newer = vllm.utils.select_common_block_size

    def older(kv_manager_block_size, backends):
        return newer(kv_manager_block_size, backends)

    vllm.utils.select_common_block_size = newer if knows_specs else older
    vllm.kernels.append(Kernels("TRITON_ATTN"))
    spec = Thing(block_size=32)
    assert layouts.why_kept({"layer": spec}, "its configuration") == ""
    assert vllm.asked == [[spec, spec] if knows_specs else None]


@pytest.mark.parametrize(
    ("kernels", "why"),
    [
        (Kernels("TRITON_MLA", mla=True), ""),
        (Kernels("CPU_MLA", mla=True), "CPU_MLA was not tried with another"),
        (Kernels("A_NEW_MLA", mla=True, layouts=("BLHNC",)), ""),  # it says so itself
        (Kernels("A_NEW_ONE"), ""),  # none of those that declare nothing needs an order
    ],
)
def test_kernels_for_mla_that_declare_nothing_may_need_vllms_own_order(vllm, kernels, why):
    vllm.kernels = [kernels]
    assert layouts.why_kept({"layer": Thing(block_size=16)}, "its configuration") == why


def test_what_cannot_be_asked_is_a_reason_and_no_end_of_a_start(vllm):
    del vllm.base.get_current_attn_backends
    specs = {"layer": Thing(block_size=16)}
    assert layouts.why_kept(specs, "its configuration").startswith("AttributeError: ")


def test_a_worker_asks_for_our_order_unless_there_is_a_reason(vllm):
    kept = []
    layouts.wrap(lambda one: vllm.asked.append(one) or one in kept)
    worker = vllm.Worker()
    assert worker.get_supported_kv_cache_layouts()[0] == "BLNHC"
    assert vllm.asked == [worker, "supported"]  # what may raise comes after what all take part in
    kept.append(worker)
    assert worker.get_supported_kv_cache_layouts() == NAMES


def test_a_vllm_whose_workers_are_not_asked_keeps_its_order(vllm):
    del vllm.Worker.get_supported_kv_cache_layouts
    layouts.wrap(lambda one: False)
    assert not hasattr(vllm.Worker, "get_supported_kv_cache_layouts")


@pytest.mark.parametrize(
    ("kind", "layout", "by_layer"),
    [("packed", None, False), ("packed", "NHD", False), ("packed", "HND", True),
     ("layout", "HND", False)],
)  # fmt: skip
def test_an_order_that_vllm_cuts_wrongly(kind, layout, by_layer, monkeypatch, current):
    def ask():
        assert current == ["its configuration"], "as vLLM asserts when nobody asked before"
        return layout

    utils = Thing(get_kv_cache_layout=ask)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.utils", utils)
    assert layouts.cuts_by_layer(kind, "its configuration") is by_layer
