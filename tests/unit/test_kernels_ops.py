"""The kernels as torch operators: what they declare is what they do, and compilers go past them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import library  # noqa: E402

from kvcached import kernels  # noqa: E402
from kvcached.kernels import ops, quant  # noqa: E402

HEADS, GROUP, DIM = 2, 3, 16


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def caches(dtype=torch.float32):
    return [torch.zeros(6, 4, HEADS, DIM, dtype=dtype) for _ in range(2)]


def step(q, key, value, k_cache, v_cache, slots, lens, table):
    """Scale, write, attend, write again, attend: the order shows in the result."""
    torch.ops.kvcached.reshape_and_cache(key * 2, value, k_cache, v_cache, slots)
    first, lse = torch.ops.kvcached.attn_with_kvcache(q, k_cache, v_cache, lens, table)
    torch.ops.kvcached.reshape_and_cache(key, value * 3, k_cache, v_cache, slots)
    second, _ = torch.ops.kvcached.attn_with_kvcache(q, k_cache, v_cache, lens, table)
    return first + second.relu(), lse


def arguments():
    torch.manual_seed(0)
    q, key, value = torch.randn(2, HEADS * GROUP, DIM), *torch.randn(2, 2, HEADS, DIM)
    return q, key, value, *caches(), int32(5, 20), int32(2, 1), int32(1, 5)[:, None]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_writes_and_attends_in_order_without_a_break(backend):
    torch._dynamo.reset()
    ours, theirs = arguments(), arguments()
    wanted = step(*theirs)
    got = torch.compile(step, backend=backend, fullgraph=True)(*ours)
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(ours[3:5], theirs[3:5], strict=True):
        assert torch.equal(x, y)
        assert x.any()
    torch._dynamo.reset()


CHECKS = ("test_schema", "test_faketensor")


def test_the_operators_do_what_they_declare():
    q, key, value, k, v, slots, lens, table = arguments()
    library.opcheck(ops.reshape_and_cache, (key, value, k, v, slots), test_utils=CHECKS)
    library.opcheck(ops.attn_with_kvcache, (q, k, v, lens, table), test_utils=CHECKS)
    scales = [torch.zeros(6, 4, HEADS) for _ in range(2)]
    quantised = caches(torch.int8)
    library.opcheck(
        ops.reshape_and_cache, (key, value, *quantised, slots, "int8", *scales), test_utils=CHECKS
    )


def test_the_operators_are_the_functions():
    q, key, value, k, v, slots, lens, table = arguments()
    ops.reshape_and_cache(key, value, k, v, slots)
    twins = caches()
    kernels.reshape_and_cache(key, value, *twins, slots)
    assert torch.equal(k, twins[0])
    out, lse = ops.attn_with_kvcache(
        q, k, v, lens, table, window_left=1, softcap=2.0, sinks=torch.ones(HEADS * GROUP)
    )
    wanted = kernels.attn_with_kvcache(
        q, k, v, cache_seqlens=lens, page_table=table, window_size=(1, -1), softcap=2.0,
        sinks=torch.ones(HEADS * GROUP), return_softmax_lse=True,
    )  # fmt: skip
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])


def test_the_shape_over_an_int4_cache_is_that_of_its_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cache = torch.zeros(6, 4, HEADS, DIM // 2, dtype=quant.INT4)
        q = torch.zeros(2, HEADS * GROUP, DIM)
        out, lse = ops.attn_with_kvcache(q, cache, cache, torch.zeros(2).int(), None)
    assert tuple(out.shape) == (2, HEADS * GROUP, DIM)
    assert (tuple(lse.shape), lse.dtype) == ((2, HEADS * GROUP), torch.float32)
