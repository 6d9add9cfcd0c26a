"""Bound calls queue what the functions do, with the tensors that they are given."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from fake_launches import launch_nothing

pytest.importorskip("triton")
from kvcached import kernels
from kvcached.errors import InvalidInput
from kvcached.kernels import (
    _bound,
    _prefill_parts,
    _tensor_maps,
    _write_triton,
    append,
    binding,
    prefill,
)

BF16 = torch.bfloat16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def zeros(*shape):
    return torch.zeros(shape, dtype=BF16)


@pytest.fixture
def driver(monkeypatch):
    for module in (binding, append):
        monkeypatch.setattr(module, "_on_gpu", lambda _: True)
    yield launch_nothing(monkeypatch)
    _write_triton._prepared.cache_clear()


class Elsewhere(torch.Tensor):
    """On another GPU."""

    def get_device(self):
        return 3


def attention(tokens=1, **more):
    return {"q": zeros(tokens, 8, 64), "k_cache": zeros(4, 16, 2, 64),
            "v_cache": zeros(4, 16, 2, 64), "cache_seqlens": ints(40),
            "page_table": ints(0, 1, 2)[None], "max_seqlen_q": tokens} | more  # fmt: skip


def latents(**more):
    return {"q": zeros(1, 4, 96), "kv_cache": zeros(4, 16, 96), "page_table": ints(0, 1, 2)[None],
            "cache_seqlens": ints(40), "head_dim_v": 64, "softmax_scale": 1.0} | more  # fmt: skip


def stored_latents():
    return latents(kv_cache=torch.zeros(4, 16, 96).char(), kv_descale=torch.ones(()))


def rows(**more):
    return {"key": zeros(3, 2, 64), "value": zeros(3, 2, 64), "k_cache": zeros(4, 16, 2, 64),
            "v_cache": zeros(4, 16, 2, 64), "slot_mapping": ints(5, 6, 7)} | more  # fmt: skip


def latent_rows():
    return {"kv_c": zeros(3, 64), "k_pe": zeros(3, 32), "kv_cache": zeros(4, 16, 96),
            "slot_mapping": ints(5, 6, 7)}  # fmt: skip


def int8_rows():
    scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones(()))
    caches = {name: torch.zeros(4, 16, 2, 64).char() for name in ("k_cache", "v_cache")}
    return rows(**caches, **scales)


CALLS = {
    "decode": (kernels.attn_with_kvcache, attention, ["attend_kernel"],
               "Q OUT LENS TABLE K V"),
    "prefill": (kernels.attn_with_kvcache, lambda: attention(40),
                ["prefill_kernel"], "Q OUT LENS TABLE K V"),
    "prefill in parts": (kernels.attn_with_kvcache, lambda: attention(40, num_splits=2),
                         ["prefill_kernel", "merge_kernel"], "Q OUT LENS TABLE K V"),
    "sinks and slopes": (kernels.attn_with_kvcache,
                         lambda: attention(sinks=torch.ones(8), alibi_slopes=torch.ones(8)),
                         ["attend_kernel"], "Q OUT LENS TABLE K V SINKS SLOPES"),
    "mla": (kernels.mla_with_kvcache, latents, ["mla_kernel"], "Q OUT LENS TABLE"),
    "mla int8": (kernels.mla_with_kvcache, stored_latents, ["mla_bytes_kernel"],
                 "Q OUT LENS TABLE"),
    "append": (kernels.reshape_and_cache, rows, ["append_kernel"], "KEY VALUE SLOTS K V"),
    "append int8": (kernels.reshape_and_cache, int8_rows, ["append_quant_kernel"],
                    "KEY VALUE SLOTS K V"),
    "append latents": (kernels.concat_and_cache_mla, latent_rows, ["append_kernel"],
                       "KEY VALUE SLOTS"),
}  # fmt: skip


@pytest.fixture(params=CALLS)
def case(request):
    function, make, launches, names = CALLS[request.param]
    return function, make(), launches, names.split()


def test_a_bound_call_queues_its_kernels_at_every_call_and_not_before(driver, case):
    function, given, launches, names = case
    call = kernels.bind(function, **given)
    assert not driver.launches
    call()
    call()
    assert [one.function[0] for one in driver.launches] == 2 * launches
    assert {one.stream for one in driver.launches} == {77}
    first, second = driver.launches[: len(launches)], driver.launches[len(launches) :]
    assert first == second
    taken = driver.taken(first[0])
    for name, argument in zip(call.takes, names, strict=True):
        if name != "out":
            assert taken[argument] == given[name].data_ptr()


def test_a_call_made_at_addresses_is_that_with_the_tensors_there(driver, case):
    function, given, launches, _ = case
    given |= {"out": zeros(*given["q"].shape[:2], 64)} if "q" in given else {}
    call = kernels.bind(function, **given).release()
    assert call.takes_addresses
    others = [given[name].clone() for name in call.takes]
    call(*others)
    call.at([x.data_ptr() for x in others])
    assert driver.launches[: len(launches)] == driver.launches[len(launches) :]


def test_tensors_take_the_place_of_the_first_that_a_call_takes_and_of_no_others(driver, case):
    function, given, launches, names = case
    given |= {"out": zeros(*given["q"].shape[:2], 64)} if "q" in given else {}
    call = kernels.bind(function, **given)
    call()
    for count in range(1, len(call.takes) + 1):
        del driver.launches[len(launches) :]
        others = [given[name].clone() for name in call.takes[:count]]
        result = call(*others)
        before, after = (
            {(i, name): x for i, one in enumerate(some) for name, x in driver.taken(one).items()}
            for some in (driver.launches[: len(launches)], driver.launches[len(launches) :])
        )
        changed = {key: after[key] for key in after if after[key] != before[key]}
        want = {x.data_ptr() for x in others}
        assert set(changed.values()) == want
        assert {name for _, name in changed} == set(names[:count])
        if "q" in given:
            out = result[0] if isinstance(result, tuple) else result
            assert out is (others[1] if count > 1 else given["out"])


def test_what_a_call_returns_is_what_the_function_returns(driver):
    out, lse = kernels.bind(kernels.attn_with_kvcache, **attention(), return_softmax_lse=True)()
    assert (out.shape, out.dtype, lse.shape) == ((1, 8, 64), BF16, (1, 8))
    taken = driver.taken(driver.launches[0])
    assert (taken["OUT"], taken["LSE"]) == (out.data_ptr(), lse.data_ptr())
    out, lse = kernels.bind(kernels.mla_with_kvcache, **latents())()
    assert (out.shape, lse.shape) == ((1, 4, 64), (1, 4))
    assert kernels.bind(kernels.attn_with_kvcache, **attention())().shape == (1, 8, 64)
    assert kernels.bind(kernels.reshape_and_cache, **rows())() is None


def test_without_a_plan_every_bound_call_has_memory_of_its_own_for_parts(driver):
    calls = [kernels.bind(kernels.attn_with_kvcache, **attention(40, num_splits=2))
             for _ in range(2)]  # fmt: skip
    for call in calls:
        call()
    partial = [driver.taken(one)["PARTIAL"] for one in driver.launches]
    assert partial[0] == partial[1]
    assert partial[2] == partial[3] != partial[0]


@pytest.mark.parametrize("tokens", [1, 40])
def test_calls_with_one_plan_share_its_memory_prompts_too(driver, tokens):
    plan = kernels.plan_attention(1, 64, 8, 2, 64, BF16, device="cpu")
    for _ in range(2):
        given = attention(tokens, num_splits=2 if tokens > 1 else 0)
        kernels.bind(kernels.attn_with_kvcache, **given, plan=plan)()
    name = "attend_kernel" if tokens == 1 else "prefill_kernel"
    taken = [driver.taken(one) for one in driver.launches if one.function[0] == name]
    assert taken[0]["PARTIAL"] == taken[1]["PARTIAL"] != 0
    assert taken[0]["PARTIAL"] in {held.partial.data_ptr() for held in plan.memory._held}


def test_calls_of_mla_with_one_plan_share_its_memory(driver, monkeypatch):
    monkeypatch.setattr(_prefill_parts, "splits_of", lambda *_, **__: 2)
    plan = kernels.plan_mla(1, 4, head_dim_v=64, device="cpu")
    kept = plan.memory(1, 1, 1, torch.device("cpu"))
    for _ in range(2):
        kernels.bind(kernels.mla_with_kvcache, **latents(), plan=plan)()
    taken = [driver.taken(one) for one in driver.launches]
    assert [one["PARTIAL"] for one in taken] == [kept.partial.data_ptr()] * 2
    assert [one["FINISHED"] for one in taken] == [kept.finished.data_ptr()] * 2
    for change, says in (({"q": zeros(1, 8, 96)}, "num_heads 4, the call 8"),
                         ({"q": zeros(2, 4, 96)}, "max_q 1, the call 2")):  # fmt: skip
        with pytest.raises(InvalidInput, match=says):
            kernels.bind(kernels.mla_with_kvcache, **latents() | change, plan=plan)
    with pytest.raises(InvalidInput, match="plan is a MlaPlan"):
        kernels.bind(kernels.attn_with_kvcache, **attention(), plan=plan)
    other = kernels.plan_attention(1, 64, 8, 2, 64, BF16, device="cpu")
    with pytest.raises(InvalidInput, match="plan is a Plan"):
        kernels.bind(kernels.mla_with_kvcache, **latents(), plan=other)
    with pytest.raises(InvalidInput, match="max_batch is 0"):
        kernels.plan_mla(0, 4, device="cpu")


def test_a_released_call_keeps_none_of_its_tensors_and_is_given_all(driver, case):
    function, given, launches, names = case
    given |= {"out": zeros(*given["q"].shape[:2], 64)} if "q" in given else {}
    call = kernels.bind(function, **given).release()
    others = {name: given[name].clone() for name in call.takes}
    gone = [weakref.ref(given.pop(name)) for name in call.takes]
    assert not any(ref() is not None for ref in gone)
    result = call(*others.values())
    assert (result[0] if isinstance(result, tuple) else result) is others.get("out")
    assert [one.function[0] for one in driver.launches] == launches
    taken = [x for one in driver.launches for x in driver.taken(one).items()]
    assert {(n, x.data_ptr()) for n, x in zip(names, others.values(), strict=True)} <= set(taken)
    for few in ((), list(others.values())[:-1]):
        with pytest.raises(InvalidInput, match="keeps none"):
            call(*few)


def test_a_map_of_a_cache_goes_with_it(driver, monkeypatch):
    """One bound call serves all layers, also of the kernel that finds blocks by a tensor map."""
    from kvcached.kernels import _prefill_tma as tma

    def made(address, *form):
        found = _tensor_maps.TensorMap(address.to_bytes(128, "little"))
        found.address, found.form = address, form
        return found

    for module in (_tensor_maps, tma):
        monkeypatch.setattr(module, "tensor_map", made)
    monkeypatch.setattr(tma, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(prefill, "suits_tma", lambda *_: True)
    given = attention(40, q=zeros(40, 8, 128), k_cache=zeros(4, 16, 2, 128),
                      v_cache=zeros(4, 16, 2, 128), out=zeros(40, 8, 128))  # fmt: skip
    call = kernels.bind(kernels.attn_with_kvcache, **given)
    call()
    others = [given[name].clone() for name in call.takes]
    call(*others)
    call.at([x.data_ptr() for x in others])
    assert driver.launches[1] == driver.launches.pop()
    for one, (keys, values) in zip(driver.launches, ([given[n] for n in ("k_cache", "v_cache")],
                                                     others[-2:]), strict=True):  # fmt: skip
        taken = driver.taken(one)
        maps = [int.from_bytes(taken[n], "little") for n in ("K_MAP", "K_REST_MAP", "V_MAP")]
        assert maps == [keys.data_ptr(), keys.data_ptr(), values.data_ptr()]
        assert (taken["K"], taken["V"]) == (keys.data_ptr(), values.data_ptr())


@pytest.mark.parametrize("arguments", ["maps alone", "a copy of the address", "bytes"])
def test_a_launch_that_would_go_on_reading_the_first_cache_takes_no_other(
    driver, monkeypatch, arguments
):
    made = {}

    def prepare(call, *_):
        map_of = _tensor_maps.TensorMap(128)
        map_of.address, map_of.form = call.kv.k_ptr, ()
        made["map"] = map_of
        places = {"maps alone": (map_of,), "bytes": (call.kv.k_ptr, bytes(128)),
                  "a copy of the address": (call.kv.k_ptr + 64,)}[arguments]  # fmt: skip
        used = (call.q, call.lens, call.table, call.out, *places)
        return [SimpleNamespace(arguments=used)]

    class Step:
        def __init__(self, launch, given):
            made["given"] = given

        def again(self, stream): ...

        def __call__(self, stream, addresses):
            made["addresses"] = addresses

    monkeypatch.setattr(binding.attention, "prepare", prepare)
    monkeypatch.setattr(_bound, "Bound", Step)
    monkeypatch.setattr(_tensor_maps, "tensor_map", lambda address, *_: ("map", address))
    given = attention(out=zeros(1, 8, 64))
    call = kernels.bind(kernels.attn_with_kvcache, **given)
    call()
    others = [given[name].clone() for name in call.takes[:5]]
    if arguments == "maps alone":
        call(*others)
        assert made["given"][-1] is made["map"]
        assert made["addresses"][-1] == ("map", others[4].data_ptr())
    else:
        with pytest.raises(InvalidInput, match="cannot take another cache"):
            call(*others)


def test_a_plan_takes_calls_of_more_tokens_than_it_is_made_for(driver):
    """Few rows are not the prefill kernel's: they are cut as without a plan, in its memory."""
    plan = kernels.plan_attention(1, 64, 8, 2, 64, BF16, device="cpu")
    kernels.bind(kernels.attn_with_kvcache, **attention(3), plan=plan, num_splits=2)()
    assert driver.launches[0].function[0] == "attend_kernel"
    held = {work.partial.data_ptr() for work in plan.memory._held}
    assert driver.taken(driver.launches[0])["PARTIAL"] in held


