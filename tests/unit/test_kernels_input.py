"""Every argument of the kernels that cannot work is refused by name, and nothing is written."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from kvcached import kernels
from kvcached.errors import InvalidInput


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def arguments(**changes):
    cache = torch.zeros(4, 16, 2, 8)
    return {
        "q": torch.zeros(2, 4, 8), "k_cache": cache, "v_cache": cache.clone(),
        "cache_seqlens": int32(3, 20), "page_table": torch.tensor([[1, 0], [2, 3]]).int(),
    } | changes  # fmt: skip


QUANTIZED = dict.fromkeys(("k_cache", "v_cache"), torch.zeros(4, 16, 2, 8).char()) | dict.fromkeys(
    ("k_descale", "v_descale"), torch.ones(2)
)

BAD_CALLS = {
    "q must be": {"q": torch.zeros(2, 8)},
    "q is torch.float16": {"q": torch.zeros(2, 4, 8).half()},
    "q has head dim 16": {"q": torch.zeros(2, 4, 16)},
    "q has 3 heads": {"q": torch.zeros(2, 3, 8)},
    "q has stride 2": {"q": torch.zeros(2, 4, 16)[..., ::2]},
    "q has 3 tokens": {"q": torch.zeros(3, 4, 8)},
    "k_cache must be": {"k_cache": torch.zeros(4, 16, 8)},
    "k_cache has stride 2": {"k_cache": torch.zeros(4, 16, 2, 16)[..., ::2]},
    "k_cache is torch.int16": {"k_cache": torch.zeros(4, 16, 2, 8, dtype=torch.int16)},
    "int8 needs k_descale": dict.fromkeys(("k_cache", "v_cache"), torch.zeros(4, 16, 2, 8).char()),
    "float32 takes no v_descale": {"v_descale": torch.ones(())},
    r"v_descale must be float32 of shape \(\) or": QUANTIZED | {"v_descale": torch.ones(3)},
    "needs even head dims": QUANTIZED
    | {"q": torch.zeros(2, 4, 7)}
    | dict.fromkeys(("k_cache", "v_cache"), torch.zeros(4, 16, 2, 7).char()),
    "cannot be written": QUANTIZED | {"k": torch.zeros(2, 2, 8), "v": torch.zeros(2, 2, 8)},
    "k_cache has shape": {"k_cache": torch.zeros(0, 16, 2, 8)},
    "v_cache has shape": {"v_cache": torch.zeros(3, 16, 2, 8)},
    "v_cache is torch.float64": {"v_cache": torch.zeros(4, 16, 2, 8).double()},
    "cache_seqlens must be": {"cache_seqlens": torch.tensor([3, 20])},
    "cache_seqlens has a length of -1": {"cache_seqlens": int32(3, -1)},
    "page_table must be": {"page_table": int32(1, 2)},
    "page_table has 1 rows": {"page_table": int32(1, 2)[None]},
    "page_table has 2 columns, but 33": {"cache_seqlens": int32(3, 33)},
    r"page_table\[1, 1\] is 4": {"page_table": torch.tensor([[1, 99], [2, 4]]).int()},
    "either page_table or": {"cache_start": int32(0, 16)},
    "cache_start leads": {"cache_start": int32(0, 60), "page_table": None},
    "cu_seqlens_q has 2": {"cu_seqlens_q": int32(0, 2)},
    "cu_seqlens_q must rise": {"cu_seqlens_q": int32(0, 3, 2)},
    "max_seqlen_q is 1, but": {"cu_seqlens_q": int32(0, 0, 2)},
    "max_seqlen_q is 0": {"max_seqlen_q": 0},
    "window_size is 3": {"window_size": 3},
    r"window_size is \(-2": {"window_size": (-2, 0)},
    "softcap is -1": {"softcap": -1.0},
    "sinks must be": {"sinks": torch.zeros(3)},
    "alibi_slopes must be": {"alibi_slopes": torch.zeros(3)},
    "out must be": {"out": torch.zeros(2, 4, 9)},
    "custom_mask must be": {"custom_mask": torch.zeros(2)},
    "custom_mask has 64 bits": {
        "q": torch.zeros(130, 4, 8),
        "max_seqlen_q": 65,
        "custom_mask": torch.ones(130).long(),
    },
    "custom_mask goes with": {"custom_mask": torch.ones(2).long(), "window_size": (3, 0)},
    "k and v must be given both": {"k": torch.zeros(2, 2, 8)},
    "key must be": {"k": torch.zeros(1, 2, 8), "v": torch.zeros(2, 2, 8)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_bad_attention_call_is_refused(message):
    call = arguments(**BAD_CALLS[message])
    with pytest.raises(InvalidInput, match=message):
        kernels.attn_with_kvcache(**call)
    assert not call["k_cache"].any()


def test_a_good_call_takes_torch_and_numpy_indices_and_ignores_unneeded_ids():
    call = arguments(page_table=torch.tensor([[1, -7], [2, 3]]).int())
    plain = kernels.attn_with_kvcache(**call)
    indices = {name: call[name].numpy() for name in ("cache_seqlens", "page_table")}
    assert torch.equal(kernels.attn_with_kvcache(**(call | indices)), plain)


def test_a_batch_of_nothing_gives_nothing():
    call = arguments(q=torch.zeros(0, 4, 8), cache_seqlens=int32(), page_table=int32()[None][:0])
    assert kernels.attn_with_kvcache(**call).shape == (0, 4, 8)


BAD_WRITES = {
    "slot_mapping holds 64": {"slot_mapping": int32(0, 64)},
    "slot_mapping holds -2": {"slot_mapping": int32(0, -2)},
    "slot_mapping holds 5 twice": {"slot_mapping": int32(5, 5)},
    "slot_mapping must be": {"slot_mapping": torch.tensor([0, 1])},
    "key must be": {"key": torch.ones(3, 2, 8)},
    "value must be": {"value": torch.ones(2, 2, 8).half()},
    "value has stride 2": {"value": torch.ones(2, 2, 16)[..., ::2]},
    "kv_cache_dtype is 'fp8', but the cache is": {"kv_cache_dtype": "fp8"},
    "kv_cache_dtype is 'fp7'": {"kv_cache_dtype": "fp7"},
    "k_scale is given, but": {"k_scale": torch.ones(())},
    "caches must be": {"k_cache": torch.zeros(64, 2, 8)},
    "a cache has stride 2": {"k_cache": torch.zeros(4, 16, 2, 16)[..., ::2]},
    "v_cache has shape|v_cache .* must be equal": {"v_cache": torch.zeros(3, 16, 2, 8)},
    "v_cache torch.float16": {"v_cache": torch.zeros(4, 16, 2, 8).half()},
}
BAD_QUANTISED = {
    "k_scale of a torch.int8 cache must be": {},
    "k_scale must be float32": {"k_scale": torch.ones((), dtype=torch.float64)},
    "both be made by row": {"k_scale": torch.ones(4, 16, 2), "v_scale": torch.ones(())},
    "key must be": {"key": torch.ones(2, 2, 9)},
    "key must be .* of float32": {"key": torch.ones(2, 2, 8).int(), "value": torch.ones(2).int()},
}


@pytest.mark.parametrize("message", BAD_QUANTISED)
def test_a_bad_quantised_write_is_refused(message):
    cache, ones = torch.zeros(4, 16, 2, 8, dtype=torch.int8), torch.ones(2, 2, 8)
    call = {"key": ones, "value": ones, "k_cache": cache, "v_cache": cache.clone(),
            "slot_mapping": int32(0, 1)} | BAD_QUANTISED[message]  # fmt: skip
    with pytest.raises(InvalidInput, match=message):
        kernels.reshape_and_cache(**call)
    assert not cache.any()


BAD_LATENTS = {
    "must be .T, R.": {"kv_c": torch.ones(2, 1, 8)},
    "rows of 12": {"k_pe": torch.ones(2, 5)},
    "one scale for all": {"scale": torch.ones(2)},
    "no int4": {"kv_cache_dtype": "int4"},
}


@pytest.mark.parametrize("message", BAD_LATENTS)
def test_a_bad_latent_write_is_refused(message):
    cache = torch.zeros(4, 16, 12)
    call = {"kv_c": torch.ones(2, 8), "k_pe": torch.ones(2, 4), "kv_cache": cache,
            "slot_mapping": int32(0, 1)} | BAD_LATENTS[message]  # fmt: skip
    with pytest.raises(InvalidInput, match=message):
        kernels.concat_and_cache_mla(**call)
    assert not cache.any()


@pytest.mark.parametrize("message", BAD_WRITES)
def test_a_bad_write_is_refused(message):
    cache, ones = torch.zeros(4, 16, 2, 8), torch.ones(2, 2, 8)
    call = {"key": ones, "value": ones, "k_cache": cache, "v_cache": cache.clone(),
            "slot_mapping": int32(0, 1)} | BAD_WRITES[message]  # fmt: skip
    with pytest.raises(InvalidInput, match=message):
        kernels.reshape_and_cache(**call)
    assert not cache.any()


def ids(*values):
    return np.array(values, np.int32)


def pairs(*values):
    return ids(*values).reshape(-1, 2)


BAD_MOVES = {
    "page_ids holds 4": lambda p: kernels.gather_pages(p, ids(4), p[:1]),
    "out must be": lambda p: kernels.gather_pages(p, ids(1), p[:2]),
    "page_ids holds 1 twice": lambda p: kernels.scatter_pages(p[:2], ids(1, 1), p),
    "dst_ids holds 2 twice": lambda p: kernels.copy_pages(p, ids(0, 1), ids(2, 2)),
    "both a source and": lambda p: kernels.copy_pages(p, ids(0, 1), ids(1, 2)),
    "src_ids has 2": lambda p: kernels.copy_pages(p, ids(0, 1), ids(2)),
    "cu_seqlens_k must": lambda p: kernels.gather_kv(p, p, ids(1)[None], ids(0), p[0], p[0]),
    "page_table has 1": lambda p: kernels.gather_kv(p, p, ids(1)[None], ids(0, 17), p[0], p[0]),
    "page_table holds 9": lambda p: kernels.gather_kv(p, p, ids(9)[None], ids(0, 1), p[0], p[0]),
    "out_k must": lambda p: kernels.gather_kv(p, p, ids(1)[None], ids(0, 1), p[0], p[0]),
    "k_descale is given, but": lambda p: kernels.gather_kv(
        p, p, ids(1)[None], ids(0, 1), p[0], p[0], torch.ones(()), torch.ones(())
    ),
    "v_descale of a": lambda p: kernels.gather_kv(
        *[p.to(torch.int8)] * 2, ids(1)[None], ids(0, 16), p[0], p[0], torch.ones(())
    ),
    "k_descale of a": lambda p: kernels.gather_kv(
        *[p.to(torch.uint8)] * 2, ids(1)[None], ids(0, 16), p[0], p[0], *[torch.ones(())] * 2
    ),
    "out_v must be": lambda p: kernels.gather_kv(
        *[p.to(torch.int8)] * 2,
        ids(1)[None],
        ids(0, 16),
        p[0],
        p[0].double(),
        *[torch.ones(())] * 2,
    ),
    "moves holds 2 twice": lambda p: kernels.compact_pages(p, pairs(0, 2, 1, 2)),
    "moves holds 1 twice": lambda p: kernels.compact_pages(p, pairs(1, 2, 1, 3)),
    "block 1 is both": lambda p: kernels.compact_pages(p, pairs(0, 1, 1, 2)),
    "moves holds 4": lambda p: kernels.compact_pages(p, pairs(0, 4)),
    "moves must be .n, 2.": lambda p: kernels.compact_pages(p, ids(0, 1, 2)[None]),
    "kv must be one pool": lambda p: kernels.compact_pages([p, p[:2]], pairs(0, 1)),
    "page_tables must be": lambda p: kernels.compact_pages(p, pairs(0, 1), torch.zeros(2, 2)),
    "page_tables is rewritten": lambda p: kernels.compact_pages(
        p, pairs(0, 1), torch.zeros(2, 4).int()[:, ::2]
    ),
    "cannot be swapped": lambda p: kernels.swap_pages(p, p[:, :2], ids(0), ids(1)),
    "block 0 is both": lambda p: kernels.swap_pages(p, p, ids(0), ids(0)),
    "sinks must be": lambda p: kernels.merge_states([p], [p[..., 0]], sinks=torch.ones(3)),
    "out must be .4": lambda p: kernels.merge_states([p], [p[..., 0]], out=p[:2]),
    "at least one level": lambda p: kernels.cascade_attention(p[0], p, p, []),
    "out must be .16": lambda p: kernels.cascade_attention(p[0], p, p, [None], out=p[0, :1]),
    "cannot be merged": lambda _: kernels.merge_states([], []),
    "does not fit": lambda p: kernels.merge_state(p, p[..., 0], p[:2], p[..., 0]),
}


@pytest.mark.parametrize("message", BAD_MOVES)
def test_a_bad_move_is_refused(message):
    pool = torch.zeros(4, 16, 2, 8)
    with pytest.raises(InvalidInput, match=message):
        BAD_MOVES[message](pool)


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "numba", "triton", "numpy")
    code = "import sys, kvcached.kernels as k; dir(k); sys.exit(any(m in sys.modules for m in {}))"
    code = code.format(heavy)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists_and_others_do_not():
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    with pytest.raises(AttributeError, match="flash"):
        _ = kernels.flash


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # importing it fails, as if it were not installed
from kvcached.kernels import *
from kvcached import kernels
from kvcached.errors import BackendUnavailable, InvalidInput
import torch

assert kernels.MlaPlan is MlaPlan and kernels.Plan is Plan
lens, table = torch.tensor([3, 20]).int(), torch.tensor([[1, 0], [2, 3]]).int()
q, cache = torch.randn(2, 4, 8), torch.randn(4, 16, 2, 8)
plan = plan_attention(2, 32, 4, 2, 8, torch.float32, device="cpu")
assert isinstance(plan, Plan)
plan.update(lens)
call = dict(cache_seqlens=lens, page_table=table)
plain = attn_with_kvcache(q, cache, cache, **call)
assert torch.equal(attn_with_kvcache(q, cache, cache, plan=plan, **call), plain)
assert torch.equal(bind(attn_with_kvcache, q, cache, cache, plan=plan, **call)(), plain)
mla, latents = plan_mla(2, 4, head_dim_v=6, device="cpu"), cache[:, :, 0]
assert isinstance(mla, MlaPlan)
for given in (None, mla):
    out, _ = mla_with_kvcache(q, latents, table, lens, 6, softmax_scale=0.3, plan=given)
    assert out.shape == (2, 4, 6)
refused = [
    lambda: plan.update(lens.repeat(2)), lambda: plan_attention(0, 1, 1, 1, 8, torch.float16),
    lambda: plan_attention(1, 1, 3, 2, 8, torch.float16, device="cpu"),
    lambda: mla_with_kvcache(q, latents, table, lens, 6, softmax_scale=0.3,
                             plan=plan_mla(1, 4, device="cpu")),
    lambda: plan_mla(0, 4), lambda: plan_attention(1, 1, 1, 1, 8, torch.float16),
]
for call in refused:
    try:
        call()
    except (InvalidInput, BackendUnavailable) as error:
        print(error)
"""


def test_without_triton_everything_can_be_imported_and_plans_are_for_the_cpu():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], check=False, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    wanted = ["at most 2 sequences got 4", "max_batch is 0", "3 query heads", "max_batch 1, the",
              "max_batch is 0", "a plan for cuda needs Triton"]  # fmt: skip
    lines = done.stdout.splitlines()
    assert all(text in done.stdout for text in wanted), lines


def test_threads_run_the_same_task_without_openmp(monkeypatch):
    from kvcached.kernels import _team

    call = arguments(q=torch.randn(2, 4, 8), k_cache=torch.randn(4, 16, 2, 8))
    plain = kernels.attn_with_kvcache(**call)
    monkeypatch.setattr(_team, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(kernels.attn_with_kvcache(**call), plain)
    finally:
        torch.set_num_threads(before)
