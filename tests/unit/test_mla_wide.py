"""The latent attention of Hopper, compiled and launched without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from other_python import run_python

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one thread block may have on sm_90."""


@pytest.fixture(scope="module")
def compiled():
    return json.loads(run_python(str(Path(__file__).with_name("aot_mla_wide.py")), timeout=200))


@pytest.fixture(scope="module")
def attention(compiled):
    found = {name: needs for name, needs in compiled.items() if name.startswith("mla")}
    assert len(found) == 6
    return found


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_it_compiles_without_spills(compiled):
    assert len(compiled) == 8
    for name, needs in compiled.items():
        assert needs["stack"] == 0, (name, needs)
        assert needs["shared"] <= SHARED_LIMIT, (name, needs)


@pytest.mark.slow
def test_two_tiles_of_latents_are_on_their_way(attention):
    for name, needs in attention.items():
        assert needs["buffered"] == 147_456
        assert needs["shared"] > needs["buffered"] + 64 * 576 * 2, (name, needs)
        # Of 16 bytes a thread: a tile and the queries are 36 for each of 128.
        assert needs["wide_copies"] == 72, (name, needs)


@pytest.mark.slow
def test_three_roles_share_the_registers_and_products_do_not_wait(attention):
    for name, needs in attention.items():
        # All threads begin with as many; the roles then take what they need of them.
        assert needs["registers"] * 3 * 128 <= 65_536, (name, needs)
        assert needs["register_changes"] >= 3, (name, needs)
        # 36 of the scores and 4 of the sums, before, in and after the loop; 4 of the other half
        assert needs["warpgroup_products"] == 84, (name, needs)
        assert not needs["serialized"], f"{name}: each product waits for the one before it"


@pytest.mark.slow
def test_parts_in_16_bits_are_written_16_bytes_at_a_time(attention):
    for name, needs in attention.items():
        parts = "64 parts" in name or "page 256" in name or "page 16" in name
        assert needs["wide_stores"] == (32 if parts else 0), (name, needs)


HEADS = 128


@pytest.fixture
def launched(monkeypatch):
    """(splits) -> the launches of three sequences of two tokens: name, grid, arguments by name."""
    from fake_launches import launch_nothing

    from kvcached.kernels import _launch, mla

    driver = launch_nothing(monkeypatch)
    monkeypatch.setattr(_launch, "runs_gluon", lambda _: True)
    cache = torch.zeros(6, 64, 576, dtype=torch.bfloat16)
    table, lens = torch.arange(6).int().view(3, 2), torch.tensor([128, 70, 2]).int()

    def run(splits):
        driver.launches.clear()
        q = torch.zeros(6, HEADS, 576, dtype=torch.bfloat16)
        call = mla.check_mla(q, cache, table, lens, 512, 0.1)
        mla.attend_mla(call, splits)
        found = [(one.function[0], one.grid, driver.taken(one)) for one in driver.launches]
        return call, found

    return run


def test_one_part_is_written_at_once(launched):
    call, [(name, grid, taken)] = launched(1)
    assert (name, grid) == ("mla_wide_kernel", (3 * 4, 1, 1))
    assert [taken[x] for x in ("Q", "KV", "OUT", "LSE")] == [
        call.q.data_ptr(), call.kv.k_ptr, call.out.data_ptr(), call.lse.data_ptr(),
    ]  # fmt: skip
    assert [taken[x] for x in ("PARTIAL", "STATE", "FINISHED")] == [0, 0, 0]
    assert (taken["max_q"], taken["stride_block"], taken["stride_slot"]) == (2, 64 * 576, 576)


def test_the_later_of_two_parts_merges_them(launched):
    _, [(name, grid, taken)] = launched(2)
    assert (name, grid) == ("mla_wide_kernel", (3 * 4, 2, 1))
    assert all(taken[x] for x in ("PARTIAL", "STATE", "FINISHED"))


def test_more_parts_are_merged_by_another_launch(launched):
    call, [(_, grid, taken), (name, merge_grid, merged)] = launched(4)
    assert grid == (3 * 4, 4, 1)
    assert (name, merge_grid) == ("mla_merge_kernel", (6 * HEADS // 16, 4, 1))
    assert merged["PARTIAL"] == taken["PARTIAL"] != 0
    assert merged["STATE"] == taken["STATE"] != 0
    assert (merged["OUT"], merged["LSE"]) == (call.out.data_ptr(), call.lse.data_ptr())
    assert (merged["rows"], merged["heads"]) == (6 * HEADS, HEADS)
    assert (merged["stride_ot"], merged["stride_oh"]) == (HEADS * 512, 512)
