"""What vLLM allocates for its cache, and cuts into views, lies over our addresses."""

from __future__ import annotations

from types import SimpleNamespace as Thing

import pytest
import torch

from kvcached.engines.vllm import allocation
from kvcached.engines.vllm.allocation import in_place_of_zeros
from kvcached.errors import EngineUnsupported

RAW = torch.arange(64, dtype=torch.int8)


def test_the_first_of_its_size_is_ours_and_what_is_cut_out_of_it():
    with in_place_of_zeros(RAW, 48):
        small = torch.zeros(8, dtype=torch.int8)
        whole = torch.zeros(50, dtype=torch.int8, device="cpu")
        view = torch.as_strided(whole, (2, 8), (24, 1), 3)
        other = torch.zeros(50, dtype=torch.int8)
    assert whole.data_ptr() == RAW.data_ptr() and len(whole) == 50
    assert view[1].tolist() == list(range(27, 35))
    assert not small.any() and not other.any()
    assert not torch.zeros(50).any()


@pytest.mark.parametrize("make", [lambda: torch.zeros(8), lambda: torch.empty(64),
                                  lambda: torch.zeros((8, 8))])  # fmt: skip
def test_a_cache_that_is_made_otherwise_is_an_error(make):
    said = pytest.raises(EngineUnsupported, match=r"something else than torch\.zeros")
    with said, in_place_of_zeros(RAW, 48):
        make()


def test_what_goes_wrong_inside_is_what_is_raised():
    with pytest.raises(KeyError), in_place_of_zeros(RAW, 48):
        raise KeyError


# --- to 0.28 ------------------------------------------------------------------------------------

BLOCKS, PAGE, OS_PAGE = 5, 96, 64
"""Blocks, bytes of one in a layer, and of physical memory: planes end in the middle of a page."""


@pytest.fixture
def opened(monkeypatch):
    """The geometry that was opened; its range holds the number of each of its 64-byte pages."""
    found = []

    def reserve(plan, backend, geometry, warm):
        found.append(geometry)
        return torch.arange(geometry.reserved_bytes // OS_PAGE).repeat_interleave(OS_PAGE)

    monkeypatch.setattr(allocation, "_open", reserve)
    monkeypatch.setattr(allocation, "_warm_blocks", lambda *_: 1)
    monkeypatch.setattr(allocation, "make_backend", lambda *_: Thing(page_bytes=OS_PAGE))
    return found


def packed(*, by_layer, staged=False):
    tensors = [Thing(size=BLOCKS * PAGE, offset=0, block_stride=0, shared_by=names)
               for names in (["a0", "b0"], ["a1"], ["a2"])]  # fmt: skip
    plan = Thing(by_layer=by_layer, staged=staged, layer_bytes=PAGE)
    raw = allocation._packed(plan, Thing(kv_cache_tensors=tensors, num_blocks=BLOCKS), "device")
    return tensors, raw


def test_a_block_holds_all_layers_and_vllm_is_told_where(opened):
    tensors, raw = packed(by_layer=False)
    assert (opened[0].num_planes, opened[0].block_bytes) == (1, 3 * PAGE)
    assert [(t.offset, t.block_stride, t.size) for t in tensors] == [
        (0, 3 * PAGE, 3 * BLOCKS * PAGE), (PAGE, 3 * PAGE, 3 * BLOCKS * PAGE),
        (2 * PAGE, 3 * PAGE, 3 * BLOCKS * PAGE)]  # fmt: skip
    assert set(raw) == {"a0", "b0", "a1", "a2"}
    assert {(view[0].item(), len(view)) for view in raw.values()} == {(0, 3 * BLOCKS * PAGE)}


@pytest.mark.parametrize("staged", [False, True])
def test_each_layer_has_a_place_of_its_own_and_vllm_cuts_nothing(opened, staged):
    tensors, raw = packed(by_layer=True, staged=staged)
    geometry = opened[0]
    assert (geometry.num_planes, geometry.block_bytes) == (3, PAGE)
    assert geometry.plane_bytes == 8 * OS_PAGE, "whole pages"
    assert all((t.offset, t.block_stride, t.size) == (0, 0, BLOCKS * PAGE) for t in tensors)
    starts = {name: (view[0].item(), len(view)) for name, view in raw.items()}
    whole = BLOCKS * PAGE
    assert starts == {"a0": (0, whole), "b0": (0, whole), "a1": (8, whole), "a2": (16, whole)}


def test_layers_of_unlike_sizes_are_refused(opened):
    tensors = [Thing(size=BLOCKS * size, block_stride=0, shared_by=["a"]) for size in (64, 128)]
    with pytest.raises(EngineUnsupported, match=r"\[64, 128\] bytes"):
        allocation._packed(Thing(by_layer=False), Thing(kv_cache_tensors=tensors,
                                                        num_blocks=BLOCKS), "device")  # fmt: skip
