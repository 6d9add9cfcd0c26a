"""A call that a plan knows is launched by its addresses; whatever differs goes the long way."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from fake_launches import launch_nothing

pytest.importorskip("triton")
from kvcached.kernels import (
    _launch,
    _repeat,
    _write_triton,
    append,
    attention,
    decode,
    plan_attention,
)
from kvcached.kernels import plan as planning
from kvcached.kernels._repeat import Known, KnownAppends
from kvcached.kernels._workspace import Growing, make_workspace
from kvcached.kernels.checks import check_call

OPTIONS = (1, None, True, (-1, -1), 0.0, 0)


def given(**changes):
    cache = torch.zeros(4, 16, 2, 8)
    every = dict.fromkeys(("cache_start", "cu_seqlens_q", "custom_mask", "sinks", "alibi_slopes",
                           "k_descale", "v_descale", "out"))  # fmt: skip
    return every | {
        "q": torch.zeros(2, 4, 8), "k_cache": cache, "v_cache": cache.clone(),
        "cache_seqlens": torch.tensor([3, 20], dtype=torch.int32),
        "page_table": torch.tensor([[1, 0], [2, 3]], dtype=torch.int32),
    } | changes  # fmt: skip


def ordered(call):
    names = ("q", "k_cache", "v_cache", "page_table", "cache_start", "cache_seqlens",
             "cu_seqlens_q", "custom_mask", "sinks", "alibi_slopes", "k_descale", "v_descale",
             "out")  # fmt: skip
    return tuple(call[name] for name in names)


@pytest.fixture
def driver(monkeypatch):
    return launch_nothing(monkeypatch)


@pytest.fixture
def known(driver, monkeypatch):
    monkeypatch.setattr(_launch, "device_here", lambda: None)  # the index of the CPU
    return Known(8, torch.device("cpu"), planned=True)


def learned(known, call, **options):
    """What the call was learned from; without a plan it takes two of them."""
    for _ in range(2):
        checked = check_call(**call, **options)
        steps = attention.prepare(checked)
        known.learn(ordered(call), OPTIONS, checked, steps)
    return steps


def test_a_known_call_is_launched_with_the_addresses_of_its_own_tensors(known, driver):
    call = given()
    learned(known, call)
    again = call | {name: call[name].clone() for name in ("q", "cache_seqlens", "page_table")}
    again["q"] += 1
    out, lse = known.launch(ordered(again), OPTIONS, with_lse=True)
    (launched,) = driver.launches
    assert (launched.grid, launched.stream) == ((4, 1, 1), 77)
    taken = driver.taken(launched)
    want = {"Q": again["q"], "K": again["k_cache"], "V": again["v_cache"],
            "TABLE": again["page_table"], "LENS": again["cache_seqlens"], "OUT": out,
            "LSE": lse}  # fmt: skip
    assert {name: taken[name] for name in want} == {name: x.data_ptr() for name, x in want.items()}
    absent = ("Q_STARTS", "MASKS", "SINKS", "SLOPES", "K_SCALE", "V_SCALE")
    assert [taken[name] for name in absent] == [0] * 6
    assert (out.shape, lse.shape) == ((2, 4, 8), (2, 4))


@pytest.mark.parametrize("tokens", [1, 40])
def test_all_tensors_of_a_known_call_may_be_others(driver, monkeypatch, tokens):
    monkeypatch.setattr(_launch, "device_here", lambda: None)
    known = Known(0, torch.device("cpu"), planned=False)
    starts = torch.tensor([0, tokens, 2 * tokens], dtype=torch.int32)
    call = given(q=torch.zeros(2 * tokens, 4, 8), sinks=torch.zeros(4), alibi_slopes=torch.zeros(4),
                 cu_seqlens_q=starts, out=torch.zeros(2 * tokens, 4, 8))  # fmt: skip
    learned(known, call, max_seqlen_q=tokens)
    again = {name: x if name in {"k_cache", "v_cache"} or x is None else x.clone()
             for name, x in call.items()}  # fmt: skip
    out, _ = known.launch(ordered(again), OPTIONS, with_lse=False)
    assert out is again["out"]
    taken = driver.taken(driver.launches[0])
    want = {"Q": "q", "TABLE": "page_table", "LENS": "cache_seqlens", "SINKS": "sinks",
            "SLOPES": "alibi_slopes", "Q_STARTS": "cu_seqlens_q", "OUT": "out"}  # fmt: skip
    assert driver.launches[0].function[0] == ("attend_kernel" if tokens == 1 else "prefill_kernel")
    assert {name: taken[name] for name in want} == {
        name: again[given_as].data_ptr() for name, given_as in want.items()
    }


def test_without_a_plan_a_call_is_remembered_when_it_comes_again(driver, monkeypatch):
    monkeypatch.setattr(_launch, "device_here", lambda: None)
    known = Known(0, torch.device("cpu"), planned=False)
    call = given()
    for known_by_now in (False, True):
        assert known.launch(ordered(call), OPTIONS, with_lse=False) is None
        checked = check_call(**call)
        known.learn(ordered(call), OPTIONS, checked, attention.prepare(checked))
        assert (known.launch(ordered(call), OPTIONS, with_lse=False) is not None) is known_by_now


def test_an_lse_that_nobody_reads_goes_to_one_buffer_which_grows(known, driver):
    call = given()
    learned(known, call)
    _, first = known.launch(ordered(call), OPTIONS, with_lse=False)
    larger = given(q=torch.zeros(4, 4, 8), cache_seqlens=torch.tensor([3, 20]).int())
    learned(known, larger, max_seqlen_q=2)
    for _ in range(2):
        known.launch(ordered(larger), OPTIONS, with_lse=False)
    _, lse = known.launch(ordered(call), OPTIONS, with_lse=False)
    written = [driver.taken(one)["LSE"] for one in driver.launches]
    assert written == [first.data_ptr(), *[lse.data_ptr()] * 3]
    assert lse.numel() >= 16 > first.numel()
    _, asked = known.launch(ordered(call), OPTIONS, with_lse=True)
    assert asked.shape == (2, 4)
    assert asked.data_ptr() not in written


def test_memory_of_a_plan_grows_and_what_was_too_small_is_kept_for_graphs():
    cpu = torch.device("cpu")
    memory = Growing(make_workspace(1, 10, 1, cpu))
    small = memory(1, 10, 1, cpu)
    kept = weakref.ref(small.partial)
    large = memory(3, 40, 2, cpu)
    assert large.holds(3, 40, 2)
    assert memory(3, 40, 2, cpu) is large
    assert memory(1, 5, 1, cpu) is small
    del small
    assert kept() is not None


def test_what_was_aligned_is_not_taken_for_what_is_not(known):
    wide = torch.zeros(2 * 4 * 8 + 1)
    lens = torch.zeros(8, dtype=torch.int32)
    call = given(q=wide[:-1].view(2, 4, 8), cache_seqlens=lens[:2])
    learned(known, call)
    for change in ({"q": wide[1:].view(2, 4, 8)}, {"cache_seqlens": lens[1:3]}):
        assert known.launch(ordered(call | change), OPTIONS, with_lse=False) is None
        learned(known, call | change)
        assert known.launch(ordered(call | change), OPTIONS, with_lse=False) is not None
        both = {"q": wide[1:].view(2, 4, 8), "cache_seqlens": lens[1:3]}
        assert known.launch(ordered(call | both), OPTIONS, with_lse=False) is None


@pytest.mark.parametrize("change", [
    {"q": torch.zeros(2, 4, 16)[..., :8]}, {"q": torch.zeros(1, 4, 8)},
    {"q": torch.zeros(65)[1:].view(2, 4, 8)}, {"k_cache": torch.zeros(4, 16, 2, 8)},
    {"cache_seqlens": torch.tensor([3, 20])}, {"sinks": torch.zeros(4)},
    {"page_table": torch.zeros(2, 3, dtype=torch.int32)}, {"out": torch.zeros(2, 4, 8)},
    {"cache_start": torch.zeros(2, dtype=torch.int32)}, {"page_table": [[1, 0], [2, 3]]},
])  # fmt: skip
def test_a_call_that_differs_is_not_known(known, driver, change):
    call = given()
    learned(known, call)
    assert known.launch(ordered(call | change), OPTIONS, with_lse=False) is None
    assert known.launch(ordered(call), (*OPTIONS[:5], 2), with_lse=False) is None
    assert known.launch(ordered(call), (*OPTIONS[:3], [-1, -1], 0.0, 0), with_lse=False) is None
    assert not driver.launches
    assert known.launch(ordered(call), OPTIONS, with_lse=False) is not None


def test_a_call_on_another_device_or_with_converted_tensors_goes_the_long_way(known, monkeypatch):
    call = given(sinks=torch.zeros(4, dtype=torch.float16))
    learned(known, call)  # sinks were converted: the launch has other addresses
    assert known.launch(ordered(call), OPTIONS, with_lse=False) is None
    call = given()
    learned(known, call)
    monkeypatch.setattr(_launch, "device_here", lambda: 1)
    assert known.launch(ordered(call), OPTIONS, with_lse=False) is None


def test_the_oldest_calls_are_forgotten(known, monkeypatch):
    monkeypatch.setattr(_repeat, "MOST_KNOWN", 1)
    first, second = given(), given()
    learned(known, first)
    learned(known, second)
    assert known.launch(ordered(first), OPTIONS, with_lse=False) is None
    assert known.launch(ordered(second), OPTIONS, with_lse=False) is not None


def test_without_a_plan_new_views_of_a_known_cache_are_known(driver, monkeypatch):
    monkeypatch.setattr(_launch, "device_here", lambda: None)
    known = Known(0, torch.device("cpu"), planned=False)
    call = given()
    learned(known, call)
    again = call | {name: call[name].view(4, 16, 2, 8) for name in ("k_cache", "v_cache")}
    out, lse = known.launch(ordered(again), OPTIONS, with_lse=False)
    taken = driver.taken(driver.launches[0])
    assert (taken["K"], taken["V"]) == (call["k_cache"].data_ptr(), call["v_cache"].data_ptr())
    assert (taken["OUT"], taken["LSE"]) == (out.data_ptr(), lse.data_ptr())
    assert lse.numel() >= 8
    for change in (call["k_cache"].clone(), call["k_cache"][:3]):
        assert known.launch(ordered(call | {"k_cache": change}), OPTIONS, with_lse=False) is None


def test_the_memory_of_a_known_call_outlives_the_one_that_took_its_place(known):
    call = given()
    steps = learned(known, call)
    parts = {name: x for name, x in zip(steps[0].kernel.arg_names, steps[0].arguments, strict=False)
             if name in {"WORK", "PARTIAL", "STATE", "FINISHED"}}  # fmt: skip
    assert len(parts) == 4
    kept = [weakref.ref(x) for x in parts.values()]
    del steps, parts
    gc.collect()
    assert all(ref() is not None for ref in kept)
    known.clear()
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_each_stream_knows_its_own_calls_and_a_capture_none(monkeypatch):
    stream = [5]
    monkeypatch.setattr(_launch, "stream_of", lambda index: stream[0] + index)
    monkeypatch.setattr(_repeat, "_streams", {})
    capturing = [False]
    monkeypatch.setattr(_launch, "capturing", lambda: capturing[0])
    first = _repeat.known_here(1)
    assert first is _repeat.known_here(1)
    assert first is not _repeat.known_here(0)
    stream[0] = 7
    assert _repeat.known_here(1) is not first
    capturing[0] = True
    assert _repeat.known_here(1) is None


# --- how many parts ----------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "longest", "parts"), [
    (8, 1024, 16), (8, 128, 2), (8, 32768, 16), (1, 1 << 20, 128),  # one program an SM
    (128, 4096, 1), (512, 8192, 1), (1000, 1 << 17, 1), (32, 8192, 4),
    (64, 131072, 4), (128, 8192, 2),  # parts are long
    (90, 2048, 2), (100, 2048, 1),  # most SMs must work
])  # fmt: skip
def test_there_is_one_wave_of_parts_unless_they_are_long(monkeypatch, items, longest, parts):
    monkeypatch.setattr(decode, "multiprocessors", lambda _: 132)
    assert decode.equal_parts(items, longest, torch.device("cuda")) == parts


def test_a_plan_compiles_its_planner_once_and_tells_it_the_parts_of_like_lengths(monkeypatch):
    made = plan_attention(8, 4096, 32, 8, 128, torch.bfloat16, device="cpu")
    made.slots = 200
    monkeypatch.setattr(planning, "equal_parts", lambda items, *_: 132 // items)
    monkeypatch.setattr(_launch, "stream_of", lambda _: 77)
    asked, calls = [], []

    def handle_of(*_, **options):
        asked.append(options)
        return lambda *numbers: calls.append(numbers)

    monkeypatch.setattr(planning, "handle_of", handle_of)
    lens = torch.tensor([7, 9], dtype=torch.int32)
    for starts in (None, torch.tensor([0, 1, 2], dtype=torch.int32), None):
        made._launch(lens, starts, made._numbers(len(lens)))
    assert len(asked) == 2
    assert calls[0] == calls[2]
    grid = -(-200 // 64)
    place = made.workspace.work.data_ptr()
    assert calls[0] == ((grid,), 77, lens.data_ptr(), 0, place, 2, 1, 1 << 30, 4, 200, 1, 16)


# --- appends -------------------------------------------------------------------------------------


def appended(**changes):
    every = {"key": torch.zeros(3, 2, 8), "value": torch.zeros(3, 2, 8),
             "slots": torch.tensor([4, 5, 6], dtype=torch.int32),
             "k_cache": torch.zeros(4, 16, 2, 8), "v_cache": torch.zeros(4, 16, 2, 8),
             "k_scale": None, "v_scale": None} | changes  # fmt: skip
    return tuple(every.values())


def append_known(tensors):
    """The calls that are known after this one came twice."""
    key, value, slots, *rest = tensors
    known = KnownAppends()
    for _ in range(2):
        assert not known.launch(tensors, "auto")
        steps = append.prepare(append.check_append(key, value, *rest[:2], slots, "auto", *rest[2:]))
        known.learn(tensors, "auto", steps)
    return known


@pytest.fixture
def here(driver):
    yield driver
    _write_triton._prepared.cache_clear()


@pytest.mark.parametrize("int8", [False, True])
def test_an_append_that_came_twice_is_queued_with_its_own_rows(here, int8):
    more = {}
    if int8:
        more = {name: torch.zeros(4, 16, 2, 8).char() for name in ("k_cache", "v_cache")}
        more |= {name: torch.ones(()) for name in ("k_scale", "v_scale")}
    tensors = appended(**more)
    known = append_known(tensors)
    again = (*(x.clone() for x in tensors[:3]), *tensors[3:])
    assert known.launch(again, "auto")
    (launched,) = here.launches
    taken = here.taken(launched)
    names = ("KEY", "VALUE", "SLOTS", "K", "V")
    assert [taken[name] for name in names] == [x.data_ptr() for x in again[:5]]


@pytest.mark.parametrize("change", [
    {"key": torch.zeros(4, 2, 8)}, {"value": torch.zeros(3, 2, 16)[..., :8]},
    {"value": torch.zeros(49)[1:].view(3, 2, 8)}, {"slots": torch.zeros(3)},
    {"k_cache": torch.zeros(4, 16, 2, 8)}, {"v_cache": torch.zeros(4, 16, 2, 8).half()},
    {"k_scale": torch.ones(()), "v_scale": torch.ones(())}, {"slots": [4, 5, 6]},
])  # fmt: skip
def test_an_append_that_differs_is_not_known(here, change):
    tensors = appended()
    known = append_known(tensors)
    names = ("key", "value", "slots", "k_cache", "v_cache", "k_scale", "v_scale")
    assert not known.launch(
        tuple((dict(zip(names, tensors, strict=True)) | change).values()), "auto"
    )
    assert not known.launch(tensors, "int8")
    assert not here.launches
    assert known.launch(tensors, "auto")
