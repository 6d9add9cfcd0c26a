"""Torch views over raw addresses: right bytes, no reads, no copies, safe to print."""

import copy
import ctypes
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcached.errors import InvalidInput
from kvcached.layout import CacheSpec, Geometry
from kvcached.memory.host import HostBackend
from kvcached.memory.views import ElasticTensor, layer_views, tensor_from_address
from kvcached.testing.strategies import cache_specs

PAGE = 1 << 16


@pytest.fixture
def reserved():
    """1 TiB of addresses, page 5 of it mapped."""
    backend = HostBackend(PAGE)
    reservation, handle = backend.reserve(1 << 40), backend.create(1)
    backend.map(reservation, 5, handle)
    yield reservation
    backend.unmap(reservation, 5, handle)
    backend.release(handle)
    backend.close(reservation)
    backend.shutdown()


def test_covers_a_terabyte_of_which_one_page_is_mapped(reserved):
    flat = tensor_from_address(reserved.address, reserved.nbytes)
    assert flat.shape == (1 << 40,)
    assert flat.data_ptr() == reserved.address
    flat[5 * PAGE : 6 * PAGE] = 7
    assert ctypes.string_at(reserved.address + 5 * PAGE, PAGE) == b"\7" * PAGE
    ctypes.memset(reserved.address + 5 * PAGE, 9, 1)
    assert flat[5 * PAGE] == 9


def test_printing_reads_nothing(reserved):
    flat = tensor_from_address(reserved.address, reserved.nbytes)
    keys = flat.view(torch.bfloat16).view(-1, 16, 2, 64).as_subclass(ElasticTensor)
    for text in (repr(keys), str(keys), f"{keys}", f"{[keys]}"):
        assert "contents unread" in text
    assert "dtype=bfloat16" in repr(keys)


def test_copying_the_whole_is_refused(reserved):
    flat = tensor_from_address(reserved.address, reserved.nbytes)
    with pytest.raises(InvalidInput, match="cannot be copied whole"):
        copy.deepcopy(flat)
    with pytest.raises(InvalidInput, match="cannot be pickled whole"):
        torch.save(flat, io.BytesIO())


def test_results_are_plain_tensors(reserved):
    flat = tensor_from_address(reserved.address, reserved.nbytes)
    page = flat[5 * PAGE : 6 * PAGE]
    assert type(page) is torch.Tensor
    assert type(page + 1) is torch.Tensor
    assert "tensor([0" in repr(page[:4])


def test_torch_compile_takes_it_without_a_graph_break(reserved):
    flat = tensor_from_address(reserved.address, reserved.nbytes)
    keys = flat.view(-1, PAGE).as_subclass(ElasticTensor)
    keys[5] = 3
    double = torch.compile(lambda k, i: k[i] * 2, backend="eager", fullgraph=True)
    assert double(keys, torch.tensor([5])).unique().tolist() == [6]


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "", "cpu:-1"])
def test_bad_devices(device):
    with pytest.raises(InvalidInput, match="is not a device"):
        tensor_from_address(PAGE, PAGE, device)


@pytest.mark.parametrize(("address", "nbytes"), [(0, 1), (-1, 1), (PAGE, 0), (PAGE, -1)])
def test_bad_ranges(address, nbytes):
    with pytest.raises(InvalidInput, match="cannot view"):
        tensor_from_address(address, nbytes)


def test_bad_layers(reserved):
    spec = CacheSpec(2, 1, 8)
    geometry = Geometry.of(spec, page_bytes=PAGE, num_blocks=4)
    for layer in (-1, 2):
        with pytest.raises(InvalidInput, match="layer"):
            layer_views(spec, geometry, reserved.address, "cpu", layer)


@given(spec=cache_specs(), num_blocks=st.integers(1, 9), data=st.data())
def test_views_cover_a_block_exactly_once(spec, num_blocks, data):
    """Each byte of a block belongs to one place of one view, and no byte of another does."""
    geometry = Geometry.of(spec, page_bytes=4096, num_blocks=num_blocks)
    memory = (ctypes.c_ubyte * geometry.reserved_bytes)()
    address = ctypes.addressof(memory)
    block = data.draw(st.integers(0, num_blocks - 1))
    for layer in range(spec.num_layers):
        keys, values = layer_views(spec, geometry, address, "cpu", layer)
        assert keys.dtype == values.dtype == getattr(torch, spec.dtype)
        head = (num_blocks, spec.block_size, spec.num_kv_heads)
        assert keys.shape == (*head, spec.head_dim)
        assert values.shape == (*head, spec.mla_value_dim or spec.value_dim)
        for view in {id(v): v for v in ((keys, values) if spec.value_dim else (keys,))}.values():
            piece = view[block]
            assert piece.is_contiguous()
            piece.view(torch.uint8).add_(1)
        if spec.mla_value_dim:
            assert values.data_ptr() == keys.data_ptr()
    touched = torch.frombuffer(memory, dtype=torch.uint8).view(geometry.num_planes, -1)
    start = block * geometry.block_bytes
    assert touched[:, start : start + geometry.block_bytes].eq(1).all()
    assert touched.sum(dtype=torch.int64) == geometry.num_planes * geometry.block_bytes


@given(spec=cache_specs(layouts=("cross_layer",)))
def test_a_cross_layer_block_is_one_record(spec):
    """``[layer][K|V][slot][kv head][dim]``, and the address of a block is linear in its id."""
    geometry = Geometry.of(spec, page_bytes=4096, num_blocks=3)
    memory = (ctypes.c_ubyte * geometry.reserved_bytes)()
    address = ctypes.addressof(memory)
    expected = address
    for layer in range(spec.num_layers):
        keys, values = layer_views(spec, geometry, address, "cpu", layer)
        assert keys.data_ptr() == expected
        expected += spec.key_bytes
        if spec.value_bytes:
            assert values.data_ptr() == expected
            expected += spec.value_bytes
        assert keys[2].data_ptr() - keys.data_ptr() == 2 * spec.block_bytes
    assert expected - address == spec.block_bytes
