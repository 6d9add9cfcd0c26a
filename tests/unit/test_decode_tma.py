"""Decode by TMA without a GPU: compiled for sm_90, which calls take it, what is launched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from other_python import run_python

pytest.importorskip("triton")
pytest.importorskip("torch")
import torch

from kvcached.kernels import _decode_tma as tma
from kvcached.kernels._workspace import make_workspace
from kvcached.kernels.checks import UNBOUNDED, AttentionCall
from kvcached.kernels.view import KVView

SHARED_LIMIT = 232_448
K_AT, V_AT = 16 << 30, 48 << 30


@pytest.fixture(scope="module")
def compiled():
    return json.loads(run_python(str(Path(__file__).with_name("aot_decode_tma.py")), timeout=280))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_shape_compiles_for_sm_90(compiled):
    assert len(compiled) == 10
    for name, needs in compiled.items():
        assert needs["shared"] <= SHARED_LIMIT, (name, needs)
        assert needs["registers"] * needs["threads"] <= 65_536, (name, needs)
        assert needs["scratch"] == 0, (name, needs)
        assert needs["stack"] == 0, (name, needs)
        assert needs["boxes"] >= 4, (name, needs)
        assert needs["early"], name


def tensor(*shape, dtype=torch.bfloat16, at=1 << 20):
    """What a call looks at of a tensor on a GPU."""
    strides = torch.empty(shape, device="meta").stride()
    return SimpleNamespace(
        shape=torch.Size(shape), dtype=dtype, is_cuda=True,
        device=torch.device("cuda", 0), data_ptr=lambda: at,
        stride=lambda i=None: strides if i is None else strides[i], element_size=lambda: 2,
    )  # fmt: skip


def a_call(*, tokens=1, sequences=16, heads=8, group=4, dim=128, block_size=16, **changed):
    slot = heads * dim
    strides = 2 * block_size * slot, slot, dim
    kv = KVView(K_AT, V_AT, torch.bfloat16, torch.device("cpu"), 5000, block_size, heads, dim,
                dim, *strides, *strides)  # fmt: skip
    call = AttentionCall(
        q=tensor(tokens * sequences, heads * group, dim), kv=kv,
        out=tensor(tokens * sequences, heads * group, dim), lse=None,
        lens=torch.zeros(sequences, dtype=torch.int32),
        table=torch.zeros(sequences, 4096 // block_size, dtype=torch.int32), starts=None,
        q_starts=None, max_q=tokens, scale=0.1, softcap=0.0, left=UNBOUNDED, right=0, slopes=None,
        sinks=None,
    )  # fmt: skip
    kv_changes = {name: changed.pop(name) for name in list(changed) if hasattr(kv, name)}
    return replace(call, kv=replace(kv, **kv_changes), **changed)


@pytest.fixture(autouse=True)
def an_h100(monkeypatch):
    monkeypatch.setattr(tma, "runs_gluon", lambda device: device.index == 0)
    monkeypatch.setattr(tma, "multiprocessors", lambda _: 132)


@pytest.mark.parametrize("call", [
    a_call(), a_call(heads=4, sequences=33), a_call(group=1), a_call(group=8), a_call(group=7),
    a_call(block_size=48), a_call(block_size=256), a_call(sinks=torch.zeros(32)),
    a_call(right=UNBOUNDED), a_call(sequences=7),
])  # fmt: skip
def test_a_long_decode_of_few_sequences_takes_the_kernel(call):
    assert tma.suits_tma(call, 0, None)
    assert tma.suits_tma(call, 0, SimpleNamespace(fixed=0, balanced=False))


def test_many_sequences_do_if_they_are_unlike():
    call = a_call(sequences=64)
    assert not tma.suits_tma(call, 0, None)
    assert not tma.suits_tma(call, 0, SimpleNamespace(fixed=0, balanced=False))
    assert tma.suits_tma(call, 0, SimpleNamespace(fixed=0, balanced=True))
    many = a_call(sequences=tma.MAX_BATCH + 1)
    assert not tma.suits_tma(many, 0, SimpleNamespace(fixed=0, balanced=True))


@pytest.mark.parametrize("call", [
    a_call(dim=64), a_call(head_dim_v=64), a_call(dtype=torch.int8), a_call(softcap=30.0),
    a_call(table=None, starts=torch.zeros(16, dtype=torch.int32)), a_call(left=1000),
    a_call(q_starts=torch.zeros(17, dtype=torch.int32)), a_call(slopes=torch.zeros(32)),
    a_call(masks=torch.zeros(16, dtype=torch.int64)), a_call(tokens=2), a_call(group=9),
    a_call(heads=133, group=1, sequences=1), a_call(block_size=1), a_call(block_size=24),
    a_call(k_ptr=K_AT + 8), a_call(slot_stride=8 * 128 + 4), a_call(head_stride=16 * 128),
    a_call(sequences=6), a_call(out=tensor(16, 32, 128, at=(1 << 20) + 8)),
    a_call(q=tensor(16, 32, 128, dtype=torch.float32)),
], ids=str)  # fmt: skip
def test_other_calls_do_not(call):
    assert not tma.suits_tma(call, 0, None)


def test_parts_of_a_number_or_of_fixed_lengths_do_not():
    assert not tma.suits_tma(a_call(), 2, None)
    assert not tma.suits_tma(a_call(), 0, SimpleNamespace(fixed=2048, balanced=False))


@pytest.mark.parametrize("sequences", [3, 64])
def test_the_launch(monkeypatch, sequences):
    maps, found = [], {}

    def launch_of(kernel, grid, arguments, constants, types, device, warps, may_align, **options):
        names = [name for name in kernel.arg_names if name not in constants]
        found.update(zip(names, arguments, strict=True))
        found.update(constants, grid=grid, types=types, options=options)
        return "launch"

    monkeypatch.setattr(tma, "tensor_map", lambda *given: maps.append(given) or bytes(128))
    monkeypatch.setattr(tma, "launch_of", launch_of)
    call, asked = a_call(sequences=sequences), []

    def memory(items, elements, rows, device):
        asked.append((items, elements, rows))
        return make_workspace(items, elements, rows, torch.device("cpu"))

    assert tma.prepare_tma(call, memory) == ["launch"]
    parts = 132 + sequences * 8
    assert asked == [(sequences * 8, parts * 4 * 128, parts * 4)]
    assert [one[0] for one in maps] == [K_AT, V_AT]
    assert {one[2:] for one in maps} == {((5000, 16, 1024), (32768, 1024), 16)}
    assert (found["grid"], found["batch"]) == ((132,), sequences)
    assert found["B"] == (64 if sequences > 3 else 4)
    assert (found["ROWS"], found["GROUP"], found["BOX"]) == (4, 16, 16)
    assert (found["stride_qt"], found["stride_kh"], found["stride_table"]) == (4096, 128, 256)
    assert found["types"]["K_MAP"].startswith("tensordesc<bf16[1, 16, 128],NVMMASharedLayout(")
    assert found["options"] == {"launch_pdl": True, "maxnreg": 168, "least_shared": 116 << 10}
