"""How parts become programs: alone on an SM, in clusters, begun early. Nothing is launched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")
import torch

from kvcached.kernels import _sizes, decode
from kvcached.kernels.checks import check_call
from kvcached.kernels.quant import INT4

SMS, SHARED = 132, 233_472


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(decode, "multiprocessors", lambda _: SMS)
    monkeypatch.setattr(decode, "starts_early", lambda _: True)
    monkeypatch.setattr(decode, "_share_of_shared", lambda _, programs: SHARED // (programs + 1))


def started(batch, length, *, heads=8, group=4, asked=0, plan=None, stored=torch.bfloat16):
    """(start, sizes before) of a batch of one length; so cut as on a GPU of 132 SMs."""
    q = torch.empty(batch, heads * group, 128, dtype=torch.bfloat16)
    k = torch.empty(2, 16, heads, 64 if stored == INT4 else 128, dtype=stored)
    scale = torch.empty(2, 16, heads) if stored == INT4 else None
    call = check_call(
        q, k, k, cache_seqlens=torch.empty(batch, dtype=torch.int32),
        page_table=torch.empty(batch, length // 16, dtype=torch.int32), k_descale=scale,
        v_descale=scale,
    )  # fmt: skip
    config = _sizes.tile_config(group, 128, 128, 1, q.dtype, k.dtype)
    parts = asked or max(1, min(SMS // (batch * heads), length // 64))
    split = decode.Split(parts, parts)
    return decode._start(call, config, batch * heads, split, asked, plan), config


def test_short_sequences_are_cut_into_a_tile_each_and_merged_by_clusters(hopper):
    start, _ = started(1, 1024)
    assert (start.split.most, start.split.divisor) == (8, 8)
    assert (start.grid, start.warps) == ((64, 1), 4)
    assert start.options == {"launch_pdl": True, "cluster": 8, "least_shared": SHARED // 2}
    assert (start.constants["CLUSTER"], start.constants["BN"], start.constants["EARLY"]) == (
        8, 128, True
    )  # fmt: skip
    start, _ = started(4, 512)
    assert (start.grid, start.constants["CLUSTER"]) == ((128, 1), 4)


@pytest.mark.parametrize(("batch", "length", "options"), [
    (1, 1040, {}),  # more than a tile each
    (1, 1024, {"group": 32}),  # tiles of more than 16 rows
    (1, 1024, {"asked": 8}), (16, 4096, {}), (17, 64, {}),
])  # fmt: skip
def test_others_are_merged_by_the_last_part(hopper, batch, length, options):
    start, _ = started(batch, length, **options)
    assert start.constants["CLUSTER"] == 0
    assert start.options.get("cluster", 1) == 1
    assert start.grid[1] == start.split.most


def test_programs_that_have_an_sm_each_begin_early_and_share_it_with_none(hopper):
    for start in (started(1, 32768)[0], started(16, 4096)[0]):
        assert start.options == {"launch_pdl": True, "cluster": 1, "least_shared": SHARED // 2}
        assert start.constants["EARLY"]
    start, config = started(32, 8192, heads=1, group=32)
    assert (start.grid, config["BN"], start.constants["BN"]) == ((32, 4), 64, 128)


def test_more_programs_do_not_and_neither_do_fixed_parts(hopper):
    start, config = started(17, 4096)
    assert not start.options
    assert not start.constants["EARLY"]
    assert start.constants["STAGES"] == config["STAGES"]
    plan = SimpleNamespace(balanced=False, fixed=2048, shape={"max_seqlen_k": 1024}, slots=1)
    start, config = started(1, 1024, plan=plan)
    assert not start.options
    assert start.constants["STAGES"] == config["STAGES"]


def test_programs_that_have_room_at_once_in_small_tiles_take_them(hopper):
    start, _ = started(64, 2048)
    assert (start.constants["BN"], start.constants["STAGES"], start.grid) == (32, 3, (512, 1))
    assert start.options == {"launch_pdl": True, "cluster": 1, "least_shared": SHARED // 5}
    # A program's share, with the KiB that the driver keeps of each: four to an SM, not five.
    assert 4 * (SHARED // 5 + 1024) <= SHARED < 5 * (SHARED // 5 + 1024)


@pytest.mark.parametrize(("batch", "options"), [
    (33, {}), (57, {}), (67, {}), (64, {"group": 8, "heads": 4}), (8, {"asked": 8}),
    (64, {"group": 32}),
])  # fmt: skip
def test_others_keep_their_tiles(hopper, batch, options):
    start, config = started(batch, 2048, **options)
    assert (start.constants["BN"], start.constants["STAGES"]) == (config["BN"], config["STAGES"])
    assert not start.options


@pytest.mark.parametrize(("batch", "length", "options", "sizes"), [
    (128, 8192, {}, (256, 2)), (1, 32768, {"asked": 33}, (256, 2)),
    (16, 4096, {}, (128, 3)),  # an SM each
    (128, 256, {}, (128, 4)),  # short
    (64, 8192, {"group": 32, "heads": 4}, (128, 4)),  # tiles of more than 16 rows
])  # fmt: skip
def test_long_parts_of_int4_are_read_in_wide_tiles(hopper, batch, length, options, sizes):
    start, _ = started(batch, length, stored=INT4, **options)
    assert (start.constants["BN"], start.constants["STAGES"]) == sizes


def test_the_parts_of_a_list_are_read_in_the_tiles_that_it_was_cut_in(hopper):
    """Else a tile that begins within a block of 128 tokens would read past its end."""
    plan = SimpleNamespace(balanced=True, fixed=0, shape={"max_seqlen_k": 4096}, slots=128)
    start, config = started(2, 4096, heads=1, group=32, plan=plan)
    assert start.constants["EARLY"]
    assert start.constants["BN"] == config["BN"] == 64


def test_gpus_before_hopper_know_neither(hopper, monkeypatch):
    monkeypatch.setattr(decode, "starts_early", lambda _: False)
    start, _ = started(1, 1024)
    assert (start.grid, start.warps, start.options) == ((8, 16), 2, {})
    assert not start.constants["EARLY"]
    assert not start.constants["CLUSTER"]
