"""Prefill by TMA without a GPU: compiled for sm_90, which calls take it, what is launched."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from other_python import run_python

pytest.importorskip("triton")
pytest.importorskip("torch")
import torch
import triton

from kvcached.kernels import _prefill_tma as tma
from kvcached.kernels import _tensor_maps
from kvcached.kernels._launch import runs_gluon
from kvcached.kernels.checks import UNBOUNDED, AttentionCall
from kvcached.kernels.view import KVView
from kvcached.memory.driver import Calls
from kvcached.testing.fake_device import CUresult

SHARED_LIMIT = 232_448
K_AT, V_AT = 16 << 30, 48 << 30


@pytest.fixture(scope="module")
def compiled():
    return json.loads(run_python(str(Path(__file__).with_name("aot_prefill_tma.py")), timeout=280))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_shape_compiles_for_sm_90(compiled):
    assert len(compiled) == 12
    for name, needs in compiled.items():
        assert needs["shared"] <= SHARED_LIMIT, (name, needs)
        assert needs["registers"] * needs["threads"] <= 65_536, (name, needs)
        assert needs["scratch"] == 0, (name, needs)
        # What all warps know from the start may be kept there, accumulators may not.
        assert needs["stack"] <= 48, (name, needs)


@pytest.mark.slow
def test_keys_come_by_tma_and_products_overlap(compiled):
    for name, needs in compiled.items():
        assert needs["boxes"] >= 2, (name, needs)
        assert needs["warpgroup_products"] >= 64, (name, needs)
        assert needs["register_changes"] >= 8, (name, needs)
        assert not needs["serialized"], f"{name}: each product waits for the one before it"


def tensor(*shape, dtype=torch.bfloat16, at=1 << 20):
    """What a call looks at of a tensor on a GPU."""
    strides = torch.empty(shape, device="meta").stride()
    return SimpleNamespace(
        shape=torch.Size(shape), dtype=dtype, is_cuda=True,
        device=torch.device("cuda", 0), data_ptr=lambda: at,
        stride=lambda i=None: strides if i is None else strides[i], element_size=lambda: 2,
    )  # fmt: skip


def a_call(*, tokens=8192, sequences=1, heads=8, group=4, dim=128, dim_v=None, block_size=16,
           layers=2, **changed):  # fmt: skip
    dim_v = dim_v or dim
    slot, slot_v = heads * dim, heads * dim_v
    block = layers * block_size * (slot + slot_v)
    kv = KVView(K_AT, V_AT, torch.bfloat16, torch.device("cpu"), 5000, block_size, heads, dim,
                dim_v, block, slot, dim, block, slot_v, dim_v)  # fmt: skip
    lens = torch.zeros(sequences, dtype=torch.int32)
    call = AttentionCall(
        q=tensor(tokens * sequences, heads * group, dim), kv=kv,
        out=tensor(tokens * sequences, heads * group, dim_v), lse=None, lens=lens,
        table=torch.zeros(sequences, 1024, dtype=torch.int32), starts=None, q_starts=None,
        max_q=tokens, scale=0.1, softcap=0.0, left=UNBOUNDED, right=0, slopes=None, sinks=None,
    )  # fmt: skip
    kv_changes = {name: changed.pop(name) for name in list(changed) if hasattr(kv, name)}
    return replace(call, kv=replace(kv, **kv_changes), **changed)


@pytest.fixture(autouse=True)
def an_h100(monkeypatch):
    monkeypatch.setattr(tma, "runs_gluon", lambda device: device.index == 0)
    monkeypatch.setattr(tma, "multiprocessors", lambda _: 132)
    monkeypatch.setattr("kvcached.kernels._prefill_parts.multiprocessors", lambda _: 132)


@pytest.mark.parametrize("call", [
    a_call(), a_call(sequences=16, tokens=1024), a_call(heads=16, group=1, right=UNBOUNDED),
    a_call(dim=256), a_call(block_size=48), a_call(sinks=torch.zeros(32)), a_call(group=7),
    a_call(q_starts=torch.tensor([0, 8192])), a_call(dim=64), a_call(dim=192, dim_v=128),
    a_call(table=torch.zeros(1, 128, dtype=torch.int32)), a_call(sequences=16, tokens=256),
])  # fmt: skip
def test_a_long_prompt_takes_the_kernel(call):
    assert tma.suits_tma(call)


@pytest.mark.parametrize("call", [
    a_call(dim=96), a_call(dim=128, dim_v=64), a_call(sequences=64, tokens=127),
    a_call(table=None, starts=torch.zeros(1, dtype=torch.int32)),
    a_call(softcap=30.0), a_call(left=1000), a_call(slopes=torch.zeros(32)),
    a_call(block_size=1), a_call(block_size=24),
    a_call(k_ptr=K_AT + 8), a_call(slot_stride=8 * 128 + 4), a_call(head_stride=16 * 128),
    a_call(out=tensor(8192, 32, 128, at=(1 << 20) + 8)),
    a_call(tokens=512, heads=1), a_call(q=tensor(8192, 32, 128, dtype=torch.float32)),
], ids=str)  # fmt: skip
def test_other_calls_do_not(call):
    assert not tma.suits_tma(call)


def a_mixed_call(prompt, decoding, **changed):
    starts = torch.tensor([0, prompt, *(prompt + 1 + i for i in range(decoding))])
    rows = tensor(prompt + decoding, 32, 128)
    changed = {"q": rows, "out": rows} | changed
    return a_call(sequences=1 + decoding, tokens=1, max_q=prompt, q_starts=starts, **changed)


def test_a_batch_is_mixed_if_most_sequences_would_fill_no_tile():
    for decoding, mixed in ((0, False), (15, False), (16, True), (300, True)):
        call = a_mixed_call(2048, decoding)
        assert tma.is_mixed(call) is mixed
        assert tma.suits_tma(call)
    assert not tma.is_mixed(a_call(sequences=64, tokens=20)), "they are equally long"
    assert not tma.suits_tma(a_mixed_call(500, 300)), "the prompt does not fill the GPU"
    assert not tma.suits_tma(a_call(sequences=64, tokens=20))


def test_heads_side_by_side_fit_the_cache_and_fill_the_gpu():
    table = torch.zeros(1, 4096 // 16, dtype=torch.int32)
    heads = 16 * 8  # of 16 sequences; 2 MiB of keys and values each
    for tokens, most in ((4096, 8), (512, 33), (64, heads)):
        call = a_call(sequences=16, tokens=tokens, table=table)
        assert tma.beside(call, tma.tiles_of(call)) == most
    call = a_call(sequences=16, tokens=4096, table=table.repeat(1, 64))
    assert tma.beside(call, tma.tiles_of(call)) == 5, "too long for the cache: as few as fill it"
    for blocks, most in ((4096 // 16, 8), (16384 // 16, 2), (1 << 16, 1)):
        call = a_mixed_call(2048, 16, table=torch.zeros(17, blocks, dtype=torch.int32))
        assert tma.beside(call, tma.tiles_of(call)) == most


def test_another_gpu_another_triton_and_parts_do_not(monkeypatch):
    call = a_call()
    assert tma.suits_tma(call, 1)
    assert not tma.suits_tma(call, 2)
    assert tma.suits_tma(a_call(tokens=512, heads=1), 1), "one part was asked for"
    monkeypatch.undo()
    runs_gluon.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert not tma.suits_tma(call)
    runs_gluon.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    assert not runs_gluon(torch.device("cuda", 0))
    runs_gluon.cache_clear()


def launched(monkeypatch, call):
    """The arguments of the launch by name, constants and maps."""
    made, found = [], {}

    def a_map(address, dtype, sizes, strides, rows):
        made.append((address, sizes, strides, rows))
        return bytes([len(made)] * 128)

    def launch_of(kernel, grid, arguments, constants, types, device, warps, may_align, maxnreg):
        names = [name for name in kernel.arg_names if name not in constants]
        found.update(zip(names, arguments, strict=True))
        found.update(constants, grid=grid, warps=warps, maxnreg=maxnreg, types=types)
        return "launch"

    monkeypatch.setattr(tma, "tensor_map", a_map)
    monkeypatch.setattr(tma, "launch_of", launch_of)
    memory = SimpleNamespace(finished="two counters")
    assert tma.prepare_tma(call, lambda *_: memory) == ["launch"]
    return found | {"maps": [made[0][:3], made[1][:3]], "rows": {one[3] for one in made}}


def test_the_launch_of_a_batch(monkeypatch):
    call = a_call(sequences=16, tokens=1000)
    given = launched(monkeypatch, call)
    assert given["maps"] == [
        (K_AT, (5000, 16, 1024), (call.kv.block_stride, 1024)),
        (V_AT, (5000, 16, 1024), (call.kv.block_stride, 1024)),
    ]
    assert given["rows"] == {16}
    assert given["K_MAP"] == given["K_REST_MAP"] == bytes([1] * 128) != given["V_MAP"]
    assert (given["K"], given["V"]) == (K_AT, V_AT)
    assert given["grid"] == (132,)
    assert (given["TOKENS"], given["tiles"], given["items"]) == (32, 16 * 32, 16 * 32 * 8)
    assert (given["batch"], given["max_q"], given["kv_heads"]) == (16, 1000, 8)
    assert given["QUEUE"] == "two counters"
    assert (given["stride_kb"], given["stride_ks"], given["stride_kh"]) == (65536, 1024, 128)
    assert (given["warps"], given["maxnreg"]) == (4, 168)
    assert not given["VARLEN"]
    assert given["types"]["K_MAP"].startswith("tensordesc<bf16[1, 16, 128],NVMMASharedLayout(")


def test_short_prompts_take_fewer_keys_at_a_time(monkeypatch):
    for tokens, keys, stages in ((1024, 64, 4), (1025, 128, 2)):
        given = launched(monkeypatch, a_call(sequences=16, tokens=tokens))
        assert (given["BN"], given["STAGES"], given["MIXED"]) == (keys, stages, False)
    given = launched(monkeypatch, a_mixed_call(8192, 100))
    assert (given["BN"], given["STAGES"], given["MIXED"]) == (64, 4, True)


def test_64_columns_take_three_warpgroups(monkeypatch):
    given = launched(monkeypatch, a_call(sequences=4, tokens=4096, dim=64, group=8))
    assert (given["CONSUMERS"], given["TOKENS"], given["maxnreg"]) == (3, 24, 128)
    assert given["tiles"] == 4 * 171


def test_few_items_take_few_programs(monkeypatch):
    given = launched(monkeypatch, a_call(tokens=300, heads=1, group=8,
                                         q_starts=torch.tensor([0, 300])))  # fmt: skip
    assert given["VARLEN"]
    assert (given["TOKENS"], given["tiles"], given["grid"]) == (16, 300 // 16 + 1, (19,))


def test_keys_of_192_columns_are_copied_in_two_parts(monkeypatch):
    given = launched(monkeypatch, a_call(dim=192, dim_v=128, heads=128, group=1))
    assert (given["DA"], given["DB"], given["DV"]) == (128, 64, 128)
    assert given["types"]["K_REST_MAP"].startswith("tensordesc<bf16[1, 16, 64],")
    assert given["maps"][0][1] == (5000, 16, 128 * 192)


@pytest.mark.parametrize(("block_size", "keys", "rows"), [
    (16, 128, 16), (48, 128, 16), (64, 128, 64), (256, 128, 128), (384, 128, 128), (256, 64, 64),
    (8, 128, 0), (1, 128, 0), (24, 128, 0),
])  # fmt: skip
def test_a_box_lies_in_one_block_of_any_tile(block_size, keys, rows):
    assert tma.box_rows(block_size, keys) == rows


def test_a_map_has_sizes_and_strides_fastest_first_in_bytes(monkeypatch):
    kept = (ctypes.c_ubyte * 128)(*range(128))
    calls = []

    def encode(*arguments):
        calls.append(arguments)
        return CUresult.CUDA_SUCCESS, SimpleNamespace(getPtr=lambda: ctypes.addressof(kept))

    class Names:
        def __getattr__(self, name):
            return name

    driver = SimpleNamespace(
        CUresult=CUresult, cuTensorMapEncodeTiled=encode, cuuint64_t=int, cuuint32_t=int,
        CUtensorMapDataType=Names(), CUtensorMapInterleave=Names(), CUtensorMapSwizzle=Names(),
        CUtensorMapL2promotion=Names(), CUtensorMapFloatOOBfill=Names(),
    )  # fmt: skip
    monkeypatch.setattr(_tensor_maps, "driver_calls", lambda: Calls(driver))
    _tensor_maps.tensor_map.cache_clear()
    made = [_tensor_maps.tensor_map(K_AT, torch.float16, (7, 16, 1024), (40_000, 1024), 16)
            for _ in range(2)]  # fmt: skip
    assert made == [bytes(range(128))] * 2
    (arguments,) = calls
    assert arguments[:3] == ("CU_TENSOR_MAP_DATA_TYPE_FLOAT16", 3, K_AT)
    assert arguments[3:7] == ([1024, 16, 7], [2048, 80_000], [64, 16, 1], [1, 1, 1])
    assert "CU_TENSOR_MAP_SWIZZLE_128B" in arguments
    _tensor_maps.tensor_map.cache_clear()
