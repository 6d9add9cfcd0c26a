"""Launches on a GPU: without a C compiler, bound, from new threads, on another device."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from other_python import run_python

from kvcached import kernels
from kvcached.kernels import reference

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def a_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def ints(*values, device="cuda"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def attention(tokens=1, device="cuda"):
    """A call of two sequences of 100 and 77 tokens, scattered."""
    keys, values = torch.randn(2, 20, 16, 2, 128).to(BF16).to(device)
    table = (torch.randperm(19)[:14].int() + 1).view(2, 7).to(device)
    q = torch.randn(2 * tokens, 16, 128).to(BF16).to(device)
    return {"q": q, "k_cache": keys, "v_cache": values, "cache_seqlens": ints(100, 77).to(device),
            "page_table": table, "max_seqlen_q": tokens}  # fmt: skip


def latents():
    table = (torch.randperm(19)[:14].int() + 1).view(2, 7).cuda()
    return {"q": torch.randn(2, 16, 576).to(BF16).cuda(),
            "kv_cache": torch.randn(20, 16, 576).to(BF16).cuda(), "page_table": table,
            "cache_seqlens": ints(100, 77), "softmax_scale": 576**-0.5}  # fmt: skip


def rows():
    key, value = torch.randn(2, 3, 2, 128).to(BF16).cuda()
    caches = torch.zeros(2, 20, 16, 2, 128, dtype=BF16, device="cuda")
    return {"key": key, "value": value, "k_cache": caches[0], "v_cache": caches[1],
            "slot_mapping": ints(40, 7, 99)}  # fmt: skip


PROGRAM = """
import torch, triton
from test_launch_gpu import attention, latents, rows, check
for tokens in (1, 50):
    check(attention(tokens))
from kvcached import kernels
kernels.mla_with_kvcache(**latents())
kernels.reshape_and_cache(**rows())
pool = torch.zeros(8, 1 << 12, device="cuda")
kernels.copy_pages(pool, torch.tensor([1]).int(), torch.tensor([2]).int())
torch.cuda.synchronize()
assert triton.runtime.driver._active is None, "Triton's own driver was asked"
print("done")
"""


def check(given, **options):
    out = kernels.attn_with_kvcache(**given, **options)
    host = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    want = reference.attn_with_kvcache(**host)[0]
    assert (out.cpu().double() - want).abs().max() < 1.6e-2
    return out


def test_kernels_compile_and_run_where_no_c_compiler_is(tmp_path):
    note = tmp_path / "called"
    for name in ("cc", "gcc", "clang", "g++", "nvcc"):
        trap = tmp_path / name
        trap.write_text(f'#!/bin/sh\necho {name} >> "{note}"\nexit 1\n')
        trap.chmod(0o755)
    program = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{PROGRAM}"
    said = run_python("-c", program, timeout=240, PATH=str(tmp_path), CC="",
                      TRITON_CACHE_DIR=str(tmp_path / "cache"))  # fmt: skip
    assert said == "done\n"
    assert not note.exists(), note.read_text()


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("splits", [0, 2])
def test_a_bound_call_gives_what_the_function_gives(tokens, splits):
    given = attention(tokens)
    want = check(given, num_splits=splits)
    call = kernels.bind(kernels.attn_with_kvcache, **given, num_splits=splits)
    for _ in range(3):
        out = call()
        assert torch.equal(out, want)
        out.fill_(math.nan)
    other, out = torch.randn_like(given["q"]), torch.full_like(want, math.nan)
    assert call(other, out) is out
    assert torch.equal(out, check(given | {"q": other}, num_splits=splits))
    given["cache_seqlens"].copy_(ints(33, 99))
    assert torch.equal(call(), check(given, num_splits=splits))


@pytest.mark.parametrize("planned", [False, True])
def test_bound_mla_gives_what_the_function_gives(planned):
    given = latents()
    want = [x.clone() for x in kernels.mla_with_kvcache(**given)]
    plan = kernels.plan_mla(2, 16) if planned else None
    call = kernels.bind(kernels.mla_with_kvcache, **given, plan=plan)
    for _ in range(2):
        assert all(map(torch.equal, call(), want))
    for _ in range(3):
        assert all(map(torch.equal, kernels.mla_with_kvcache(**given, plan=plan), want))


def test_a_bound_append_writes_the_rows_that_it_is_given():
    given = rows()
    call = kernels.bind(kernels.reshape_and_cache, **given)
    key, value, slots = given["key"] + 1, given["value"] + 1, ints(3, 50, 98)
    call(key, value, slots)
    for cache, want in ((given["k_cache"], key), (given["v_cache"], value)):
        assert torch.equal(cache.view(-1, 2, 128)[slots.long()], want)
    for _ in range(3):  # by then it is known
        kernels.reshape_and_cache(**given)
        assert torch.equal(given["k_cache"].view(-1, 2, 128)[[40, 7, 99]], given["key"])
        given["key"] = given["key"] - 1


def test_a_bound_call_is_captured_and_replayed():
    given = attention()
    call = kernels.bind(kernels.attn_with_kvcache, **given, num_splits=3)
    want = call().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, want)


def test_the_first_thing_that_a_thread_does_may_be_a_launch():
    given, got = attention(), []
    call = kernels.bind(kernels.attn_with_kvcache, **given)
    want = call().clone()
    thread = threading.Thread(target=lambda: got.append(call().clone()))
    thread.start()
    thread.join(30)
    torch.cuda.synchronize()
    assert torch.equal(got[0], want)


def test_a_call_goes_to_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    given = attention(device="cuda:1")
    want = check(given)
    call = kernels.bind(kernels.attn_with_kvcache, **given)
    assert torch.cuda.current_device() == 0
    assert torch.equal(call(), want)
    for _ in range(3):
        assert torch.equal(check(given), want)