@pytest.mark.parametrize(("change", "says"), [
    (lambda q: q[:, :4], "shape"), (lambda q: q.float(), "dtype"),
    (lambda q: zeros(1, 8, 128)[..., :64], "strides"),
    (lambda q: zeros(8 * 64 + 1)[1:].view(1, 8, 64), "address modulo 16"),
    (lambda q: q.as_subclass(Elsewhere), "device"),
])  # fmt: skip
def test_a_tensor_that_the_kernel_was_not_made_for_is_refused(driver, change, says):
    given = attention()
    call = kernels.bind(kernels.attn_with_kvcache, **given)
    with pytest.raises(InvalidInput, match=f"q has .*{says}"):
        call(change(given["q"]))
    q, lens, table = given["q"], given["cache_seqlens"], given["page_table"]
    every = q, q, lens, table, given["k_cache"], given["v_cache"], q
    for others in (("q",), every):
        with pytest.raises(InvalidInput, match=r"q, out, cache_seqlens, page_table"):
            call(*others)
    assert not driver.launches


@pytest.mark.parametrize(("change", "name"), [
    ({"cache_seqlens": ints(40, 1, 20, 2)[::2], "q": zeros(2, 8, 64),
      "page_table": ints(0, 1, 2, 0, 1, 2).view(2, 3)}, "cache_seqlens"),
    ({"sinks": torch.zeros(8, dtype=torch.float16)}, "sinks"),
    ({"softmax_scale": -1.0, "q": zeros(40, 8, 64), "max_seqlen_q": 40}, "q"),
])  # fmt: skip
def test_what_a_kernel_would_read_from_a_copy_is_not_bound(driver, change, name):
    with pytest.raises(InvalidInput, match=f"^.*{name} cannot be bound"):
        kernels.bind(kernels.attn_with_kvcache, **attention() | change)
    assert not driver.launches


def test_only_calls_that_write_in_one_place_are_bound(driver):
    with pytest.raises(InvalidInput, match="reshape_and_cache"):
        kernels.bind(kernels.gather_kv)
    with pytest.raises(InvalidInput, match="k and v"):
        kernels.bind(kernels.attn_with_kvcache, **attention(), k=zeros(1, 2, 64))
    with pytest.raises(InvalidInput, match="head dim"):
        kernels.bind(kernels.attn_with_kvcache, **attention() | {"q": zeros(1, 8, 32)})
    assert not driver.launches


def test_on_the_cpu_a_bound_call_is_the_function(monkeypatch):
    given = attention()
    given["k_cache"] += 1
    call = kernels.bind(kernels.attn_with_kvcache, **given)
    assert not call().any()
    given["v_cache"].fill_(3)
    assert call().eq(3).all(), "with what its tensors hold by then"
    out = torch.full_like(given["q"], math.nan)
    assert call(given["q"] + 1, out) is out
    assert out.eq(3).all()
